"""Hostile stores: python -m tests.store.fuzz [--minutes 10] [--seed 0]

Starts from small stores of every kind, damages a file in one to four places, mostly makes the
checksums fit again, and reads all of it. What may come of it: the right documents, other documents
that obey every rule, or a StoreError. Never another exception, a crash, a hang, or an allocation
beyond ``BYTES_PER_BYTE`` times the store's size and a fixed ``SPARE``.
"""

from __future__ import annotations

import argparse
import itertools
import random
import signal
import struct
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np

from megatron_replay.errors import StoreError
from megatron_replay.store import CandidateReader
from megatron_replay.store.document import require_valid
from megatron_replay.store.reader import DOCUMENTS_AT_ONCE
from tests.store.examples import Files, contents, describe, require_sound, sign, write_store

#: The most that reading may allocate per byte of the store: an id of two bytes becomes four, and is
#: held by the batch, by single documents and by what checks them.
BYTES_PER_BYTE = 64
#: Beside that: file buffers, the interpreter's own.
SPARE = 4 << 20
#: Of CPU time: no store of a few kilobytes takes longer to read, by far.
SECONDS = 10


def seeds() -> list[Files]:
    """Small stores of every width of ids and kind of logits, as their files."""
    kinds = [("none", 151_936), ("fp16", 70_000), ("bf16", 300), ("bf16", 1 << 24)]
    found = []
    for logits, vocab_size in kinds:
        with tempfile.TemporaryDirectory() as directory:
            description = describe(logits=logits, vocab_size=vocab_size, num_documents=7)
            write_store(Path(directory), description)
            found.append(contents(Path(directory)))
    return found


def damaged(draw: random.Random, files: Files) -> Files:
    """``files`` with one of them damaged, its checksums right more often than not."""
    name = draw.choice(sorted(files))
    content = bytearray(files[name])
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        _damage(draw, content)
    files = files | {name: bytes(content)}
    return sign(files) if draw.random() < 0.85 else files


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


def read_everything(directory: Path) -> bool:
    """Whether the store can be read to its end; every document then obeys the rules."""
    try:
        reader = CandidateReader(directory)
        about = reader.description
        for first in range(0, len(reader), DOCUMENTS_AT_ONCE):
            batch = reader.read(range(first, min(first + DOCUMENTS_AT_ONCE, len(reader))))
            for document in batch.documents():
                require_valid(document, vocab_size=about.vocab_size, logits=about.logits)
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
            return readable
    raise AssertionError(f"{peak} bytes were allocated, {limit} are allowed")


def main() -> None:
    """Attack for a while; on a finding, keep the store and say where."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    stores, end = seeds(), time.monotonic() + 60 * options.minutes
    readable = 0
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
    print(
        f"{case:,} damaged stores in {options.minutes:g} minutes, seed {options.seed}: "
        f"{readable:,} readable, {case - readable:,} refused, no finding"
    )


if __name__ == "__main__":
    np.seterr(all="raise")
    main()
