"""Independent float64 references, random cases to try them on, and one way to run a loss on them.

Shapes: T positions, V vocabulary, H hidden channels, G candidate sets.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from megatron_replay.functional import restricted_cross_entropy, vocab_parallel_cross_entropy
from megatron_replay.loss.candidate_sets import CandidateSets
from megatron_replay.loss.definition import restricted_cross_entropy_dense
from megatron_replay.loss.divergence import SoftTargets, with_divergence

#: Ids, offsets and stored logits of sets that a divergence is over.
Stored = tuple[Tensor, Tensor, Tensor]


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
        return F.pad(self.mask_GV.sum(1).cumsum(0), (1, 0))

    @property
    def mask_TV(self) -> Tensor:
        if self.group_offsets is None:
            return self.mask_GV
        return self.mask_GV.repeat_interleave(self.group_offsets.diff(), 0)

    def sets(self, start: int = 0, stop: int | None = None) -> CandidateSets:
        """Cut to rows ``start`` to ``stop``, with their transpose."""
        V = len(self.weight_VH)
        groups = None if self.group_offsets is None else self.group_offsets.numpy()
        whole = CandidateSets.of(
            self.ids.numpy(), self.offsets.numpy(), self.labels_T.numpy(), groups, vocab_size=V
        )
        return whole.shard(start, (V if stop is None else stop) - start).with_transpose()

    def stored(self, *, seed: int) -> Stored:
        """Sets inside these, each with its label, and logits for them."""
        generator = torch.Generator().manual_seed(seed)
        mask_TV = self.mask_TV & (torch.rand(self.mask_TV.shape, generator=generator) < 0.7)
        mask_TV[torch.arange(len(mask_TV)), self.labels_T] = True
        ids = mask_TV.nonzero()[:, 1].int()
        offsets = F.pad(mask_TV.sum(1).cumsum(0), (1, 0))
        return ids, offsets, torch.randn(len(ids), generator=generator) * 3

    def run(
        self, *, stored: Stored | None = None, kl_weight: float = 0.0, **options: Any
    ) -> list[Tensor]:
        """Loss, dH and dW of the restricted loss, with a divergence from what is ``stored``."""

        def loss(hidden_TH: Tensor, weight_VH: Tensor, **options: Any) -> Tensor:
            sets = {"group_offsets": self.group_offsets, "vocab_start": 0} | options
            loss_T = restricted_cross_entropy(
                hidden_TH, weight_VH, self.ids, self.offsets, self.labels_T, **sets
            )
            if stored is None:
                return loss_T
            own = soft_targets(self.labels_T, *stored, sets["vocab_start"], len(weight_VH))
            shared = {"tp_group", "reduce_hidden_grad", "weight_grad_out"} & options.keys()
            given = {name: options[name] for name in shared}
            return with_divergence(loss_T, hidden_TH, weight_VH, own, kl_weight=kl_weight, **given)

        return self._through(loss, **options)

    def run_full(self, **options: Any) -> list[Tensor]:
        """The same of cross-entropy over the whole vocabulary."""
        return self._through(
            partial(vocab_parallel_cross_entropy, labels_N=self.labels_T), **options
        )

    def _through(
        self,
        loss: Callable[..., Tensor],
        *,
        dtype: torch.dtype = torch.float32,
        hidden_TH: Tensor | None = None,
        weight_VH: Tensor | None = None,
        **options: Any,
    ) -> list[Tensor]:
        """Other operands than the case's keep their strides; dW by ``weight_grad_out`` if given."""
        given = (hidden_TH, self.hidden_TH), (weight_VH, self.weight_VH)
        operands = [
            (own.to(dtype, copy=True) if other is None else other).detach().requires_grad_()
            for other, own in given
        ]
        loss_T = loss(*operands, **options)
        (loss_T * self.upstream_T).sum().backward()
        if (out := options.get("weight_grad_out")) is None:
            out = operands[1].grad
        assert operands[0].grad is not None
        assert out is not None
        return [loss_T.detach(), operands[0].grad, out]

    def dense(
        self,
        tail_logit_T: Tensor | None = None,
        *,
        stored: Stored | None = None,
        kl_weight: float = 0.0,
    ) -> list[Tensor]:
        """``run`` by autograd through [T, V] in float64."""
        mask_TV, labels_T = self.mask_TV, self.labels_T
        tail_logit_T = None if tail_logit_T is None else tail_logit_T.double()

        def loss(z_TV: Tensor) -> Tensor:
            loss_T = restricted_cross_entropy_dense(z_TV, mask_TV, labels_T, tail_logit_T)
            if stored is None:
                return loss_T
            log_p_TV = z_TV - z_TV.masked_fill(~mask_TV, -math.inf).logsumexp(1, keepdim=True)
            divergences = []
            for t, span in enumerate(itertools.pairwise(stored[1].tolist())):
                log_q = stored[2][slice(*span)].double().log_softmax(0)
                log_p = log_p_TV[t, stored[0][slice(*span)].long()]
                divergences.append((log_q.exp() * (log_q - log_p)).sum())
            return loss_T + kl_weight * torch.stack(divergences)

        return self._exact(loss)

    def dense_full(self) -> list[Tensor]:
        """``run_full`` in the same way."""
        return self._exact(lambda z_TV: F.cross_entropy(z_TV, self.labels_T, reduction="none"))

    def _exact(self, loss: Callable[[Tensor], Tensor]) -> list[Tensor]:
        operands = [x.double().requires_grad_() for x in (self.hidden_TH, self.weight_VH)]
        loss_T = loss(operands[0] @ operands[1].T)
        upstream_T = self.upstream_T.double()
        return [loss_T.detach(), *torch.autograd.grad((loss_T * upstream_T).sum(), operands)]

    def check(
        self, found: list[Tensor], expected: list[Tensor] | None = None, *, bound: float = 1e-6
    ) -> None:
        """Loss, dH and dW are those of float64; ``expected`` is ``dense()`` where it is not given.

        A confident position's gradient is the small difference of p·w and y·w, and keeps their
        rounding: in fp32 the error is measured against the size of these terms.
        """
        upstream, hidden, weight = (
            float(x.abs().max()) for x in (self.upstream_T, self.hidden_TH, self.weight_VH)
        )
        floors = (1.0, upstream * weight, upstream * hidden)
        expected = self.dense() if expected is None else expected
        for ours, exact, floor in zip(found, expected, floors, strict=True):
            assert error(ours, exact, floor=floor) <= bound


def soft_targets(
    labels_T: Tensor, ids: Tensor, offsets: Tensor, logits: Tensor, start: int, num_rows: int
) -> SoftTargets:
    sets = CandidateSets.of(
        ids.numpy(), offsets.numpy(), labels_T.numpy(), vocab_size=start + num_rows,
        values=logits.numpy(),
    )  # fmt: skip
    return SoftTargets.of(sets, start, num_rows)


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


def ghosts(case: HeadCase) -> Tensor:
    """Tail logits, some of them none."""
    tail_logit_T = case.upstream_T * 2
    tail_logit_T[::3] = -math.inf
    return tail_logit_T


def error(found: Tensor, expected: Tensor, *, floor: float = 1e-30) -> float:
    """Largest error, relative to the largest entry, or to ``floor`` if that is larger."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=floor))


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Bit for bit, but that zeros of both signs are the same."""
    return all(map(torch.equal, found, expected))


def seen_rows(own: Sequence[int], shared: Sequence[int]) -> list[list[int]]:
    """Of each row, the rows it may look at: the first tokens of its document up to itself.

    Documents of ``own`` rows each, which begin with ``shared`` positions of the one before.
    """
    seen: list[list[int]] = []
    path: list[int] = []
    for size, common in zip(own, shared, strict=True):
        path = path[:common]
        for _ in range(size):
            path = [*path, len(seen)]
            seen.append(path)
    return seen


def attention_by_position(
    query_TND: Tensor, key_TGD: Tensor, value_TGD: Tensor, seen: list[list[int]], *, scale: float
) -> Tensor:
    """out_s, each from the rows ``seen[s]``; 0 at rows behind the last of them."""
    heads, groups = query_TND.shape[1], key_TGD.shape[1]
    out = torch.zeros(*query_TND.shape[:2], value_TGD.shape[2], dtype=query_TND.dtype)
    for (s, rows), head in itertools.product(enumerate(seen), range(heads)):
        key_LD, value_LD = (x[rows, head // (heads // groups)] for x in (key_TGD, value_TGD))
        out[s, head] = torch.softmax(scale * key_LD @ query_TND[s, head], 0) @ value_LD
    return out
