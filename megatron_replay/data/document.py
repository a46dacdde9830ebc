"""A document: its tokens, and which of them carry loss as a label."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Document:
    """One sequence of tokens that is packed, scored and recorded as a unit.

    The label convention of the whole project: *position* ``t`` is the input position whose logits
    predict token ``t + 1``. A document of n tokens therefore has n - 1 positions.

    Attributes:
        tokens: int32 [n].
        loss_mask: bool [n]; ``loss_mask[i]`` says whether token i carries loss as a label.
            ``loss_mask[0]`` has no effect, because nothing predicts the first token.
    """

    tokens: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self.tokens)

    def eligible_positions(self) -> npt.NDArray[np.int32]:
        """Positions whose label carries loss: ``{t : loss_mask[t + 1]}``, int32, ascending."""
        return np.flatnonzero(self.loss_mask[1:]).astype(np.int32)

    def split(self, max_tokens: int) -> list[Document]:
        """Cut into pieces of at most ``max_tokens`` tokens that keep every label exactly once.

        A piece starts with the last token of the piece before: there it was a label, here it is
        the input that predicts the next one, and its own loss is not counted again.
        """
        if len(self) <= max_tokens:
            return [self]
        pieces = []
        for start in range(0, len(self) - 1, max_tokens - 1):
            stop = start + max_tokens
            loss_mask = self.loss_mask[start:stop].copy()
            loss_mask[0] &= start == 0
            pieces.append(Document(self.tokens[start:stop], loss_mask))
        return pieces
