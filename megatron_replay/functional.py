"""The loss and the candidate rule for a training loop of your own: torch in, torch out.

The functions of ``loss`` and ``selection`` with the fastest backend for their tensors, and with
checks of what they are given. They work in one process without any group; a vocabulary shard enters
as ``vocab_start`` and ``tp_group``.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_replay.errors import ConfigError, DataError
from megatron_replay.kernels import HEAD, SELECTION
from megatron_replay.loss.backends import HeadBackend
from megatron_replay.loss.candidate_sets import CandidateSets
from megatron_replay.loss.definition import restricted_cross_entropy_dense
from megatron_replay.loss.sharded import (
    cross_entropy_of_sets,
    require_shapes,
    vocab_parallel_cross_entropy,
)
from megatron_replay.selection import candidates
from megatron_replay.selection.candidates import SelectedCandidates
from megatron_replay.selection.positions import select_positions
from megatron_replay.selection.shard_selection import SelectionBackend

__all__ = [
    "SelectedCandidates",
    "restricted_cross_entropy",
    "restricted_cross_entropy_dense",
    "select_candidates",
    "select_positions",
    "vocab_parallel_cross_entropy",
]


def select_candidates(
    logits_TV: Tensor, labels_T: Tensor, *, backend: SelectionBackend | None = None, **options: Any
) -> SelectedCandidates:
    """Select S_t = {i_1, ..., i_K} + {x_t} with K = min(K*, max_candidates).

    ``selection.candidates.select_candidates`` documents the arguments and errors.

    Args:
        backend: None: the compiled one of the device, or else torch's; all give the same sets.
    """
    backend = SELECTION.choose("auto", logits_TV) if backend is None else backend
    _require_backend(backend, SelectionBackend, "SELECTION")
    return candidates.select_candidates(logits_TV, labels_T, backend=backend, **options)


def restricted_cross_entropy(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    candidate_ids: Tensor,
    candidate_offsets: Tensor,
    labels_T: Tensor,
    *,
    vocab_start: int = 0,
    tp_group: dist.ProcessGroup | None = None,
    backend: HeadBackend | None = None,
    group_offsets: Tensor | None = None,
    tail_logit_T: Tensor | None = None,
    weight_grad_out: Tensor | Literal["main_grad"] | None = "main_grad",
    reduce_hidden_grad: bool = True,
    validate: bool = True,
) -> Tensor:
    """Loss of each position over its candidate set, without ever forming [T, V].

    The gradient in the logits is p~ - y inside S and exactly 0 outside. Computed in fp32 whatever
    the operands' dtype (but see ``loss.blocks`` for dense products of bf16 on accelerators);
    bitwise the same on every run. T positions, V rows, H hidden channels.

    Args:
        hidden_TH: [T, H], whole on every rank of ``tp_group``.
        weight_VH: [V, H], this rank's rows: row r is that of id ``vocab_start + r``. Shards ascend
            with the rank.
        candidate_ids: int32 [nnz], ids of the whole vocabulary, ascending in each set.
        candidate_offsets: int64 [G + 1] into ``candidate_ids``.
        labels_T: int64 [T], each in its position's set.
        backend: computes a rank's part. None: ``kernels.HEAD.choose("auto", weight_VH)``, the one
            compiled for the device, or else union-GEMM in torch.
        group_offsets: None: position t has set t (G = T). Otherwise int64 [G + 1]: positions
            ``group_offsets[g]`` to ``group_offsets[g + 1]`` share set g.
        tail_logit_T: logit of one more term of the denominator, a constant; -inf for none.
        weight_grad_out: fp32 [V, H], to which the candidates' rows of the weight's gradient are
            added in backward; autograd then has none, and nothing of the size of the weight is
            made. "main_grad": the weight's own, where Megatron has given it one. None: a dense
            gradient, through autograd.
        reduce_hidden_grad: sum the gradient of ``hidden_TH`` over ``tp_group``; False where the
            caller's region does so (Megatron's copy_to or gather_from).
        validate: check sets and labels, at the cost of a pass over the ids. If False, the caller
            guarantees them; a label that is not a candidate gives a loss of +inf.

    Returns:
        fp32 [T], nats, differentiable in ``hidden_TH`` and ``weight_VH``.

    Raises:
        DataError: shapes or dtypes do not fit, or sets or labels are invalid.
        ConfigError: ``backend`` is not a HeadBackend.

    Communication over ``tp_group``: that of ``loss.sharded.cross_entropy_of_sets``, and MAX of one
    number if ``validate``. Sets and labels on a device are copied to the host, where they are cut.
    """
    if isinstance(weight_grad_out, str):
        weight_grad_out = getattr(weight_VH, "main_grad", None)
    backend = HEAD.choose("auto", weight_VH) if backend is None else backend
    require_shapes(hidden_TH, weight_VH, labels_T, tail_logit_T, weight_grad_out)
    _require_types(candidate_ids, candidate_offsets, labels_T, backend)
    ids, offsets, labels = (
        tensor.cpu().numpy() for tensor in (candidate_ids, candidate_offsets, labels_T)
    )
    groups = None if group_offsets is None else group_offsets.cpu().numpy()
    device, num_rows = weight_VH.device, weight_VH.shape[0]
    if validate:
        vocab_size = torch.tensor(vocab_start + num_rows, device=device)
        if tp_group is not None:
            dist.all_reduce(vocab_size, op=dist.ReduceOp.MAX, group=tp_group)
        _require_sets(ids, offsets, labels, groups, int(vocab_size))
        if tail_logit_T is not None and not (tail_logit_T < math.inf).all():  # NaN compares false
            raise DataError("a tail logit is NaN or +infinity", where="tail_logit_T")
    sets = CandidateSets.of(ids, offsets, labels, groups, vocab_size=vocab_start + num_rows)
    sets = sets.shard(vocab_start, num_rows)
    if backend.reads_transpose:
        sets = sets.with_transpose()
    return cross_entropy_of_sets(
        hidden_TH,
        weight_VH,
        sets.moved(lambda tensor: tensor.to(device)),
        backend=backend,
        tail_logit_N=tail_logit_T,
        tp_group=tp_group,
        reduce_hidden_grad=reduce_hidden_grad,
        weight_grad_out=weight_grad_out,
    )


def _require_types(
    candidate_ids: Tensor, candidate_offsets: Tensor, labels_T: Tensor, backend: HeadBackend
) -> None:
    for name, tensor, dtype in (
        ("candidate_ids", candidate_ids, torch.int32),
        ("candidate_offsets", candidate_offsets, torch.int64),
        ("labels_T", labels_T, torch.int64),
    ):
        if tensor.dtype is not dtype:
            raise DataError("unexpected dtype", where=name, expected=dtype, found=tensor.dtype)
    _require_backend(backend, HeadBackend, "HEAD")


def _require_backend(backend: object, kind: type[Any], name: str) -> None:
    if not isinstance(backend, kind):
        raise ConfigError(
            f"not a {kind.__name__}",
            where="backend",
            expected=f"what kernels.{name}.choose returns",
            found=repr(backend),
        )


def _require_sets(
    ids: npt.NDArray[np.int32],
    offsets: npt.NDArray[np.int64],
    labels_N: npt.NDArray[np.int64],
    group_offsets: npt.NDArray[np.int64] | None,
    vocab_size: int,
) -> None:
    """Raise DataError unless sets are ascending, distinct, of the vocabulary, with their labels."""
    sizes = _sizes(offsets, len(ids), "candidate_offsets")
    positions = np.ones_like(labels_N)
    if group_offsets is not None:
        positions = _sizes(group_offsets, len(labels_N), "group_offsets")
    if len(positions) != len(sizes):
        raise DataError(
            "one candidate set is needed for each position, or group of positions",
            where="candidate_offsets",
            expected=f"{len(positions)} sets",
            found=len(sizes),
        )
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        raise DataError(
            "a candidate is outside the vocabulary",
            where="candidate_ids",
            expected=f"ids 0 to {vocab_size - 1}",
            found=int(ids[outside][0]),
        )
    # (set, id) as one number: ascending overall exactly if ids are ascending in each set.
    sets = np.arange(len(sizes))
    keys = (np.repeat(sets, sizes) << 32) + ids
    disorder = np.flatnonzero(np.diff(keys) <= 0)
    if len(disorder):
        place = int(disorder[0])
        raise DataError(
            "ids must ascend, without a duplicate, inside each set",
            where=f"set {int(keys[place] >> 32)}",
            found=f"{int(ids[place])} before {int(ids[place + 1])}",
        )
    wanted = (np.repeat(sets, positions) << 32) + labels_N
    absent = np.flatnonzero(~np.isin(wanted, keys))
    if len(absent):
        position = int(absent[0])
        raise DataError(
            "the label is not in its candidate set",
            where=f"position {position}",
            found=f"label {int(labels_N[position])}; {len(absent)} such positions",
            fix="The candidates must come from the same corpus and positions as the labels",
        )


def _sizes(offsets: npt.NDArray[np.int64], total: int, name: str) -> npt.NDArray[np.int64]:
    sizes = np.diff(offsets)
    if offsets.ndim != 1 or not len(offsets) or (sizes < 0).any():
        raise DataError("offsets must not decrease", where=name, found=offsets.tolist()[:8])
    if int(offsets[0]) != 0 or int(offsets[-1]) != total:
        raise DataError(
            "offsets do not cover all ids or positions",
            where=name,
            expected=f"0 to {total}",
            found=f"{int(offsets[0])} to {int(offsets[-1])}",
        )
    return sizes
