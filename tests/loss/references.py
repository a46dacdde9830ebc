"""Independent float64 references, and random cases to try them on.

Shapes: T positions, V vocabulary, H hidden channels, G candidate sets.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from megatron_replay.loss.candidate_sets import CandidateSets
from megatron_replay.loss.definition import restricted_cross_entropy_dense

#: A cut may differ from real arithmetic's only this close to the coverage (see candidates.py).
CUT_MARGIN = 2.0**-19


def first_tokens(logits_V: np.ndarray) -> np.ndarray:
    """All ids by (logit descending, id ascending)."""
    return np.lexsort((np.arange(len(logits_V)), -logits_V))


def probabilities(logits_V: np.ndarray) -> np.ndarray:
    masses = np.exp(logits_V - logits_V.max())
    return masses / masses.sum()


@dataclass
class HeadCase:
    """Random operands of a head, and candidate sets that hold the labels."""

    hidden_TH: Tensor
    weight_VH: Tensor
    labels_T: Tensor
    upstream_T: Tensor
    mask_GV: Tensor
    group_offsets: Tensor | None

    @property
    def ids(self) -> Tensor:
        return self.mask_GV.nonzero()[:, 1].int()

    @property
    def offsets(self) -> Tensor:
        return torch.nn.functional.pad(self.mask_GV.sum(1).cumsum(0), (1, 0))

    @property
    def mask_TV(self) -> Tensor:
        if self.group_offsets is None:
            return self.mask_GV
        return self.mask_GV.repeat_interleave(self.group_offsets.diff(), 0)

    @property
    def terms(self) -> tuple[float, float]:
        """Size of the terms p·w and y·w whose difference is a gradient: hidden's and weight's.

        A confident position's gradient is their small difference, and keeps their rounding: in
        fp32 the error is to be measured against them.
        """
        upstream = float(self.upstream_T.abs().max())
        return (
            upstream * float(self.weight_VH.abs().max()),
            upstream * float(self.hidden_TH.abs().max()),
        )

    def sets(self, start: int = 0, stop: int | None = None) -> CandidateSets:
        """Cut to rows ``start`` to ``stop``, with their transpose."""
        V = len(self.weight_VH)
        groups = None if self.group_offsets is None else self.group_offsets.numpy()
        whole = CandidateSets.of(
            self.ids.numpy(), self.offsets.numpy(), self.labels_T.numpy(), groups, vocab_size=V
        )
        return whole.shard(start, (V if stop is None else stop) - start).with_transpose()

    def dense(self, tail_logit_T: Tensor | None = None) -> list[Tensor]:
        """Loss and the gradients in hidden and weight, by autograd through [T, V] in float64."""
        tail_logit_T = None if tail_logit_T is None else tail_logit_T.double()
        return self.through(
            lambda z_TV: restricted_cross_entropy_dense(
                z_TV, self.mask_TV, self.labels_T, tail_logit_T
            )
        )

    def dense_full(self) -> list[Tensor]:
        """The same of cross-entropy over the whole vocabulary."""
        return self.through(lambda z_TV: F.cross_entropy(z_TV, self.labels_T, reduction="none"))

    def through(self, loss: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """``loss`` of the float64 logits [T, V], and its gradients in hidden and weight."""
        hidden_TH = self.hidden_TH.double().requires_grad_()
        weight_VH = self.weight_VH.double().requires_grad_()
        loss_T = loss(hidden_TH @ weight_VH.T)
        operands = [hidden_TH, weight_VH]
        upstream_T = self.upstream_T.double()
        return [loss_T.detach(), *torch.autograd.grad((loss_T * upstream_T).sum(), operands)]


def head_case(
    *, T: int, V: int, H: int, seed: int, share: float = 0.2, groups: int = 0, scale: float = 1.0
) -> HeadCase:
    """``groups`` sets shared by runs of positions, some empty; 0 for a set for each position."""
    generator = torch.Generator().manual_seed(seed)
    group_offsets = None
    if groups:
        cuts = torch.randint(0, T + 1, (groups - 1,), generator=generator).sort().values
        group_offsets = torch.cat([torch.tensor([0]), cuts, torch.tensor([T])])
    labels_T = torch.randint(V, (T,), generator=generator)
    mask_GV = torch.rand(groups or T, V, generator=generator) < share
    set_of_T = torch.arange(T)
    if group_offsets is not None:
        set_of_T = torch.arange(groups).repeat_interleave(group_offsets.diff())
    mask_GV[set_of_T, labels_T] = True
    return HeadCase(
        hidden_TH=torch.randn(T, H, generator=generator) * scale,
        weight_VH=torch.randn(V, H, generator=generator),
        labels_T=labels_T,
        upstream_T=torch.randn(T, generator=generator),
        mask_GV=mask_GV,
        group_offsets=group_offsets,
    )


def error(found: Tensor, expected: Tensor, *, floor: float = 1e-30) -> float:
    """Largest error, relative to the largest entry, or to ``floor`` if that is larger."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=floor))


def attention_by_position(
    query_SBND: Tensor,
    key_SBGD: Tensor,
    value_SBGD: Tensor,
    boundaries: list[list[int]],
    *,
    scale: float,
) -> Tensor:
    """out_s, each from its own document's positions up to s; 0 behind the last document.

    A pack of padding alone is one document.
    """
    length, heads = len(query_SBND), query_SBND.shape[2]
    out = torch.zeros(*query_SBND.shape[:3], value_SBGD.shape[3], dtype=query_SBND.dtype)
    for b, starts in enumerate(boundaries):
        for start, stop in itertools.pairwise(starts if len(starts) > 1 else [0, length]):
            for s, head in itertools.product(range(start, stop), range(heads)):
                group = head // (heads // key_SBGD.shape[2])
                key_LD, value_LD = (x[start : s + 1, b, group] for x in (key_SBGD, value_SBGD))
                p_L = torch.softmax(scale * key_LD @ query_SBND[s, b, head], 0)
                out[s, b, head] = p_L @ value_LD
    return out
