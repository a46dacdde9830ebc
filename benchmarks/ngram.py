"""A trigram model over token ids: a stand-in for a base model's distribution, quick on any machine.

p(. | a, b, document) = mix of the counts after (a, b), the counts after b, and of unigram and
document: each level keeps n / (n + distinct) of the mass, n the counts it has (Witten and Bell).

V ids, n positions at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

#: Weight of the document so far beside the unigram.
CACHE = 0.25
#: Added to every id's count, so that none is impossible.
PRIOR = 0.1


@dataclass(frozen=True, eq=False)
class Successors:
    """Ids seen after each context, and how often: ``keys`` = context * V + id, ascending."""

    keys: Ids
    counts: Ids
    vocab_size: int

    @classmethod
    def count(cls, contexts: Ids, ids: Ids, vocab_size: int) -> Successors:
        keys, counts = np.unique(contexts * vocab_size + ids, return_counts=True)
        return cls(keys, counts, vocab_size)

    def after(self, context: int) -> tuple[Ids, npt.NDArray[np.float64]]:
        """Ids and counts; empty if the context was never seen."""
        first = context * self.vocab_size
        span = slice(*np.searchsorted(self.keys, [first, first + self.vocab_size]))
        return self.keys[span] - first, self.counts[span].astype(np.float64)

    def place(self, contexts: Ids, ids: Ids) -> Ids:
        """Where each pair is in the table; -1 if it was never seen."""
        wanted = contexts * self.vocab_size + ids
        place = np.searchsorted(self.keys, wanted).clip(max=len(self.keys) - 1)
        return np.where(self.keys[place] == wanted, place, -1)


class Trigrams:
    """Counts of documents, and what they predict of another one."""

    def __init__(self, documents: Sequence[Ids], vocab_size: int) -> None:
        tokens = np.concatenate(documents)
        ends = np.cumsum([len(document) for document in documents])
        within = np.ones(len(tokens), bool)
        within[ends[:-1]] = False  # the first of a document follows nothing
        a, b = tokens[:-1][within[1:]], tokens[1:][within[1:]]
        counts = np.bincount(tokens, minlength=vocab_size) + PRIOR
        self._unigram_V = counts / counts.sum()
        self._bigrams = Successors.count(a, b, vocab_size)
        twice = within[1:-1] & within[2:]
        pairs = self._bigrams.place(tokens[:-2][twice], tokens[1:-1][twice])
        self._trigrams = Successors.count(pairs, tokens[2:][twice], vocab_size)

    def logits(self, document: Ids, rows: int) -> Iterator[npt.NDArray[np.float32]]:
        """log p of what follows each token but the last, ``rows`` positions at a time: [n, V]."""
        V = len(self._unigram_V)
        pairs = np.concatenate([[-1], self._bigrams.place(document[:-1], document[1:])])
        for first in range(0, len(document) - 1, rows):
            positions = range(first, min(first + rows, len(document) - 1))
            p_nV = np.empty((len(positions), V))
            for p_V, t in zip(p_nV, positions, strict=True):
                cache = np.bincount(document[: t + 1], minlength=V)
                p_V[:] = (1 - CACHE) * self._unigram_V + CACHE / (t + 1) * cache
                _mix(p_V, *self._bigrams.after(int(document[t])))
                if pairs[t] >= 0:
                    _mix(p_V, *self._trigrams.after(int(pairs[t])))
            yield np.log(p_nV, out=p_nV).astype(np.float32)


def _mix(p_V: npt.NDArray[np.float64], ids: Ids, counts: npt.NDArray[np.float64]) -> None:
    """Give what is known of a longer context its share."""
    if len(ids):
        total = counts.sum()
        p_V *= len(ids) / (total + len(ids))
        p_V[ids] += counts / (total + len(ids))
