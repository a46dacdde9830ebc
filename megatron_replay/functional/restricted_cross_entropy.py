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
from megatron_replay.functional.shard_head import HeadForm, ShardSets, VocabShard, shard_sets
from megatron_replay.functional.sharded_cross_entropy import ShardedCrossEntropy
from megatron_replay.functional.tiled_head import union_head


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
    form: HeadForm = union_head,
    group_offsets: Tensor | None = None,
    tail_logit_T: Tensor | None = None,
    weight_grad_out: Tensor | None = None,
    reduce_hidden_grad: bool = True,
    validate: bool = True,
) -> Tensor:
    """Loss of each position over its candidate set, without ever forming [T, V].

    The gradient in the logits is p~ - y inside S and exactly 0 outside. Computed in fp32 whatever
    the operands' dtype; bitwise the same on every run.

    Args:
        hidden_TH: [T, H], whole on every rank of ``tp_group``.
        weight_VH: [V, H], this rank's rows: row r is that of id ``vocab_start + r``.
            Shards ascend with the rank.
        candidate_ids: int32 [nnz], ids of the whole vocabulary, ascending in each set.
        candidate_offsets: int64 [G + 1] into ``candidate_ids``.
        labels_T: int64 [T], each in its position's set.
        form: does a rank's arithmetic; ``kernels.HEAD.choose("auto", weight_VH)`` gives a
            compiled one.
        group_offsets: None: position t has set t (G = T). Otherwise int64 [G + 1]: positions
            ``group_offsets[g]`` to ``group_offsets[g + 1]`` share set g.
        tail_logit_T: logit of one more term of the denominator, a constant; -inf for none.
        weight_grad_out: fp32 [V, H] (Megatron's ``main_grad``), to which the candidates' rows of
            the weight's gradient are added in backward; autograd then gets none, and nothing of
            the size of the weight is made. None: a dense gradient, through autograd.
        reduce_hidden_grad: sum the gradient of ``hidden_TH`` over ``tp_group``; False where the
            caller's region does (Megatron's copy_to or gather_from).
        validate: check sets and labels, at the cost of a pass over the ids and a device sync. If
            False, sets must be right; a label that is not a candidate gives a loss of +inf.

    Returns:
        fp32 [T], differentiable in ``hidden_TH`` and ``weight_VH``.

    Raises:
        DataError: shapes or dtypes do not fit, or sets or labels make no sense.
        ConfigError: ``form`` is none.

    Communication over ``tp_group``: all-reduce MAX fp32 [T], SUM fp32 [2, T]; in backward SUM fp32
    [T, H] if ``reduce_hidden_grad``; MAX of one number if ``validate``. Memory: that of the form.
    """
    check_shapes(hidden_TH, weight_VH, labels_T, tail_logit_T, weight_grad_out)
    _check_types(candidate_ids, candidate_offsets, labels_T, form)
    shard = VocabShard(vocab_start, weight_VH.shape[0])
    if validate:
        vocab_size = _vocab_size(shard, weight_VH.device, tp_group)
        check_candidates(candidate_ids, candidate_offsets, labels_T, group_offsets, vocab_size)
        _check_tail(tail_logit_T)
    return cross_entropy_of_shard(
        hidden_TH,
        weight_VH,
        shard_sets(candidate_ids, candidate_offsets, labels_T, group_offsets, shard),
        labels_T,
        shard,
        form=form,
        tail_logit_T=tail_logit_T,
        tp_group=tp_group,
        reduce_hidden_grad=reduce_hidden_grad,
        weight_grad_out=weight_grad_out,
    )


def cross_entropy_of_shard(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    sets: ShardSets,
    labels_T: Tensor,
    shard: VocabShard,
    *,
    form: HeadForm,
    tail_logit_T: Tensor | None,
    tp_group: dist.ProcessGroup | None,
    reduce_hidden_grad: bool,
    weight_grad_out: Tensor | None,
) -> Tensor:
    """``restricted_cross_entropy``, unvalidated, of sets that are cut to ``shard`` already."""
    assert len(weight_VH) == sets.num_rows == shard.num_rows
    return ShardedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_TH,
        weight_VH,
        form(sets),
        labels_T.long(),
        shard,
        None if tail_logit_T is None else tail_logit_T.detach().float(),
        tp_group,
        reduce_hidden_grad,
        weight_grad_out,
    )


def check_shapes(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    tail_logit_T: Tensor | None = None,
    weight_grad_out: Tensor | None = None,
) -> None:
    """Raise DataError unless hidden [T, H], weight [V, H], labels [T] and the rest fit."""
    T = hidden_TH.shape[:1]
    fits = hidden_TH.dim() == weight_VH.dim() == 2 and hidden_TH.shape[1] == weight_VH.shape[1]
    fits &= tail_logit_T is None or tail_logit_T.shape == T
    fits &= weight_grad_out is None or weight_grad_out.shape == weight_VH.shape
    if not (fits and labels_T.shape == T):
        operands = (hidden_TH, weight_VH, labels_T, tail_logit_T, weight_grad_out)
        raise DataError(
            "shapes do not fit",
            where="cross-entropy",
            expected="hidden [T, H], weight [V, H], labels [T], tail logit [T], gradient [V, H]",
            found=", ".join(str(list(tensor.shape)) for tensor in operands if tensor is not None),
        )
    if weight_grad_out is not None and weight_grad_out.dtype is not torch.float32:
        raise DataError(
            "the weight's gradient is summed in fp32",
            where="weight_grad_out",
            found=weight_grad_out.dtype,
        )


def _check_types(
    candidate_ids: Tensor, candidate_offsets: Tensor, labels_T: Tensor, form: HeadForm
) -> None:
    for name, tensor, dtype in (
        ("candidate_ids", candidate_ids, torch.int32),
        ("candidate_offsets", candidate_offsets, torch.int64),
        ("labels_T", labels_T, torch.int64),
    ):
        if tensor.dtype is not dtype:
            raise DataError("another dtype", where=name, expected=dtype, found=tensor.dtype)
    if not callable(form):
        raise ConfigError(
            "not a form of the head",
            where="form",
            expected="what kernels.HEAD.choose gives",
            found=repr(form),
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


def _vocab_size(shard: VocabShard, device: torch.device, tp_group: dist.ProcessGroup | None) -> int:
    """One past the last id of any shard."""
    stop = torch.tensor(shard.start + shard.num_rows, device=device)
    if tp_group is not None:
        dist.all_reduce(stop, op=dist.ReduceOp.MAX, group=tp_group)
    return int(stop)
