"""What a store is (``store.json``, written first) and that it is whole (``manifest.json``, last).

Neither holds a time, a host or a file name: both are pure functions of the documents, and files
are found by their shard's number, so that a foreign manifest cannot point outside the directory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron_replay.errors import StoreError
from megatron_replay.files import write_json
from megatron_replay.store.codecs import MAX_VOCAB_SIZE
from megatron_replay.store.document import located
from megatron_replay.store.format import (
    CRC,
    FORMAT_VERSION,
    ShardIndex,
    decode_index,
    encode_index,
)

FORMAT_NAME = "megatron_replay candidate store"
DESCRIPTION_FILE = "store.json"
MANIFEST_FILE = "manifest.json"


def bin_path(directory: Path, shard: int) -> Path:
    """Where the records of ``shard`` lie."""
    return directory / f"shard-{shard:06d}.bin"


def index_path(directory: Path, shard: int) -> Path:
    """Where the index of ``shard`` lies; the shard is there if and only if this file is."""
    return directory / f"shard-{shard:06d}.idx"


@dataclass(frozen=True, kw_only=True)
class StoreDescription:
    """Everything that decides a store's content. Two stores of one description are equal.

    Raises:
        StoreError: a field of another type or out of range, or a ``selection`` that JSON would
            not give back as it was.
    """

    vocab_size: int
    """Ids lie in ``0 <= id < vocab_size``."""
    num_documents: int
    documents_per_shard: int
    """Shard s holds documents ``s * documents_per_shard`` and on; the last may hold fewer."""
    has_logits: bool
    corpus_fingerprint: str
    tokenizer_fingerprint: str
    checkpoint_fingerprint: str
    selection: dict[str, Any]
    """How positions and candidates were chosen: coverage, max_candidates, seed, ..."""

    def __post_init__(self) -> None:
        """Check types and ranges: a description may come from an untrusted file."""
        for field in dataclasses.fields(self):
            kind = {"int": int, "bool": bool, "str": str}.get(str(field.type), dict)
            value = getattr(self, field.name)
            if type(value) is not kind:  # not isinstance: True is no number of documents
                self._refuse(field.name, kind.__name__, repr(value))
        for name, most in (
            ("vocab_size", MAX_VOCAB_SIZE),
            ("num_documents", 2**63 - 1),
            ("documents_per_shard", 2**63 - 1),
        ):
            if not 1 <= getattr(self, name) <= most:
                self._refuse(name, f"1 to {most}", getattr(self, name))
        try:
            same = json.loads(json.dumps(self.selection, allow_nan=False)) == self.selection
        except (TypeError, ValueError, RecursionError):
            same = False
        if not same:
            self._refuse("selection", "plain JSON values (no tuples, no NaN)", self.selection)

    def _refuse(self, name: str, expected: object, found: object) -> NoReturn:
        raise StoreError(f"unusable {name} of a store", expected=expected, found=found)

    @property
    def num_shards(self) -> int:
        """Shards of the whole store."""
        return -(-self.num_documents // self.documents_per_shard)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the description's canonical JSON (sorted keys, no spaces)."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def documents(self, shard: int) -> range:
        """The documents that ``shard`` holds."""
        start = shard * self.documents_per_shard
        return range(start, min(start + self.documents_per_shard, self.num_documents))

    def flat(self) -> dict[str, Any]:
        """Every field under its name, those of ``selection`` as ``selection.NAME``."""
        fields = dataclasses.asdict(self)
        selection = fields.pop("selection")
        return fields | {f"selection.{name}": value for name, value in selection.items()}


def refuse_differences(
    expected: dict[str, Any], found: dict[str, Any], *, where: Path, fix: str
) -> None:
    """Raise StoreError naming each field in which two descriptions differ, with both values."""
    names = [name for name in expected | found if expected.get(name) != found.get(name)]
    if names:
        raise StoreError(
            f"the store was made with another {', '.join(names)}",
            where=where,
            expected=", ".join(f"{name} = {expected.get(name, 'absent')}" for name in names),
            found=", ".join(f"{name} = {found.get(name, 'absent')}" for name in names),
            fix=fix,
        )


def read_file(path: Path) -> bytes:
    """All bytes of ``path``, or a StoreError that says why not."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"cannot read: {error.strerror or error}", where=path) from error


def _read_object(path: Path, keys: set[str]) -> dict[str, Any]:
    """The JSON object in ``path``, of our format and version, with exactly ``keys`` beside."""
    try:
        value = json.loads(read_file(path))
    except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8 or bad JSON
        raise StoreError("damaged: not JSON", where=path) from error
    if not isinstance(value, dict) or value.pop("format", None) != FORMAT_NAME:
        raise StoreError("not a file of a candidate store", where=path, expected=FORMAT_NAME)
    version = value.pop("version", None)
    if version != FORMAT_VERSION:
        raise StoreError(
            "another version of the format", where=path, expected=FORMAT_VERSION, found=version
        )
    if value.keys() != keys:
        raise StoreError(
            "damaged: other keys", where=path, expected=sorted(keys), found=sorted(value)
        )
    return value


def write_description(directory: Path, description: StoreDescription) -> None:
    """Write ``store.json``."""
    header = {"format": FORMAT_NAME, "version": FORMAT_VERSION}
    write_json(
        directory / DESCRIPTION_FILE, header | {"description": dataclasses.asdict(description)}
    )


def read_description(directory: Path) -> StoreDescription:
    """Read ``store.json``; StoreError when it is missing, damaged or of another version."""
    path = directory / DESCRIPTION_FILE
    if not os.path.exists(path):
        raise StoreError(
            "no candidate store here",
            where=directory,
            expected=DESCRIPTION_FILE,
            fix="Give the directory that Stage 0 wrote with --store",
        )
    fields = _read_object(path, {"description"})["description"]
    names = {field.name for field in dataclasses.fields(StoreDescription)}
    if not isinstance(fields, dict) or fields.keys() != names:
        raise StoreError("damaged: other fields in the description", where=path)
    with located(path):
        return StoreDescription(**fields)


def read_index(directory: Path, description: StoreDescription, shard: int) -> ShardIndex:
    """Read the index of ``shard`` and check that its ``.bin`` is there in full size.

    Raises:
        StoreError: either file is missing, cut off, damaged or of other documents.
    """
    path, documents = index_path(directory, shard), description.documents(shard)
    content = read_file(path)
    with located(path):
        index = decode_index(content, first_document=documents.start, num_documents=len(documents))
    records = bin_path(directory, shard)
    try:
        found = records.stat().st_size
    except OSError as error:
        raise StoreError(f"cannot read: {error.strerror or error}", where=records) from error
    if found != index.bin_bytes:
        raise StoreError(
            "damaged: another size",
            where=records,
            expected=f"{index.bin_bytes} bytes",
            found=found,
            fix=f"Delete {path.name} and rerun Stage 0: it writes this shard anew",
        )
    return index


def _manifest(description: StoreDescription, indexes: list[ShardIndex]) -> dict[str, Any]:
    shards = []
    for index in indexes:
        content = encode_index(index)
        shards.append(
            {
                "bin_bytes": index.bin_bytes,
                "bin_crc32": index.bin_crc,
                "idx_bytes": len(content),
                "idx_crc32": zlib.crc32(content[: -CRC.size]),
            }
        )
    return {"description_sha256": description.fingerprint, "shards": shards}


def write_manifest(directory: Path, description: StoreDescription) -> None:
    """Check every shard's index and size, then write ``manifest.json``: the store is whole."""
    indexes = [read_index(directory, description, s) for s in range(description.num_shards)]
    header = {"format": FORMAT_NAME, "version": FORMAT_VERSION}
    write_json(directory / MANIFEST_FILE, header | _manifest(description, indexes))


def read_manifest(directory: Path, description: StoreDescription) -> list[ShardIndex]:
    """The indexes of a finished store, each found equal to what ``manifest.json`` says of it.

    Raises:
        StoreError: unfinished, or the manifest, an index or a size does not agree with the rest.
    """
    path = directory / MANIFEST_FILE
    if not os.path.exists(path):
        done = len(list(directory.glob("shard-*.idx")))
        raise StoreError(
            f"unfinished: {done} of {description.num_shards} shards",
            where=directory,
            fix="Rerun Stage 0 with the same settings to finish",
        )
    found = _read_object(path, {"description_sha256", "shards"})
    rows = found["shards"]
    if not isinstance(rows, list) or len(rows) != description.num_shards:
        raise StoreError("damaged: another number of shards", where=path)
    indexes = [read_index(directory, description, s) for s in range(len(rows))]
    expected = _manifest(description, indexes)
    if found["description_sha256"] != expected["description_sha256"]:
        raise StoreError(
            f"{DESCRIPTION_FILE} is not what the manifest was written for",
            where=path,
            expected=found["description_sha256"],
            found=expected["description_sha256"],
        )
    for shard, (row, index_row) in enumerate(zip(rows, expected["shards"], strict=True)):
        if row != index_row:
            raise StoreError(
                f"shard {shard} is not the one the manifest was written for",
                where=path,
                expected=row,
                found=index_row,
            )
    return indexes
