"""A real Stage 0 store at Qwen3's vocabulary, for the benchmarks: python -m benchmarks.real_sets

Text and tokenizer are those of ``benchmarks.corpus``, the distribution that of
``benchmarks.ngram``, learned from all documents but those asked about; ``select_candidates`` and
``CandidateWriter`` do the rest, as in Stage 0. Made once, below runs/bench, from what is installed:
another installation has slightly other text, so the statistics are printed beside every result.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.corpus import KINDS, VOCAB_SIZE, Text, texts, tokens
from benchmarks.ngram import Ids, Trigrams
from megatron_replay.errors import StoreError
from megatron_replay.selection.candidates import select_candidates
from megatron_replay.store import (
    CandidateReader,
    CandidateWriter,
    DocumentCandidates,
    StoreDescription,
)

DIRECTORY = Path("runs/bench/real_sets")
TOKENS, LOGITS = "tokens.npz", "logits.npy"
#: Documents asked about, a third of each kind, each cut to so many tokens.
NUM_DOCUMENTS, DOCUMENT_TOKENS = 24, 512
SELECTION = {"coverage": 0.95, "max_candidates": 200}
#: Rows of logits kept for benchmarks.select, and positions handled at a time.
KEPT_ROWS, ROWS = 128, 32


@dataclass(frozen=True, eq=False)
class Sets:
    """Candidate sets of N positions, as ``restricted_cross_entropy`` takes them.

    ``starts``: where documents start, int64 [D + 1], 0 and N included.
    """

    ids: Tensor
    offsets: Tensor
    labels: Tensor
    starts: Tensor

    def first(self, count: int) -> Sets:
        """Those of the first ``count`` positions; the last document may be cut."""
        starts = self.starts[self.starts < count]
        return Sets(
            self.ids[: int(self.offsets[count])],
            self.offsets[: count + 1],
            self.labels[:count],
            torch.cat([starts, torch.tensor([count])]),
        )

    def to(self, device: torch.device) -> Sets:
        return Sets(*(getattr(self, field.name).to(device) for field in dataclasses.fields(self)))

    def by_document(self) -> Sets:
        """The union of each document's sets, one set a document (document scope)."""
        bounds = self.offsets[self.starts].tolist()
        unions = [self.ids[a:b].unique() for a, b in itertools.pairwise(bounds)]
        sizes = torch.tensor([0, *map(len, unions)])
        return Sets(torch.cat(unions), sizes.cumsum(0), self.labels, self.starts)

    def describe(self) -> str:
        sizes = self.offsets.diff().double()
        union = len(self.ids.unique())
        return (
            f"|S| mean {sizes.mean():.1f}, median {sizes.median():.0f}, "
            f"{100 * (sizes >= SELECTION['max_candidates']).double().mean():.1f} % at the cap; "
            f"{union:,} distinct ids in {len(self.ids):,} pairs (reuse {len(self.ids) / union:.1f})"
        )


def real_sets(directory: Path = DIRECTORY) -> Sets:
    """Read the store, made first where there is none of this kind."""
    try:
        reader = CandidateReader(directory)
        if reader.description.selection != SELECTION:
            raise StoreError("made with another selection", where=directory)
        reader.stops()  # its indexes are of this version
    except StoreError:
        make(directory)
        reader = CandidateReader(directory)
    documents = list(reader)
    with np.load(directory / TOKENS) as saved:
        labels = [saved[name][1:] for name in sorted(saved.files)]
    sizes = np.concatenate([np.diff(document.offsets) for document in documents])
    lengths = [0, *(len(document.positions) for document in documents)]
    return Sets(
        torch.from_numpy(np.concatenate([document.ids for document in documents])),
        torch.from_numpy(np.concatenate([[0], sizes]).cumsum()),
        torch.from_numpy(np.concatenate(labels)),
        torch.tensor(lengths).cumsum(0),
    )


def real_logits(directory: Path = DIRECTORY) -> Tensor:
    """The model's log-probabilities at positions spread over the documents: fp32 [128, V]."""
    if not (directory / LOGITS).exists():
        make(directory)
    return torch.from_numpy(np.load(directory / LOGITS))


def make(directory: Path = DIRECTORY) -> None:
    """Write tokens, logits and the store."""
    start = time.perf_counter()
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    asked, learned = _part(list(texts()))
    learned_tokens = tokens(learned)
    model = Trigrams(learned_tokens, VOCAB_SIZE)
    documents = [ids[:DOCUMENT_TOKENS] for ids in tokens(asked)]
    np.savez(directory / TOKENS, **{f"{d:04d}": ids for d, ids in enumerate(documents)})
    kept: list[npt.NDArray[np.float32]] = []
    writer = CandidateWriter(directory, _description(documents, learned))
    with writer.shard(0) as shard:
        for d, ids in enumerate(documents):
            chunks = []
            for logits_nV in model.logits(ids, ROWS):
                kept.append(logits_nV[0].copy())
                chunks.append(logits_nV)
            shard.add(d, _candidates(np.concatenate(chunks), ids))
    writer.finish()
    np.save(directory / LOGITS, np.stack(kept[:: len(kept) // KEPT_ROWS][:KEPT_ROWS]))
    print(
        f"{directory}: learned from {len(learned):,} documents, "
        f"{sum(map(len, learned_tokens)):,} tokens; "
        f"{time.perf_counter() - start:.0f} s"
    )


def _part(documents: list[Text]) -> tuple[list[Text], list[Text]]:
    """Those asked about, kinds in turn; and the others, without another kind of the same file."""
    by_kind = [
        sorted((text for text in documents if text.kind == kind), key=lambda text: text.draw)
        for kind in KINDS
    ]
    each = NUM_DOCUMENTS // len(KINDS)
    asked = [text for group in zip(*by_kind, strict=False) for text in group][: each * len(KINDS)]
    names = {text.name for text in asked}
    return asked, [text for text in documents if text.name not in names]


def _candidates(logits_TV: npt.NDArray[np.float32], document: Ids) -> DocumentCandidates:
    labels_T = torch.from_numpy(document[1:])
    sets = select_candidates(torch.from_numpy(logits_TV), labels_T, **SELECTION)
    return DocumentCandidates(
        positions=np.arange(len(labels_T), dtype=np.int32),
        offsets=sets.offsets.numpy(),
        ids=sets.ids.numpy(),
        lse=sets.lse_T.numpy(),
        gold_logprob=sets.gold_logprob_T.numpy(),
        tail_mass=sets.tail_mass_T.numpy(),
        logits=None,
    )


def _description(documents: list[Ids], learned: list[Text]) -> StoreDescription:
    """What decides the store: the documents, and the text that the model has seen."""
    model = hashlib.sha256()
    for text in learned:
        model.update(text.content.encode())
    return StoreDescription(
        vocab_size=VOCAB_SIZE,
        num_documents=len(documents),
        documents_per_shard=len(documents),
        codec="planar",
        logits="none",
        corpus_fingerprint=hashlib.sha256(np.concatenate(documents).tobytes()).hexdigest(),
        tokenizer_fingerprint="qwen.tiktoken",
        checkpoint_fingerprint=model.hexdigest(),
        selection=SELECTION,
    )


if __name__ == "__main__":
    make()
    print(real_sets().describe())
