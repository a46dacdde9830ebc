"""What a store is (``store.json``, written first) and that it is whole (``manifest.json``, last).

Neither holds a time, a host or a file name: both are pure functions of the documents, and files
are found by their shard's number, so that a foreign manifest cannot point outside the directory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from megatron_replay.errors import StoreError
from megatron_replay.files import (
    atomic_file,
    open_regular,
    read_json,
    require_regular,
    write_json,
)
from megatron_replay.store.document import LOGITS, located, require
from megatron_replay.store.format import (
    CODEC,
    FORMAT_VERSION,
    MAX_VOCAB_SIZE,
    ShardIndex,
    decode_index,
)

FORMAT_NAME = "megatron_replay candidate store"
DESCRIPTION_FILE = "store.json"
MANIFEST_FILE = "manifest.json"


#: A store.json takes some kilobytes, a row of a manifest some thirty bytes, and whoever else writes
#: one fewer than this; seven digits number the shards.
_MOST_DESCRIPTION_BYTES, _MOST_ROW_BYTES, MAX_SHARDS = 1 << 24, 128, 10**7
#: Shards whose files share a sub-directory: metadata servers slow down long before 10,000 entries.
SHARDS_PER_DIRECTORY = 1000


def bin_path(directory: Path, shard: int) -> Path:
    """The file with the records of ``shard``."""
    return directory / f"{shard // SHARDS_PER_DIRECTORY:04d}" / f"shard-{shard:07d}.bin"


def index_path(directory: Path, shard: int) -> Path:
    """The file with the index of ``shard``; the shard is there if and only if this file is."""
    return bin_path(directory, shard).with_suffix(".idx")


def present_shards(directory: Path) -> set[int]:
    """Numbers of the shards that are there: one listing a sub-directory, no file is opened."""
    found = set()
    for path in directory.glob("[0-9]*/shard-*.idx"):
        number = path.stem.removeprefix("shard-")
        if number.isdecimal() and path == index_path(directory, int(number)):
            found.add(int(number))
    return found


@dataclass(frozen=True, kw_only=True)
class StoreDescription:
    """Everything that decides a store's content. Two stores of one description are equal.

    Raises:
        StoreError: a field of another type or out of range, or a ``selection`` that JSON would
            not give back as it was.
    """

    vocab_size: int
    """Ids are in ``0 <= id < vocab_size``."""
    num_documents: int
    documents_per_shard: int
    """Shard s holds documents ``s * documents_per_shard`` and on; the last may hold fewer."""
    codec: str = CODEC
    """How ids are written: always ``format.CODEC``."""
    logits: str
    """What is kept of the candidates' logits: one of ``document.LOGITS``."""
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
        if self.num_shards > MAX_SHARDS:
            least = -(-self.num_documents // MAX_SHARDS)
            self._refuse("documents_per_shard", f"{least} or more", self.documents_per_shard)
        for name, choices in (("codec", (CODEC,)), ("logits", LOGITS)):
            if getattr(self, name) not in choices:
                self._refuse(name, f"one of {', '.join(choices)}", getattr(self, name))
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


def _read_object(path: Path, keys: set[str], *, most: int) -> dict[str, Any]:
    """The JSON object in ``path``, of our format and version, with exactly ``keys`` in addition."""
    size = require_regular(path, StoreError)
    with located(path):
        require(size <= most, "damaged: too large", f"at most {most} bytes", size)
    value = read_json(path, StoreError)
    if value.pop("format", None) != FORMAT_NAME:
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
    content = _read_object(path, {"description"}, most=_MOST_DESCRIPTION_BYTES)
    fields = content["description"]
    names = {field.name for field in dataclasses.fields(StoreDescription)}
    if not isinstance(fields, dict) or fields.keys() != names:
        raise StoreError("damaged: other fields in the description", where=path)
    with located(path):
        return StoreDescription(**fields)


class ShardRow(NamedTuple):
    """A shard's row in the manifest."""

    bin_bytes: int
    bin_crc32: int
    idx_crc32: int
    """The crc32 that the ``.idx`` ends with."""


def read_index(
    directory: Path, description: StoreDescription, shard: int, row: ShardRow | None = None
) -> ShardIndex:
    """Read the index of ``shard`` and check that its ``.bin`` is there in full size.

    Args:
        row: the shard's row in the manifest; None while there is none.

    Raises:
        StoreError: either file is missing, cut off, damaged, of other documents, or not what
            the manifest was written for.
    """
    index, found = _read_index(directory, description, shard)
    if row is not None and row != found:
        raise StoreError(
            f"shard {shard} is not the one the manifest was written for",
            where=index_path(directory, shard),
            expected=row,
            found=found,
        )
    return index


def _read_index(
    directory: Path, description: StoreDescription, shard: int
) -> tuple[ShardIndex, ShardRow]:
    path, documents = index_path(directory, shard), description.documents(shard)
    with open_regular(path, StoreError) as handle, located(path):
        size = os.fstat(handle.fileno()).st_size
        index, crc = decode_index(
            handle, size, first_document=documents.start, num_documents=len(documents)
        )
    records = bin_path(directory, shard)
    size = require_regular(records, StoreError)
    if size != index.bin_bytes:
        raise StoreError(
            "damaged: another size",
            where=records,
            expected=f"{index.bin_bytes} bytes",
            found=size,
            fix=f"Delete {path.name} and rerun Stage 0: it writes this shard anew",
        )
    return index, ShardRow(index.bin_bytes, index.bin_crc, crc)


def write_manifest(directory: Path, description: StoreDescription) -> None:
    """Check every shard's index and size, then write ``manifest.json``: the store is whole."""
    rows = [_read_index(directory, description, s)[1] for s in range(description.num_shards)]
    header = {"format": FORMAT_NAME, "version": FORMAT_VERSION}
    manifest = header | {"description_sha256": description.fingerprint, "shards": rows}
    with atomic_file(directory / MANIFEST_FILE, "w") as handle:
        # One line: indented, every number would have its own.
        handle.write(json.dumps(manifest, sort_keys=True, separators=(",", ":")) + "\n")


def read_manifest(directory: Path, description: StoreDescription) -> list[ShardRow]:
    """The row of each shard in the ``manifest.json`` of a finished store.

    Raises:
        StoreError: unfinished, or the manifest is damaged or of another description.
    """
    path = directory / MANIFEST_FILE
    if not os.path.exists(path):
        raise StoreError(
            f"unfinished: {len(present_shards(directory))} of {description.num_shards} shards",
            where=directory,
            fix="Rerun Stage 0 with the same settings to finish",
        )
    most = _MOST_ROW_BYTES * (description.num_shards + 8)
    found = _read_object(path, {"description_sha256", "shards"}, most=most)
    rows = found["shards"]
    if not isinstance(rows, list) or len(rows) != description.num_shards:
        raise StoreError("damaged: another number of shards", where=path)
    for shard, row in enumerate(rows):
        numbers = isinstance(row, list) and [type(number) for number in row] == [int] * 3
        if not numbers or min(row) < 0 or row[0] >= 2**63 or max(row[1:]) >= 2**32:
            raise StoreError(
                f"damaged: the row of shard {shard}",
                where=path,
                expected="[bytes of the .bin, its crc32, crc32 of the .idx]",
                found=row,
            )
    if found["description_sha256"] != description.fingerprint:
        raise StoreError(
            f"{DESCRIPTION_FILE} is not what the manifest was written for",
            where=path,
            expected=found["description_sha256"],
            found=description.fingerprint,
        )
    return [ShardRow(*row) for row in rows]
