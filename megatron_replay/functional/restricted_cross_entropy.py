"""Cross-entropy over candidate sets (Eq. 3): the dense definition, then the sharded form.

Shapes: N positions, V rows of this rank's output-layer shard, H hidden channels, G candidate sets,
n positions of a tile, U distinct local candidates of a tile.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_replay.errors import ConfigError

#: Positions whose union of candidates is multiplied at one time; see ``_tiles``.
_TILE_POSITIONS = 128
BACKENDS = ("auto", "torch")


def restricted_cross_entropy_dense(
    logits_NV: Tensor, candidates_NV: Tensor, labels_N: Tensor, tail_logit_N: Tensor | None = None
) -> Tensor:
    """The definition: L = -z[x] + log(sum_{j in S} exp z[j] + exp(tail)).

    Args:
        logits_NV: [N, V] over the whole vocabulary.
        candidates_NV: bool [N, V], True inside S; the label must be inside.
        labels_N: int64 [N].
        tail_logit_N: logit of one more term, -inf for none.

    Returns:
        Loss [N].
    """
    inside_NV = logits_NV.masked_fill(~candidates_NV, -math.inf)
    if tail_logit_N is not None:
        inside_NV = torch.cat([inside_NV, tail_logit_N[:, None].to(inside_NV.dtype)], 1)
    return torch.nn.functional.cross_entropy(inside_NV, labels_N, reduction="none")


def restricted_cross_entropy(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    candidate_ids: Tensor,
    candidate_offsets: Tensor,
    labels_T: Tensor,
    *,
    vocab_start: int = 0,
    tp_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    group_offsets: Tensor | None = None,
    tail_logit_T: Tensor | None = None,
    reduce_hidden_grad: bool = True,
    validate: bool = True,
) -> Tensor:
    """Loss of each position over its candidate set, without ever forming [T, V].

    The gradient in the logits is p~ - y inside S and exactly 0 outside. Computed in fp32 whatever
    the operands' dtype; bitwise the same on every run.

    Args:
        hidden_TH: [T, H], whole on every rank of ``tp_group``.
        weight_VH: [V, H], this rank's rows, of ids ``vocab_start`` to ``vocab_start + V``.
        candidate_ids: int32 [nnz], ids of the whole vocabulary, ascending in each set.
        candidate_offsets: int64 [G + 1] into ``candidate_ids``.
        labels_T: int64 [T], each in its position's set.
        group_offsets: None: position t has set t (G = T). Otherwise int64 [G + 1]: positions
            ``group_offsets[g]`` to ``group_offsets[g + 1]`` share set g.
        tail_logit_T: logit of one more term of the denominator, a constant; -inf for none.
        reduce_hidden_grad: sum the gradient of ``hidden_TH`` over ``tp_group``; False where the
            caller's region does (Megatron's copy_to or gather_from).
        validate: check the sets; costs a pass over the ids.

    Returns:
        fp32 [T], differentiable in ``hidden_TH`` and ``weight_VH``.

    Raises:
        ConfigError: no such backend. ValueError: sets or labels that make no sense.

    Communication over ``tp_group``: all-reduce MAX [T], all-reduce SUM [T, 2]; in backward SUM
    [T, H] when ``reduce_hidden_grad``. Memory beside operands and gradients: the probabilities kept
    for backward, fp32 [n, U] a tile, and one tile's rows of the weight, fp32 [U, H].
    """
    if backend not in BACKENDS:
        raise ConfigError("no such head backend", expected=", ".join(BACKENDS), found=repr(backend))
    if validate:
        check_candidates(candidate_ids, candidate_offsets, labels_T, group_offsets)
    return _RestrictedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_TH,
        weight_VH,
        _Sets(candidate_ids, candidate_offsets, group_offsets, vocab_start, weight_VH.shape[0]),
        labels_T,
        tail_logit_T,
        tp_group,
        reduce_hidden_grad,
    )


class _Sets:
    """The candidate sets as one shard sees them, cut into tiles of positions."""

    def __init__(
        self, ids: Tensor, offsets: Tensor, group_offsets: Tensor | None, start: int, size: int
    ) -> None:
        self.start = start
        self._shared = group_offsets is not None
        local = ids.long() - start
        self._inside = (local >= 0) & (local < size)
        self._local = local
        self._offsets = offsets.tolist()
        self._groups = range(len(offsets)) if group_offsets is None else group_offsets.tolist()

    def tiles(self) -> list[tuple[slice, Tensor, Tensor | None]]:
        """(positions, local ids [U], allowed [n, U] or None where all are) of each tile.

        With a set for each position, ``_TILE_POSITIONS`` neighbours are multiplied with the union
        of their sets: their sets overlap, so that is less work than gathering rows for each, and
        it is a dense product. A shared set is a tile of its own, and every product is used.
        """
        step = 1 if self._shared else _TILE_POSITIONS
        num_groups = len(self._offsets) - 1
        return [
            self._tile(first, min(first + step, num_groups)) for first in range(0, num_groups, step)
        ]

    def _tile(self, first: int, last: int) -> tuple[slice, Tensor, Tensor | None]:
        span = slice(self._offsets[first], self._offsets[last])
        inside = self._inside[span]
        local = self._local[span][inside]
        positions = slice(self._groups[first], self._groups[last])
        if self._shared:
            return positions, local, None
        union, slot = local.unique(return_inverse=True)
        sizes = torch.tensor(self._offsets[first : last + 1], device=local.device).diff()
        row = torch.arange(last - first, device=local.device).repeat_interleave(sizes)[inside]
        allowed = torch.zeros(last - first, len(union), dtype=torch.bool, device=local.device)
        allowed[row, slot] = True
        return positions, union, allowed


class _RestrictedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        sets: _Sets,
        labels_N: Tensor,
        tail_logit_N: Tensor | None,
        tp_group: dist.ProcessGroup | None,
        reduce_hidden_grad: bool,
    ) -> Tensor:
        N = hidden_NH.shape[0]
        tiles = sets.tiles()
        logits: list[Tensor] = []
        max_N = hidden_NH.new_full((N,), -math.inf, dtype=torch.float32)
        for positions, union, allowed in tiles:
            tile_nU = hidden_NH[positions].float() @ weight_VH[union].float().T
            if allowed is not None:
                tile_nU.masked_fill_(~allowed, -math.inf)
            logits.append(tile_nU)
            if len(union):
                max_N[positions] = tile_nU.amax(1)
        if tp_group is not None:
            dist.all_reduce(max_N, op=dist.ReduceOp.MAX, group=tp_group)
        # The tail belongs to no shard: every rank adds it after the reduction, to the same maximum.
        if tail_logit_N is not None:
            max_N = torch.maximum(max_N, tail_logit_N)
        start = sets.start
        sums_N2 = hidden_NH.new_zeros((N, 2), dtype=torch.float32)  # sum of exp; the label's logit
        for (positions, union, _), tile_nU in zip(tiles, logits, strict=True):
            if not len(union):
                continue
            gold_nU = union == (labels_N[positions, None] - start)
            sums_N2[positions, 1] = tile_nU.masked_fill(~gold_nU, 0.0).sum(1)
            tile_nU.sub_(max_N[positions, None]).exp_()
            sums_N2[positions, 0] = tile_nU.sum(1)
        if tp_group is not None:
            dist.all_reduce(sums_N2, group=tp_group)
        sum_N, gold_N = sums_N2.unbind(1)
        if tail_logit_N is not None:
            sum_N = sum_N + torch.exp(tail_logit_N - max_N)
        for (positions, _, _), tile_nU in zip(tiles, logits, strict=True):
            tile_nU.div_(sum_N[positions, None])
        ctx.save_for_backward(hidden_NH, weight_VH, labels_N, *logits)
        ctx.tiles, ctx.start, ctx.tp_group = tiles, start, tp_group
        ctx.reduce_hidden_grad = reduce_hidden_grad
        return max_N + sum_N.log() - gold_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_N,) = grads
        hidden_NH, weight_VH, labels_N, *probabilities = ctx.saved_tensors
        hidden_grad = torch.zeros_like(hidden_NH, dtype=torch.float32)
        weight_grad = torch.zeros_like(weight_VH, dtype=torch.float32)
        for (positions, union, _), p_nU in zip(ctx.tiles, probabilities, strict=True):
            gold_nU = union == (labels_N[positions, None] - ctx.start)
            slope_nU = (p_nU - gold_nU.float()) * grad_N[positions, None]
            hidden_grad[positions] = slope_nU @ weight_VH[union].float()
            # Ids of a tile are distinct: no two rows meet, so this is deterministic.
            weight_grad[union] += slope_nU.T @ hidden_NH[positions].float()
        hidden_grad = hidden_grad.to(hidden_NH.dtype)
        if ctx.tp_group is not None and ctx.reduce_hidden_grad:
            dist.all_reduce(hidden_grad, group=ctx.tp_group)
        return hidden_grad, weight_grad.to(weight_VH.dtype), None, None, None, None, None


def check_candidates(
    candidate_ids: Tensor,
    candidate_offsets: Tensor,
    labels_N: Tensor,
    group_offsets: Tensor | None = None,
) -> None:
    """Raise ValueError unless sets are ascending without duplicates and hold their labels."""
    sizes = candidate_offsets.diff()
    if int(candidate_offsets[0]) != 0 or int(candidate_offsets[-1]) != len(candidate_ids):
        raise ValueError("candidate_offsets must run from 0 to the number of candidate_ids")
    if (sizes < 0).any():
        raise ValueError("candidate_offsets must not decrease")
    if len(candidate_ids) and int(candidate_ids.min()) < 0:
        raise ValueError(f"negative candidate id {int(candidate_ids.min())}")
    num_groups = len(sizes)
    group_of_id = torch.arange(num_groups, device=sizes.device).repeat_interleave(sizes)
    if group_offsets is None:
        if num_groups != len(labels_N):
            raise ValueError(f"{num_groups} candidate sets for {len(labels_N)} positions")
        group_of_position = torch.arange(num_groups, device=sizes.device)
    else:
        positions = group_offsets.diff()
        ends = (int(group_offsets[0]), int(group_offsets[-1]))
        if ends != (0, len(labels_N)) or (positions < 0).any() or len(positions) != num_groups:
            raise ValueError("group_offsets must cut the positions into one run for each set")
        group_of_position = torch.arange(num_groups, device=sizes.device).repeat_interleave(
            positions
        )
    keys = (group_of_id << 32) + candidate_ids.long()
    if (keys.diff() <= 0).any():
        raise ValueError("candidate ids must be ascending and unique inside each set")
    wanted = (group_of_position << 32) + labels_N.long()
    found = torch.isin(wanted, keys)
    if not found.all():
        position = int((~found).nonzero()[0])
        raise ValueError(
            f"label {int(labels_N[position])} of position {position} is not in its set"
        )
