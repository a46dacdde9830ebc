"""Documents as a forest: positions that several have in common are computed once.

A transformer's state at a position depends on the tokens up to it alone, so documents that begin
with the same tokens have the same states there. In lexicographic order, what a document has in
common with all before it, it has in common with the one before it. So the order and one number per
document describe the whole forest, with any number of levels (system prompt, schema, question).

A position whose label carries loss is never shared: its label may differ between documents. So a
document's first ``first label - 1`` positions can be shared.

Shape suffix: D documents.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_replay.data.corpus import Corpus

Ints = npt.NDArray[np.int64]

#: A document shares nothing where it has less than this part of its positions in common with the
#: one before: attention behind a prefix costs more than in a document alone (a chat template's
#: first tokens, before 1,024 positions, made attention 1.3 times slower on a CPU).
LEAST_SHARE = 1 / 16


@dataclass(frozen=True, eq=False)
class Forest:
    """Documents in an order in which each may begin with positions of the one before.

    Attributes:
        document_D: ids.
        positions_D: how many positions each document has.
        shared_D: how many of them, from the first, are those of the document before; 0 for the
            first document.
    """

    document_D: Ints
    positions_D: Ints
    shared_D: Ints

    def __len__(self) -> int:
        return len(self.document_D)

    @property
    def own_D(self) -> Ints:
        """How many positions of each document are computed."""
        return self.positions_D - self.shared_D

    @property
    def positions(self) -> int:
        """Positions of all documents."""
        return int(self.positions_D.sum())

    @property
    def computed(self) -> int:
        """Positions that are computed."""
        return int(self.own_D.sum())

    def stretch(self, first: int, stop: int) -> Forest:
        """The documents ``first`` to ``stop`` as a forest of their own."""
        shared_D = self.shared_D[first:stop].copy()
        shared_D[:1] = 0
        return Forest(self.document_D[first:stop], self.positions_D[first:stop], shared_D)

    def cut(self, capacity: int) -> list[Forest]:
        """Consecutive stretches of at most ``capacity`` computed positions, each as long as it can
        be. A tree that is cut repeats its prefix in the next stretch.

        Of all ways to cut into consecutive stretches none has fewer.
        """
        bounds = self._bounds(capacity)
        return [self.stretch(*pair) for pair in itertools.pairwise(bounds)]

    def balanced_cut(self, capacity: int, multiple: int) -> list[Forest]:
        """As few stretches as ``cut`` gives, rounded up to a ``multiple``, the largest of them as
        small as can be; empty ones at the end where there are too few documents.
        """
        count = -(-max(1, len(self._bounds(capacity)) - 1) // multiple) * multiple
        low, high = int(self.positions_D.max(initial=1)), capacity
        while low < high:
            limit = (low + high) // 2
            if len(self._bounds(limit)) - 1 <= count:
                high = limit
            else:
                low = limit + 1
        stretches = self.cut(low)
        return stretches + [self.stretch(0, 0)] * (count - len(stretches))

    def _bounds(self, capacity: int) -> list[int]:
        """Where stretches of at most ``capacity`` computed positions begin, and where all end."""
        assert self.positions_D.max(initial=0) <= capacity, "fit_documents comes first"
        computed = np.append(0, np.cumsum(self.own_D))
        bounds = [0]
        while bounds[-1] < len(self):
            first = bounds[-1]
            limit = capacity - self.shared_D[first] + computed[first]
            bounds.append(int(np.searchsorted(computed, limit, side="right")) - 1)
        return bounds


def plant(corpus: Corpus, documents: Ints, lengths: npt.NDArray[np.int32]) -> Forest:
    """The forest of ``documents``: sorted by what can be shared of each, equal ones by id.

    Args:
        documents: ids; one may occur more than once.
        lengths: int32 [D of the corpus], tokens used of each document; those of 0 are left out.
    """
    keyed = []
    for document in documents[lengths[documents] > 0].tolist():
        size = min(int(corpus.first_labels[document]), int(lengths[document])) - 1
        # Big-endian, so that the order of the bytes is that of the numbers.
        key = corpus[document].tokens[: max(0, size)].astype(">u4").tobytes()
        keyed.append((key, document))
    keyed.sort()
    document_D = np.array([document for _, document in keyed], np.int64)
    positions_D = lengths[document_D].astype(np.int64) - 1
    shared_D = np.zeros(len(keyed), np.int64)
    for d, ((one, _), (two, _)) in enumerate(itertools.pairwise(keyed), start=1):
        shared_D[d] = _common(one, two)
    shared_D[shared_D < LEAST_SHARE * positions_D] = 0
    return Forest(document_D, positions_D, shared_D)


def stems(corpus: Corpus, lengths: npt.NDArray[np.int32]) -> Ints:
    """int64 [D of the corpus]: documents of one number have a prefix in common.

    In lexicographic order a document belongs to the one before if they have in common at least half
    of its positions before the first label. Positions that all documents have in common (a system
    prompt) do not count. Documents of no length have numbers of their own.
    """
    forest = plant(corpus, np.arange(len(lengths)), lengths)
    stem_D = np.arange(len(lengths)) + len(forest) + 1
    shareable_D = np.minimum(corpus.first_labels[forest.document_D] - 1, forest.positions_D)
    everywhere = int(forest.shared_D[1:].min()) if len(forest) > 1 else 0
    begins_D = 2 * (forest.shared_D - everywhere) < shareable_D - everywhere
    stem_D[forest.document_D] = np.cumsum(begins_D)
    return stem_D


def without_sharing(documents: Ints, lengths: npt.NDArray[np.int32]) -> Forest:
    """``documents`` in their order, each computed as a whole."""
    document_D = documents[lengths[documents] > 0].astype(np.int64)
    positions_D = lengths[document_D].astype(np.int64) - 1
    return Forest(document_D, positions_D, np.zeros_like(positions_D))


def _common(one: bytes, two: bytes) -> int:
    """How many tokens two keys begin with in common."""
    size = min(len(one), len(two)) // 4
    differs = np.frombuffer(one, np.uint32, size) != np.frombuffer(two, np.uint32, size)
    return int(differs.argmax()) if differs.any() else size
