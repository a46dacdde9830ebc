"""The store beside plainer ways to keep the same ids: python -m benchmarks.store

Documents of benchmarks.real_sets, copied until they do not fit the cache; one thread. Reading is of
documents drawn anew in each round, files in the page cache, into the CSR that the head wants: M ids
a second, the median of the rounds and the best. "first touch": a reader just opened, which reads
index and crc32 of what it is asked for; all others have checked those before, and check every rule
of the format on every read.

"copied": raw int32 ids of the same documents, memory-mapped, concatenated: memory's speed. zlib and
npz keep int32 ids, a document each.

Bytes are those of all files over the positions. "mean 100": of the positions at the cap, a part is
left out, drawn evenly, until |S| has that mean.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.real_sets import DIRECTORY, SELECTION, TOKENS, VOCAB_SIZE, real_sets
from benchmarks.timing import Times, interleave, machine
from megatron_replay.data.corpus import Document
from megatron_replay.data.packing import PackedBatch, pack_batch
from megatron_replay.data.replay import join_candidates
from megatron_replay.functional.shard_head import ShardSets
from megatron_replay.kernels import HEAD
from megatron_replay.store import (
    CandidateReader,
    CandidateWriter,
    DocumentCandidates,
    StoreDescription,
    batch,
)

CPU = torch.device("cpu")
COPIES, DOCUMENTS_PER_SHARD = 8, 32
MEAN, CAP = 100.0, SELECTION["max_candidates"]
#: Of a micro-batch: 4,096 positions.
PACK_DOCUMENTS = 8
Documents = Sequence[DocumentCandidates]
Work = dict[str, Callable[[], object]]


def write(
    directory: Path, documents: Documents, *, codec: str = "planar", logits: str = "none"
) -> Path:
    """A store of ``documents``; with logits where they have them."""
    description = StoreDescription(
        vocab_size=VOCAB_SIZE,
        num_documents=len(documents),
        documents_per_shard=DOCUMENTS_PER_SHARD,
        codec=codec,
        logits=logits,
        corpus_fingerprint="c" * 64,
        tokenizer_fingerprint="t" * 64,
        checkpoint_fingerprint="w" * 64,
        selection={},
    )
    with CandidateWriter(directory, description) as writer:
        for number in writer.missing_shards():
            with writer.shard(number) as shard:
                for document_id in description.documents(number):
                    shard.add(document_id, documents[document_id])
        writer.finish()
    return directory


def with_logits(document: DocumentCandidates) -> DocumentCandidates:
    """With numbers where the logits go, whose size does not depend on them."""
    drawn = np.random.default_rng(0).normal(10, 4, len(document.ids)).astype(np.float32)
    return dataclasses.replace(document, logits=drawn)


def with_mean(documents: Documents, mean: float) -> list[DocumentCandidates]:
    """``documents`` without as many of the positions at the cap as it takes."""
    sizes = np.concatenate([np.diff(document.offsets) for document in documents])
    capped = sizes >= CAP
    excess = (sizes - mean).astype(float)
    share = -excess[~capped].sum() / excess[capped].sum()
    rng = np.random.default_rng(0)
    return [_kept(document, share, rng) for document in documents]


def _kept(
    document: DocumentCandidates, share: float, rng: np.random.Generator
) -> DocumentCandidates:
    sizes = np.diff(document.offsets)
    kept = (sizes < CAP) | (rng.random(len(sizes)) < share)
    return DocumentCandidates(
        positions=document.positions[kept],
        offsets=np.concatenate([[0], np.cumsum(sizes[kept])]),
        ids=document.ids[np.repeat(kept, sizes)],
        lse=document.lse[kept],
        gold_logprob=document.gold_logprob[kept],
        tail_mass=document.tail_mass[kept],
        logits=None,
    )


def bytes_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def print_bytes(folder: Path, documents: Documents) -> None:
    print(f"\nbytes a position\n{'':29}{'mean |S|':>9}{'planar':>9}{'archive':>9}")
    for some, name in ((with_mean(documents, MEAN), "mean 100"), (documents, "all positions")):
        positions = sum(len(document.positions) for document in some)
        mean = sum(len(document.ids) for document in some) / positions
        for logits in ("none", "fp16"):
            content = some if logits == "none" else [with_logits(document) for document in some]
            found = [
                bytes_of(write(folder / f"{name}-{codec}-{logits}", content, codec=codec,
                               logits=logits)) / positions
                for codec in ("planar", "archive")
            ]  # fmt: skip
            title = name + (", with fp16 logits" if logits == "fp16" else "")
            print(f"{title:32}{mean:6.1f}{found[0]:9.1f}{found[1]:9.1f}", flush=True)


HEADING = f"{'':42}{'M ids/s':>9}{'best':>9}{'of copied':>11}"


def print_rates(title: str, work: Work, num_ids: int, rounds: int, beside: str = "") -> None:
    times = interleave(work, rounds=rounds, each=num_ids, device=CPU)
    print(f"\n{title}\n{HEADING if beside else HEADING[:60]}")
    for name, each in times.items():
        line = f"{name:42}{1e3 / each.median:9.1f}{1e3 / each.least:9.1f}"
        print(line + (f"{100 * ratio(times[beside], each):9.1f} %" if beside else ""), flush=True)


def ratio(of: Times, to: Times) -> float:
    return of.median / to.median


def plain_files(folder: Path, documents: Documents) -> Callable[[int], npt.NDArray[np.int32]]:
    """Raw ids in one file, memory-mapped."""
    np.concatenate([document.ids for document in documents]).tofile(folder / "raw")
    starts = np.cumsum([0, *(len(document.ids) for document in documents)])
    raw = np.memmap(folder / "raw", np.int32, "r")
    return lambda d: raw[starts[d] : starts[d + 1]]


def archived(ids: npt.NDArray[np.int32]) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, ids=ids)
    return file.getvalue()


def reading(folder: Path, documents: Documents, count: int) -> Work:
    """Ways to read ``count`` documents, drawn anew each time."""
    rng = np.random.default_rng(0)
    stores = {
        codec: write(folder / codec, documents, codec=codec) for codec in ("planar", "archive")
    }
    readers = {codec: CandidateReader(path) for codec, path in stores.items()}
    raw = plain_files(folder, documents)
    deflated = [zlib.compress(document.ids) for document in documents[: len(documents) // COPIES]]
    npz = [archived(document.ids) for document in documents[: len(documents) // COPIES]]
    for reader in readers.values():
        reader.read(range(len(reader)))

    def drawn() -> list[int]:
        return rng.choice(len(documents), count, replace=False).tolist()

    def numpy_form() -> object:
        with mock.patch.object(batch, "decode_records", None):
            return readers["planar"].read(drawn())

    return {
        "copied": lambda: np.concatenate([raw(d) for d in drawn()]),
        "planar": lambda: readers["planar"].read(drawn()),
        "planar, first touch": lambda: CandidateReader(stores["planar"]).read(drawn()),
        "planar, numpy form": numpy_form,
        "archive": lambda: readers["archive"].read(drawn()),
        "zlib": lambda: np.concatenate(
            [np.frombuffer(zlib.decompress(deflated[d % len(deflated)]), np.int32) for d in drawn()]
        ),
        "npz": lambda: np.concatenate(
            [np.load(io.BytesIO(npz[d % len(npz)]))["ids"] for d in drawn()]
        ),
    }  # fmt: skip


class Texts(list[Document]):
    """The documents' tokens as a corpus."""

    pad_id = 0


def micro_batches(num_documents: int) -> list[PackedBatch]:
    """Documents in turn, every label with loss."""
    with np.load(DIRECTORY / TOKENS) as saved:
        tokens = [saved[name].astype(np.int32) for name in sorted(saved.files)]
    texts = Texts(Document(ids, np.ones(len(ids), np.bool_)) for ids in tokens)
    lengths = np.array([len(text) for text in texts], np.int32)
    packs = [np.arange(d, d + PACK_DOCUMENTS) for d in range(0, num_documents, PACK_DOCUMENTS)]
    return [pack_batch(texts, [pack], int(lengths[pack].sum()), lengths) for pack in packs]


def print_micro_batch(store: Path, num_documents: int, rounds: int) -> None:
    """What the loader does of one, and what the head's backward wants beside."""
    reader = CandidateReader(store)
    batch = micro_batches(num_documents)[0]
    documents = list(range(PACK_DOCUMENTS))
    targets = join_candidates(batch, reader, scope="position")

    def sets() -> ShardSets:
        ids, offsets = targets.candidate_ids, targets.candidate_offsets
        return ShardSets(ids, offsets, None, targets.labels_N, VOCAB_SIZE)

    form = HEAD.choose("auto", torch.empty(0))

    work: Work = {
        "reader.read": lambda: reader.read(documents),
        "join_candidates, position": lambda: join_candidates(batch, reader, scope="position"),
        "join_candidates, document": lambda: join_candidates(batch, reader, scope="document"),
        "CSR to CSC, torch (ShardSets.by_id)": lambda: sets().by_id,
        f"CSR to CSC, {HEAD.describe('auto', torch.empty(0))}": lambda: form(sets()),
    }
    times = interleave(work, rounds=rounds, each=1, device=CPU)
    num_ids = len(targets.candidate_ids)
    print(
        f"\na micro-batch of {PACK_DOCUMENTS} documents, {len(targets.rows_N):,} positions, "
        f"{num_ids:,} ids; read included\n{'':42}{'ms':>9}{'least':>9}{'M ids/s':>9}"
    )
    for name, each in times.items():
        rate = 1e3 * num_ids / each.median
        print(f"{name:42}{each.median / 1e6:9.3f}{each.least / 1e6:9.3f}{rate:9.1f}", flush=True)


def print_writing(folder: Path, documents: Documents, rounds: int) -> None:
    """Encoding, checks, crc32 and fsync of every shard."""
    num_ids = sum(len(document.ids) for document in documents)

    def fresh(codec: str) -> object:
        with tempfile.TemporaryDirectory(dir=folder) as directory:
            return write(Path(directory) / "store", documents, codec=codec)

    work: Work = {codec: lambda codec=codec: fresh(codec) for codec in ("planar", "archive")}
    print_rates(f"writing {num_ids:,} ids", work, num_ids, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--documents", type=int, nargs="+", default=[16, 64])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine(CPU)}; numpy {np.__version__}, {time.strftime('%Y-%m-%d')}")
    print(real_sets().describe())
    documents = list(CandidateReader(DIRECTORY))
    many = documents * COPIES
    with tempfile.TemporaryDirectory(dir=DIRECTORY.parent) as directory:
        folder = Path(directory)
        print_bytes(folder, documents)
        mean = sum(len(document.ids) for document in many) / len(many)
        for count in options.documents:
            some = folder / str(count)
            some.mkdir()
            title = f"reading {count} of {len(many)} documents, {mean:,.0f} ids each on average"
            work = reading(some, many, count)
            print_rates(title, work, round(mean * count), options.rounds, "copied")
        print_micro_batch(folder / str(count) / "planar", len(documents), options.rounds)
        print_writing(folder, documents, max(3, options.rounds // 5))


if __name__ == "__main__":
    main()
