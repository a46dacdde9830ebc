"""One store of parts of the same store, written by Stage 0 in several places."""

from __future__ import annotations

import filecmp
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path

from megatron_replay.errors import StoreError
from megatron_replay.files import atomic_file, make_directory, open_regular, require_apart
from megatron_replay.progress import Progress
from megatron_replay.store.document import located, require
from megatron_replay.store.format import NUM_POSITIONS, ShardIndex, encode_index, require_likely
from megatron_replay.store.manifest import (
    StoreDescription,
    bin_path,
    index_path,
    present_shards,
    read_description,
    read_index,
    refuse_differences,
)
from megatron_replay.store.writer import CandidateWriter

_BLOCK_BYTES = 1 << 22


def merge_parts(parts: Sequence[Path], out: Path, *, workers: int = 1) -> StoreDescription:
    """Copy the shards of one store that Stage 0 wrote in several places into ``out``.

    Parts may be unfinished. A shard that several parts have must be the same in all of them.

    Raises:
        ConfigError: ``out`` is one of ``parts``.
        StoreError: descriptions differ (each difference is named), a shard is damaged or not the
            same in two parts, or shards are missing in all: what is there has been merged then.
        OutputError: ``out`` cannot be written.
    """
    require_apart(out, [("IN", part) for part in parts], flag="OUT")
    description = read_description(parts[0])
    for part in parts[1:]:
        refuse_differences(
            description.flat(),
            read_description(part).flat(),
            where=part,
            fix="Only parts of one store can be merged",
        )
    with CandidateWriter(out, description, lock=True) as writer:
        there = set().union(*map(present_shards, (*parts, writer.directory)))
        shards = sorted(shard for shard in there if shard < description.num_shards)
        with (
            Progress("merge", len(shards), "shards") as progress,
            ThreadPoolExecutor(workers) as pool,
        ):
            for _ in pool.map(partial(_take, parts, writer), shards):
                progress.advance()
        missing = writer.missing_shards()
        if missing:
            raise StoreError(
                f"merged, but {len(missing)} of {description.num_shards} shards are in no part; "
                f"the first is {missing[0]}",
                where=out,
                fix="Merge the parts that have them too, or run Stage 0 with this --store",
            )
        writer.finish()
    return description


def _take(parts: Sequence[Path], writer: CandidateWriter, shard: int) -> None:
    """Check that a shard is the same in all that have it; copy it where ``writer`` lacks it."""
    out, description = writer.directory, writer.description
    first, *others = [part for part in (*parts, out) if index_path(part, shard).exists()]
    index, _ = read_index(first, description, shard)
    for other in others:
        read_index(other, description, shard)
        for path in (index_path, bin_path):
            require(
                filecmp.cmp(path(first, shard), path(other, shard), shallow=False),
                f"shard {shard} is not the same in two parts",
                f"the content of {path(first, shard)}",
                where=path(other, shard),
                fix="Delete that shard's .idx where it is damaged, and merge again",
            )
    if out not in (first, *others):
        _copy(bin_path(first, shard), index, out, shard)


def _copy(source: Path, index: ShardIndex, out: Path, shard: int) -> None:
    """Publish a shard as ``CandidateWriter`` does: ``.bin``, its crc32 checked, then ``.idx``."""
    make_directory(bin_path(out, shard).parent)
    with open_regular(source, StoreError) as content, located(source):
        # A record that cannot be as large as it claims may be a hole of a terabyte.
        for start, stop in pairwise(index.offsets.tolist()):
            content.seek(start)
            require_likely(content.read(NUM_POSITIONS.size), stop - start)
        content.seek(0)
        with atomic_file(bin_path(out, shard)) as handle:
            crc = 0
            while block := content.read(_BLOCK_BYTES):
                crc = zlib.crc32(block, crc)
                handle.write(block)
            require(crc == index.bin_crc, "damaged: crc32 differs")
    with atomic_file(index_path(out, shard)) as handle:
        handle.write(encode_index(index))
