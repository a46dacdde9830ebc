"""What a store is (``store.json``, written first) and that it is whole (``manifest.json``, last).

Neither holds a time, a host or a file name: both are pure functions of the documents, and files
are found by their shard's number, so that a foreign manifest cannot point outside the directory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_replay.errors import StoreError
from megatron_replay.files import atomic_file, open_regular, read_json, require_regular, write_json
from megatron_replay.store.document import LOGITS, located, require
from megatron_replay.store.format import (
    CODEC,
    FORMAT_VERSION,
    MAX_VOCAB_SIZE,
    ShardIndex,
    decode_index,
)

FORMAT_NAME = "megatron_replay candidate store"
_HEADER = {"format": FORMAT_NAME, "version": FORMAT_VERSION}
DESCRIPTION_FILE, MANIFEST_FILE = "store.json", "manifest.json"

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
            kind = {"int": int, "str": str}.get(str(field.type), dict)
            value = getattr(self, field.name)
            what = f"unusable {field.name} of a store"
            # Not isinstance: True is no number of documents.
            require(type(value) is kind, what, kind.__name__, repr(value))
            if kind is int:
                most = MAX_VOCAB_SIZE if field.name == "vocab_size" else 2**63 - 1
                require(1 <= value <= most, what, f"1 to {most}", value)
            choices = {"codec": (CODEC,), "logits": LOGITS}.get(field.name, (value,))
            require(value in choices, what, f"one of {', '.join(map(str, choices))}", value)
        require(
            self.num_shards <= MAX_SHARDS,
            "unusable documents_per_shard of a store",
            f"{-(-self.num_documents // MAX_SHARDS)} or more",
            self.documents_per_shard,
        )
        try:
            same = json.loads(json.dumps(self.selection, allow_nan=False)) == self.selection
        except (TypeError, ValueError, RecursionError):
            same = False
        expected = "plain JSON values (no tuples, no NaN)"
        require(same, "unusable selection of a store", expected, self.selection)

    @property
    def num_shards(self) -> int:
        """Shards of the whole store."""
        return -(-self.num_documents // self.documents_per_shard)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the description's canonical JSON (sorted keys, no spaces)."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def documents(self, shard: int) -> range:
        """The documents that ``shard`` holds."""
        start = shard * self.documents_per_shard
        return range(start, min(start + self.documents_per_shard, self.num_documents))

    def flat(self) -> dict[str, Any]:
        """Every field under its name, those of ``selection`` as ``selection.NAME``."""
        fields = asdict(self)
        selection = fields.pop("selection")
        return fields | {f"selection.{name}": value for name, value in selection.items()}


def refuse_differences(
    expected: dict[str, Any], found: dict[str, Any], *, where: Path, fix: str
) -> None:
    """Raise StoreError naming each field in which two descriptions differ, with both values."""
    names = [name for name in expected | found if expected.get(name) != found.get(name)]
    require(
        not names,
        f"the store was made with another {', '.join(names)}",
        ", ".join(f"{name} = {expected.get(name, 'absent')}" for name in names),
        ", ".join(f"{name} = {found.get(name, 'absent')}" for name in names),
        where=where,
        fix=fix,
    )


def _read_object(path: Path, keys: set[str], *, most: int) -> dict[str, Any]:
    """The JSON object in ``path``, of our format and version, with exactly ``keys`` in addition."""
    size = require_regular(path, StoreError)
    require(size <= most, "damaged: too large", f"at most {most} bytes", size, where=path)
    value = read_json(path, StoreError)
    with located(path):
        is_ours = value.pop("format", None) == FORMAT_NAME
        require(is_ours, "not a file of a candidate store", FORMAT_NAME)
        version = value.pop("version", None)
        require(version == FORMAT_VERSION, "another version of the format", FORMAT_VERSION, version)
        require(value.keys() == keys, "damaged: other keys", sorted(keys), sorted(value))
    return value


def write_description(directory: Path, description: StoreDescription) -> None:
    """Write ``store.json``."""
    write_json(directory / DESCRIPTION_FILE, _HEADER | {"description": asdict(description)})


def read_description(directory: Path) -> StoreDescription:
    """Read ``store.json``; StoreError when it is missing, damaged or of another version."""
    path = directory / DESCRIPTION_FILE
    require(
        os.path.exists(path),
        "no candidate store here",
        DESCRIPTION_FILE,
        where=directory,
        fix="Give the directory that Stage 0 wrote with --store",
    )
    fields = _read_object(path, {"description"}, most=_MOST_DESCRIPTION_BYTES)["description"]
    names = {field.name for field in dataclasses.fields(StoreDescription)}
    with located(path):
        is_whole = isinstance(fields, dict) and fields.keys() == names
        require(is_whole, "damaged: other fields in the description")
        return StoreDescription(**fields)


class ShardRow(NamedTuple):
    """A shard's row in the manifest."""

    bin_bytes: int
    bin_crc32: int
    idx_crc32: int
    """The crc32 that the ``.idx`` ends with."""


def read_index(
    directory: Path, description: StoreDescription, shard: int
) -> tuple[ShardIndex, ShardRow]:
    """Read the index of ``shard`` and check that its ``.bin`` is there in full size.

    Raises:
        StoreError: either file is missing, cut off, damaged or of other documents.
    """
    path, records = index_path(directory, shard), bin_path(directory, shard)
    with open_regular(path, StoreError) as handle, located(path):
        size = os.fstat(handle.fileno()).st_size
        index, crc = decode_index(handle, size, description.documents(shard))
    size = require_regular(records, StoreError)
    require(
        size == index.bin_bytes,
        "damaged: another size",
        f"{index.bin_bytes} bytes",
        size,
        where=records,
        fix=f"Delete {path.name} and rerun Stage 0: it writes this shard anew",
    )
    return index, ShardRow(index.bin_bytes, index.bin_crc, crc)


def write_manifest(directory: Path, description: StoreDescription) -> None:
    """Check every shard's index and size, then write ``manifest.json``: the store is whole."""
    rows = [read_index(directory, description, s)[1] for s in range(description.num_shards)]
    manifest = _HEADER | {"description_sha256": description.fingerprint, "shards": rows}
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
    rows, made_for = found["shards"], found["description_sha256"]
    with located(path):
        is_whole = isinstance(rows, list) and len(rows) == description.num_shards
        require(is_whole, "damaged: another number of shards")
        for shard, row in enumerate(rows):
            numbers = isinstance(row, list) and [type(number) for number in row] == [int] * 3
            require(
                numbers and min(row) >= 0 and row[0] < 2**63 and max(row[1:]) < 2**32,
                f"damaged: the row of shard {shard}",
                "[bytes of the .bin, its crc32, crc32 of the .idx]",
                row,
            )
        require(
            made_for == description.fingerprint,
            f"{DESCRIPTION_FILE} is not what the manifest was written for",
            made_for,
            description.fingerprint,
        )
    return [ShardRow(*row) for row in rows]
