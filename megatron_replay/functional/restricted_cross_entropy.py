"""Cross-entropy over candidate sets (Eq. 3): the dense definition, then the sharded form.

Shapes: T positions, V vocabulary (of this rank's shard, in the sharded form), H hidden channels,
G candidate sets, U distinct local candidates of a tile.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_replay.errors import ConfigError, DataError
from megatron_replay.functional.tiled_cross_entropy import Tile, TiledCrossEntropy

BACKENDS = ("auto", "torch")
#: Positions with sets of their own whose union is multiplied at one time. More would share more
#: ids, and multiply more rows that are in one position's set only.
_TILE_POSITIONS = 128
#: Positions of one shared set at a time: bounds the logits of a long document.
_SHARED_TILE_POSITIONS = 1024


def restricted_cross_entropy_dense(
    logits_TV: Tensor,
    candidate_mask_TV: Tensor,
    labels_T: Tensor,
    tail_logit_T: Tensor | None = None,
) -> Tensor:
    """The definition: L = -z[x] + log(sum_{j in S} exp z[j] + exp(tail)).

    Args:
        logits_TV: [T, V] over the whole vocabulary.
        candidate_mask_TV: bool [T, V], True inside S; the label must be inside.
        labels_T: int64 [T].
        tail_logit_T: logit of one more term, -inf for none.

    Returns:
        Loss [T], in the dtype of the logits.
    """
    lse_T = logits_TV.masked_fill(~candidate_mask_TV, -math.inf).logsumexp(1)
    if tail_logit_T is not None:
        lse_T = torch.logaddexp(lse_T, tail_logit_T)
    return lse_T - logits_TV.gather(1, labels_T[:, None]).squeeze(1)


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
        backend: "auto" or "torch".
        group_offsets: None: position t has set t (G = T). Otherwise int64 [G + 1]: positions
            ``group_offsets[g]`` to ``group_offsets[g + 1]`` share set g.
        tail_logit_T: logit of one more term of the denominator, a constant; -inf for none.
        reduce_hidden_grad: sum the gradient of ``hidden_TH`` over ``tp_group``; False where the
            caller's region does (Megatron's copy_to or gather_from).
        validate: check sets and labels, at the cost of a pass over the ids and a device sync. If
            False, sets must be right; a label that is not a candidate gives a loss of +inf.

    Returns:
        fp32 [T], differentiable in ``hidden_TH`` and ``weight_VH``.

    Raises:
        ConfigError: no such backend.
        DataError: shapes do not fit, or sets or labels make no sense.

    Communication over ``tp_group``: all-reduce MAX [T, 2], SUM [T]; in backward SUM fp32 [T, H] if
    ``reduce_hidden_grad``; MAX of one number if ``validate``. Memory beside operands and gradients:
    one tile's logits, fp32 [128, U] (a shared set: [1024, U]), and its rows of the weight, fp32
    [U, H]; between forward and backward 16 bytes a candidate and 8 a position (a shared set: 8 an
    id). The weight's gradient is a dense fp32 [V, H], as autograd asks for.
    """
    if backend not in BACKENDS:
        raise ConfigError("no such head backend", expected=", ".join(BACKENDS), found=repr(backend))
    check_shapes(hidden_TH, weight_VH, labels_T, tail_logit_T)
    if validate:
        vocab_size = _vocab_size(weight_VH, vocab_start, tp_group)
        check_candidates(candidate_ids, candidate_offsets, labels_T, group_offsets, vocab_size)
        _check_tail(tail_logit_T)
    local_ids = candidate_ids.long() - vocab_start
    inside = (local_ids >= 0) & (local_ids < weight_VH.shape[0])
    if group_offsets is None:
        tiles = _position_tiles(local_ids, inside, candidate_offsets.tolist())
    else:
        tiles = _group_tiles(local_ids, inside, candidate_offsets.tolist(), group_offsets.tolist())
    return TiledCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_TH,
        weight_VH,
        tiles,
        labels_T.long() - vocab_start,
        None if tail_logit_T is None else tail_logit_T.detach().float(),
        tp_group,
        reduce_hidden_grad,
    )


def _position_tiles(local_ids: Tensor, inside: Tensor, offsets: list[int]) -> list[Tile]:
    """Neighbouring positions, each with a set of its own, times the union of their sets.

    The sets of neighbours overlap, so that this is less work than to gather rows for each, and it
    is a dense product.
    """
    tiles = []
    num_positions = len(offsets) - 1
    for first in range(0, num_positions, _TILE_POSITIONS):
        last = min(first + _TILE_POSITIONS, num_positions)
        span = slice(offsets[first], offsets[last])
        kept = inside[span]
        sizes = torch.tensor(offsets[first : last + 1], device=kept.device).diff()
        position = torch.arange(last - first, device=kept.device).repeat_interleave(sizes)[kept]
        rows, column = local_ids[span][kept].unique(return_inverse=True)
        if len(rows):
            tiles.append(Tile(slice(first, last), rows, (position, column)))
    return tiles


def _group_tiles(
    local_ids: Tensor, inside: Tensor, offsets: list[int], group_offsets: list[int]
) -> list[Tile]:
    """Positions that share a set, times that set: every product is used."""
    tiles = []
    for group in range(len(offsets) - 1):
        span = slice(offsets[group], offsets[group + 1])
        rows = local_ids[span][inside[span]]
        if not len(rows):
            continue
        start, stop = group_offsets[group], group_offsets[group + 1]
        for first in range(start, stop, _SHARED_TILE_POSITIONS):
            tiles.append(Tile(slice(first, min(first + _SHARED_TILE_POSITIONS, stop)), rows))
    return tiles


def check_shapes(
    hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, tail_logit_T: Tensor | None = None
) -> None:
    """Raise DataError unless hidden [T, H], weight [V, H], labels [T] and tail [T] fit."""
    T = hidden_TH.shape[:1]
    tail_fits = tail_logit_T is None or tail_logit_T.shape == T
    fits = hidden_TH.dim() == weight_VH.dim() == 2 and hidden_TH.shape[1] == weight_VH.shape[1]
    if not (fits and labels_T.shape == T and tail_fits):
        shapes = [list(hidden_TH.shape), list(weight_VH.shape), list(labels_T.shape)]
        if tail_logit_T is not None:
            shapes.append(list(tail_logit_T.shape))
        raise DataError(
            "shapes do not fit",
            where="cross-entropy",
            expected="hidden [T, H], weight [V, H], labels [T], tail logit [T]",
            found=", ".join(map(str, shapes)),
        )


def check_candidates(
    candidate_ids: Tensor,
    candidate_offsets: Tensor,
    labels_T: Tensor,
    group_offsets: Tensor | None,
    vocab_size: int,
) -> None:
    """Raise DataError unless sets are ascending, distinct, of the vocabulary, with their labels."""
    sizes = _sizes(candidate_offsets, len(candidate_ids), "candidate_offsets")
    if group_offsets is None:
        positions = torch.ones_like(labels_T)
    else:
        positions = _sizes(group_offsets, len(labels_T), "group_offsets")
    if len(positions) != len(sizes):
        raise DataError(
            "one candidate set is needed for each position, or group of positions",
            where="candidate_offsets",
            expected=f"{len(positions)} sets",
            found=len(sizes),
        )
    outside = (candidate_ids < 0) | (candidate_ids >= vocab_size)
    if outside.any():
        raise DataError(
            "a candidate is outside the vocabulary",
            where="candidate_ids",
            expected=f"ids 0 to {vocab_size - 1}",
            found=int(candidate_ids[outside][0]),
        )
    # (set, id) as one number: ascending overall exactly if ids are ascending in each set.
    sets = torch.arange(len(sizes), device=sizes.device)
    keys = (sets.repeat_interleave(sizes) << 32) + candidate_ids.long()
    disorder = (keys.diff() <= 0).nonzero()
    if len(disorder):
        place = int(disorder[0])
        raise DataError(
            "ids must ascend, without a duplicate, inside each set",
            where=f"set {int(keys[place] >> 32)}",
            found=f"{int(candidate_ids[place])} before {int(candidate_ids[place + 1])}",
        )
    wanted = (sets.repeat_interleave(positions) << 32) + labels_T.long()
    absent = (~torch.isin(wanted, keys)).nonzero()
    if len(absent):
        position = int(absent[0])
        raise DataError(
            "the label is not in its candidate set",
            where=f"position {position}",
            found=f"label {int(labels_T[position])}; {len(absent)} such positions",
            fix="The candidates must come from the same corpus and positions as the labels",
        )


def _sizes(offsets: Tensor, total: int, name: str) -> Tensor:
    sizes = offsets.diff()
    if offsets.dim() != 1 or not len(offsets) or (sizes < 0).any():
        raise DataError("offsets must not decrease", where=name, found=offsets.tolist()[:8])
    if int(offsets[0]) != 0 or int(offsets[-1]) != total:
        raise DataError(
            "offsets do not span what they cut",
            where=name,
            expected=f"0 to {total}",
            found=f"{int(offsets[0])} to {int(offsets[-1])}",
        )
    return sizes


def _check_tail(tail_logit_T: Tensor | None) -> None:
    if tail_logit_T is not None and not (tail_logit_T < math.inf).all():  # NaN compares false
        raise DataError("a tail logit is NaN or +infinity", where="tail_logit_T")


def _vocab_size(weight_VH: Tensor, vocab_start: int, tp_group: dist.ProcessGroup | None) -> int:
    """One past the last id of any shard."""
    stop = torch.tensor(vocab_start + weight_VH.shape[0], device=weight_VH.device)
    if tp_group is not None:
        dist.all_reduce(stop, op=dist.ReduceOp.MAX, group=tp_group)
    return int(stop)
