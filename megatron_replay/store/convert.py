"""The same store with another codec or other logits."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np

from megatron_replay.errors import StoreError
from megatron_replay.files import require_apart
from megatron_replay.progress import Progress
from megatron_replay.store.document import (
    CandidateBatch,
    decode_logits,
    encode_logits,
    located,
    require,
)
from megatron_replay.store.manifest import MANIFEST_FILE, StoreDescription
from megatron_replay.store.reader import DOCUMENTS_AT_ONCE, CandidateReader
from megatron_replay.store.workers import each_shard
from megatron_replay.store.writer import CandidateWriter


def convert(
    reader: CandidateReader, out: Path, *, codec: str, logits: str, workers: int = 1
) -> StoreDescription:
    """Write ``reader``'s documents to ``out``, then read both and compare; the description of out.

    Goes on where it was interrupted. Of logits: fp16 and bf16 become each other, rounded to
    nearest, and either may be dropped.

    Raises:
        ConfigError: ``out`` is the reader's own directory.
        StoreError: there are no logits to keep, one does not fit, ``out`` holds another store, or
            what was written reads differently.
        OutputError: ``out`` cannot be written.
    """
    given = reader.description
    require_apart(out, [("IN", reader.directory)], flag="OUT")
    if given.logits == "none" and logits != "none":
        raise StoreError("holds no logits", where=reader.directory, expected=logits, found="none")
    description = dataclasses.replace(given, codec=codec, logits=logits)
    with CandidateWriter(out, description, lock=True) as writer:
        write = partial(_write, writer, reader)
        missing, size = writer.missing_shards(), len(reader)
        left = sum(len(description.documents(shard)) for shard in missing)
        with Progress("convert", size, "documents", initial=size - left) as progress:
            for shard, _ in each_shard(write, missing, workers=workers):
                progress.advance(len(description.documents(shard)))
        writer.finish()
        try:
            require_equal(reader, CandidateReader(out), workers=workers)
        except BaseException:  # nobody shall take it for a good one
            (out / MANIFEST_FILE).unlink(missing_ok=True)
            raise
    return description


def _write(writer: CandidateWriter, reader: CandidateReader, shard: int) -> None:
    drops_logits = writer.description.logits == "none"
    with writer.shard(shard) as written:
        for number in writer.description.documents(shard):
            document = reader[number]
            if drops_logits:
                document = dataclasses.replace(document, logits=None)
            written.add(number, document)


def require_equal(reader: CandidateReader, copy: CandidateReader, *, workers: int = 1) -> None:
    """Raise StoreError unless ``copy`` reads as ``reader`` does, apart from how logits round."""
    description = reader.description
    compare, shards = partial(_compare, reader, copy), range(description.num_shards)
    with Progress("compare", len(reader), "documents") as progress:
        for shard, _ in each_shard(compare, shards, workers=workers):
            progress.advance(len(description.documents(shard)))


def _compare(reader: CandidateReader, copy: CandidateReader, shard: int) -> None:
    documents = reader.description.documents(shard)
    for first in range(documents.start, documents.stop, DOCUMENTS_AT_ONCE):
        some = range(first, min(first + DOCUMENTS_AT_ONCE, documents.stop))
        with located(f"{copy.directory}, documents {some.start} to {some.stop - 1}"):
            _require_equal(reader.read(some), copy.read(some), copy.description.logits)


def _require_equal(one: CandidateBatch, other: CandidateBatch, kind: str) -> None:
    for field in dataclasses.fields(CandidateBatch):
        expected, found = getattr(one, field.name), getattr(other, field.name)
        if field.name == "logits":
            if found is None or expected is None:
                continue
            expected = decode_logits(encode_logits(expected, kind), kind)
        require(np.array_equal(expected, found), f"{field.name} differ from the original")
