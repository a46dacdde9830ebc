"""Hostile stores: python -m tests.store.fuzz [--minutes 10] [--seed 0]

Starts from small stores of every kind, damages a file in one to four places, mostly makes the
checksums fit again, and reads all of it. What may come of it: the right documents, other documents
that obey every rule, or a StoreError. Never another exception, a crash, a hang, or an allocation
beyond ``BYTES_PER_BYTE`` times the store's size and a fixed ``SPARE``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import signal
import struct
import tempfile
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np

from megatron_replay.errors import StoreError
from megatron_replay.store import CandidateReader, CandidateWriter
from megatron_replay.store.document import require_valid
from megatron_replay.store.reader import DOCUMENTS_AT_ONCE
from tests.store.examples import describe, document_of, require_sound

#: The most that reading may allocate per byte of the store: an id of two bytes becomes four, and is
#: held by the batch, by single documents and by what checks them.
BYTES_PER_BYTE = 64
#: Beside that: file buffers, the interpreter's own.
SPARE = 4 << 20
#: Of CPU time: no store of a few kilobytes takes longer to read, by far.
SECONDS = 10
INDEX_HEADER_BYTES = 44

Files = dict[str, bytes]


def seeds() -> list[Files]:
    """Small stores of every width of ids and kind of logits, as their files."""
    found = []
    for logits, vocab_size in [
        ("none", 151_936),
        ("fp16", 70_000),
        ("bf16", 300),
        ("bf16", 1 << 24),
    ]:
        description = describe(logits=logits, vocab_size=vocab_size, num_documents=7)
        with tempfile.TemporaryDirectory() as directory:
            writer = CandidateWriter(directory, description)
            for shard in writer.missing_shards():
                with writer.shard(shard) as out:
                    for document in description.documents(shard):
                        out.add(document, document_of(description, document))
            writer.finish()
            root = Path(directory)
            paths = [path for path in sorted(root.rglob("*")) if path.is_file()]
            found.append({str(path.relative_to(root)): path.read_bytes() for path in paths})
    return found


def damaged(draw: random.Random, files: Files) -> Files:
    """``files`` with one of them damaged, its checksums right more often than not."""
    files = dict(files)
    name = draw.choice(sorted(files))
    content = bytearray(files[name])
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        _damage(draw, content)
    files[name] = bytes(content)
    if draw.random() < 0.85:
        sign(files)
    return files


def _damage(draw: random.Random, content: bytearray) -> None:
    at = draw.randint(0, len(content))
    kind = draw.choice([0, 0, 0, 1, 1, 1, 2, 3, 4, 5])
    if kind == 0 and at < len(content):
        content[at] ^= 1 << draw.randrange(8)
    elif kind == 1:  # a number of the kind that breaks programs
        number = draw.choice([0, 1, 2, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**63])
        some = struct.pack("<Q", number)[: draw.choice([1, 2, 4, 8])]
        content[at : at + len(some)] = some
    elif kind == 2:
        del content[at : at + draw.randint(1, 16)]
    elif kind == 3:
        content[at:at] = draw.randbytes(draw.randint(1, 16))
    elif kind == 4:  # a piece of itself, elsewhere
        start = draw.randint(0, len(content))
        content[at : at + 8] = content[start : start + draw.randint(1, 64)]
    else:
        content[at:at] = bytes([draw.choice([0, 255])]) * draw.choice([1, 100, 5000])


def sign(files: Files) -> None:
    """Make every checksum and the manifest fit what the files hold, as far as they can be read."""
    rows = []
    for name in sorted(name for name in files if name.endswith(".bin")):
        records, index = files[name], bytearray(files[name.replace(".bin", ".idx")])
        count = (len(index) - INDEX_HEADER_BYTES - 12) // 16
        if count >= 0 and len(index) >= INDEX_HEADER_BYTES + 4:
            struct.pack_into("<I", index, INDEX_HEADER_BYTES - 4, zlib.crc32(records))
            if count:
                struct.pack_into("<Q", index, 32, len(records))
                struct.pack_into("<Q", index, INDEX_HEADER_BYTES + 8 * count, len(records))
            offsets = struct.unpack_from(f"<{count + 1}q", index, INDEX_HEADER_BYTES)
            for i, (start, stop) in enumerate(itertools.pairwise(offsets)):
                crc = zlib.crc32(records[max(start, 0) : max(stop, 0)])
                struct.pack_into("<I", index, INDEX_HEADER_BYTES + 8 * (count + 1) + 4 * i, crc)
            struct.pack_into("<I", index, len(index) - 4, zlib.crc32(index[:-4]))
            files[name.replace(".bin", ".idx")] = bytes(index)
        rows.append([len(records), zlib.crc32(records), zlib.crc32(bytes(index[:-4]))])
    try:
        manifest = json.loads(files["manifest.json"])
        manifest["shards"] = rows
        files["manifest.json"] = json.dumps(manifest).encode()
    except (ValueError, TypeError, KeyError, RecursionError):
        pass  # the manifest itself is the damaged file


def read_everything(directory: Path) -> bool:
    """Whether the store can be read to its end; every document then obeys the rules."""
    try:
        reader = CandidateReader(directory)
        about = reader.description
        for first in range(0, len(reader), DOCUMENTS_AT_ONCE):
            documents = range(first, min(first + DOCUMENTS_AT_ONCE, len(reader)))
            batch = reader.read(documents)
            together = 0
            for document_id in documents:  # by the definition, too
                document = reader[document_id]
                require_valid(document, vocab_size=about.vocab_size, logits=about.logits)
                together += len(document.ids)
            assert len(batch.ids) == together
            assert batch.offsets[-1] == len(batch.ids)
        require_sound(reader)
    except StoreError:
        return False
    return True


def attack(files: Files, directory: Path) -> bool:
    """Read ``files`` laid out in ``directory`` within the limits; whether it could be read."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    limit = BYTES_PER_BYTE * sum(map(len, files.values())) + SPARE
    for _ in range(3):  # what another thread allocates meanwhile counts, too
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        tracemalloc.start()
        try:
            readable = read_everything(directory)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if peak <= limit:
            break
    assert peak <= limit, f"{peak} bytes were allocated, {limit} are allowed"
    return readable


def main() -> None:
    """Attack for a while; on a finding, keep the store and say where."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    stores, end = seeds(), time.monotonic() + 60 * options.minutes
    tried = readable = most = 0
    for case in itertools.count():
        if time.monotonic() > end:
            break
        draw = random.Random(f"{options.seed} {case}")
        files = damaged(draw, draw.choice(stores))
        with tempfile.TemporaryDirectory() as directory:
            try:
                readable += attack(files, Path(directory))
            except BaseException:
                print(f"seed {options.seed}, case {case}", flush=True)
                raise
        tried, most = tried + 1, max(most, sum(map(len, files.values())))
    print(
        f"{tried:,} damaged stores (the largest {most:,} bytes) in {options.minutes:g} minutes, "
        f"seed {options.seed}: {readable:,} readable, {tried - readable:,} refused, no finding"
    )


if __name__ == "__main__":
    np.seterr(all="raise")
    main()
