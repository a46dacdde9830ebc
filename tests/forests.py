"""Random documents that begin alike, in place of a corpus on disk."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from megatron_replay.data.corpus import Document

Tokens = tuple[int, ...]

#: Few different tokens, so that documents begin alike; some above a byte.
TOKENS = st.sampled_from([0, 1, 255, 256, 511])


class Documents:
    """What packing reads of a corpus. Every label from ``first_labels`` on carries loss."""

    pad_id = 0

    def __init__(self, documents: list[tuple[Tokens, int]]) -> None:
        self._tokens = [np.array(tokens, np.int32) for tokens, _ in documents]
        self.first_labels = np.array([label for _, label in documents], np.int32)
        self.lengths = np.array([len(tokens) for tokens, _ in documents], np.int32)

    def __getitem__(self, document: int) -> Document:
        tokens = self._tokens[document]
        return Document(tokens, np.arange(len(tokens)) >= self.first_labels[document])

    @property
    def numbers(self) -> npt.NDArray[np.int64]:
        return np.arange(len(self.lengths))


@st.composite
def documents(draw: st.DrawFn) -> Any:
    """Up to 12 documents on up to 3 stems: equal ones, prefixes of others, nothing in common."""
    stems = draw(st.lists(st.lists(TOKENS, max_size=6).map(tuple), min_size=1, max_size=3))
    stems += [stem + stem[::-1] for stem in stems]  # a level below
    made: list[tuple[Tokens, int]] = []
    for _ in range(draw(st.integers(1, 12))):
        rest = draw(st.lists(TOKENS, min_size=2, max_size=5).map(tuple))
        tokens = draw(st.sampled_from(stems)) + rest
        made.append((tokens, draw(st.integers(1, len(tokens)))))
    return Documents(made)
