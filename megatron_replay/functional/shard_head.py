"""What every form of the head agrees on: the sets as one rank sees them, and two functions.

A form does one rank's arithmetic, over its rows of the output layer and without communication;
``sharded_cross_entropy`` puts ranks together and is the same for all forms.

Shapes: N positions, G candidate sets, P pairs of a position (or group of positions) and a candidate
of this shard, V rows of the shard, H hidden channels, U distinct candidates of the shard.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ShardSets:
    """Candidate sets cut down to one shard, whose rows are counted from 0.

    Attributes:
        ids: int32 [P], rows of the shard, ascending and distinct in each set.
        offsets: int64 [G + 1] into ``ids``; a set may be empty.
        group_offsets: None: position n has set n (G = N). Otherwise int64 [G + 1]: positions
            ``group_offsets[g]`` to ``group_offsets[g + 1]`` share set g.
        labels_N: int64, row of each label; -1 where this shard does not have it.
        num_rows: V.
        on_host: what the host knows; None: it reads what it needs from the device, and waits.
    """

    ids: Tensor
    offsets: Tensor
    group_offsets: Tensor | None
    labels_N: Tensor
    num_rows: int
    on_host: HostSets | None = None

    def moved(self, move: Callable[[Tensor], Tensor]) -> ShardSets:
        """The same sets, each tensor put where ``move`` puts it."""
        known = self.on_host
        if known is not None and known.by_id is not None:
            known = known._replace(by_id=PairsById(*map(move, known.by_id)))
        return ShardSets(
            ids=move(self.ids),
            offsets=move(self.offsets),
            group_offsets=None if self.group_offsets is None else move(self.group_offsets),
            labels_N=move(self.labels_N),
            num_rows=self.num_rows,
            on_host=known,
        )

    def largest(self) -> int:
        """Candidates of the largest set."""
        if self.on_host is not None:
            return self.on_host.largest
        return int(self.offsets.diff().max()) if len(self.ids) else 0

    def offset_list(self) -> list[int]:
        """``offsets``, on the host."""
        return self.offsets.tolist() if self.on_host is None else self.on_host.offsets

    def group_offset_list(self) -> list[int]:
        """``group_offsets``, on the host; document scope only."""
        assert self.group_offsets is not None
        known = None if self.on_host is None else self.on_host.group_offsets
        return self.group_offsets.tolist() if known is None else known

    @functools.cached_property
    def by_id(self) -> PairsById:
        """The pairs in the order of their ids; position scope only."""
        assert self.group_offsets is None
        if self.on_host is not None and self.on_host.by_id is not None:
            return self.on_host.by_id
        # As fp32, which holds ids below 2^24 exactly: NPUs leave the sorting of integers to a CPU.
        sorted_ids, order = self.ids.float().sort(stable=True)
        rows, counts = torch.unique_consecutive(sorted_ids.int(), return_counts=True)
        return PairsById(order, self.position_P[order], rows, _starts(counts))

    @functools.cached_property
    def position_P(self) -> Tensor:
        """int64, the set of each pair; its position, in position scope."""
        sizes = self.offsets.diff()
        return torch.arange(len(sizes), device=sizes.device).repeat_interleave(
            sizes, output_size=len(self.ids)
        )


class PairsById(NamedTuple):
    """Pairs sorted by id, those of one id by position: the transpose, CSC beside CSR.

    Attributes:
        order: int64 [P], the pair at each place.
        positions: int64 [P], its position.
        rows: int32 [U], the distinct ids, ascending.
        offsets: int64 [U + 1] into ``order``.
    """

    order: Tensor
    positions: Tensor
    rows: Tensor
    offsets: Tensor


class HostSets(NamedTuple):
    """What can be told of sets before they go to a device.

    Attributes:
        largest: candidates of the largest set.
        offsets, group_offsets: those of ``ShardSets``.
        by_id: the transpose, made on the host and moved; None where nobody asked for it.
    """

    largest: int
    offsets: list[int]
    group_offsets: list[int] | None
    by_id: PairsById | None


class VocabShard(NamedTuple):
    """Row r of the shard's ``num_rows`` is that of id ``start + r``."""

    start: int
    num_rows: int

    def rows(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(row of each id, whether the shard has it)."""
        rows = ids - self.start
        return rows, (rows >= 0) & (rows < self.num_rows)


def shard_sets(
    candidate_ids: Tensor,
    candidate_offsets: Tensor,
    labels_N: Tensor,
    group_offsets: Tensor | None,
    shard: VocabShard,
) -> ShardSets:
    """Cut sets of the whole vocabulary down to those of ``shard``.

    Args:
        candidate_ids: int32 [nnz], ascending in each set.
        candidate_offsets: int64 [G + 1] into ``candidate_ids``.
        labels_N: int64, ids of the whole vocabulary.
        group_offsets: int64 [G + 1] or None, as in ``ShardSets``.
    """
    ids, inside = shard.rows(candidate_ids)
    offsets = candidate_offsets.long()
    # Where nothing is sharded all are: the cut would cost 4 % of the CPU head's time.
    if not inside.all():
        ids = ids[inside]
        offsets = torch.nn.functional.pad(inside.cumsum(0), (1, 0))[candidate_offsets]
    return ShardSets(
        ids=ids,
        offsets=offsets,
        group_offsets=group_offsets,
        labels_N=shard_labels(labels_N, shard),
        num_rows=shard.num_rows,
    )


def shard_labels(labels_N: Tensor, shard: VocabShard) -> Tensor:
    """Row of each label, int64; -1 where the shard does not have it."""
    rows_N, inside_N = shard.rows(labels_N.long())
    return rows_N.where(inside_N, -1)


class Partials(NamedTuple):
    """Of each position's candidates in this shard, fp32 [N] each.

    Attributes:
        max_N: the largest logit; -inf if there is none.
        sum_N: sum of exp(z - max); 0 if there is none.
        gold_N: the label's logit; -inf if it is not among them.
    """

    max_N: Tensor
    sum_N: Tensor
    gold_N: Tensor


class Softmax(NamedTuple):
    """p = exp(z - top) / total, over all shards and with the tail; fp32 [N] each.

    Kept apart, not as one log-sum-exp: the quotient keeps the bits that z - lse rounds off.
    """

    top_N: Tensor
    total_N: Tensor


class ShardHead(Protocol):
    """A form at work on one batch. ``forward`` comes first, ``backward`` once after it.

    Computes in fp32 whatever the operands' dtype. Equal input gives equal bits on every run: for
    any number of threads or cores where the arithmetic is a form's own, for the same number of
    threads where BLAS does it, which splits its sums by them.
    """

    def forward(self, hidden_NH: Tensor, weight_VH: Tensor, *, hidden_grad: bool) -> Partials:
        """z[p] = <hidden[n], weight[id]> of every pair, folded into each position's partials.

        ``hidden_grad``: whether ``backward`` will be asked for it, so that its part may be begun.
        """
        ...

    def backward(
        self,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        softmax: Softmax,
        grad_N: Tensor,
        *,
        hidden_grad: bool,
        weight_grad_out: Tensor | None,
    ) -> Tensor | None:
        """With dz = (exp(z - top) / total - [label]) * grad: dH = dz W, and dW = dz^T H.

        Args:
            hidden_NH, weight_VH: those of ``forward``.
            softmax: of every position, over all shards.
            grad_N: fp32, the upstream gradient of each position's loss.
            weight_grad_out: fp32 [V, H], to which rows of candidates get dW added and others are
                not touched; None where dW is not wanted.

        Returns:
            dH of this shard's candidates, fp32 [N, H]; None unless ``hidden_grad``.
        """
        ...


#: Binds a form to the sets of a batch. One that reads ``ShardSets.by_id`` has ``reads_by_id``.
HeadForm = Callable[[ShardSets], ShardHead]


def reads_by_id(form: HeadForm) -> bool:
    """Whether ``form`` wants the transpose of the sets."""
    return getattr(form, "reads_by_id", False)


_LOWEST = torch.finfo(torch.float32).min


def rescale(old_N: Tensor, new_N: Tensor) -> Tensor:
    """exp(old - new), for a sum whose maximum goes from old to new; 0 where old is -inf."""
    return torch.exp(old_N - finite(new_N))


def finite(max_N: Tensor) -> Tensor:
    """``max_N`` to subtract: where nothing counted yet it is -inf, and -inf - -inf is no number."""
    return max_N.clamp(min=_LOWEST)


def no_partials(like_NH: Tensor) -> Partials:
    """Those of positions without a candidate."""
    max_N, gold_N = like_NH.new_full((2, len(like_NH)), -math.inf, dtype=torch.float32)
    return Partials(max_N, torch.zeros_like(max_N), gold_N)


def zeros(like: Tensor) -> Tensor:
    """A gradient to sum up: fp32, contiguous, of the shape of ``like``."""
    return like.new_zeros(like.shape, dtype=torch.float32)


def _starts(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))
