"""The restricted head compiled for the CPU (csrc/cpu): SIMD, threads, and no dense logits.

fp32 or bf16 operands, fp32 sums. A result has the same bits for any number of threads, which is
``torch.get_num_threads()``. Importing this fails where the module was not built.

Shapes: N positions, V rows of the shard, H hidden channels, P pairs, U distinct candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_replay.kernels import HEAD, _cpu
from megatron_replay.loss.backends import HeadBackend, Partials, ShardHead, Softmax
from megatron_replay.loss.blocks import union_head
from megatron_replay.loss.candidate_sets import CandidateSets


class CpuHead:
    """A ``ShardHead`` of position scope.

    Memory: 20 bytes a pair between forward and backward, 8 more while it runs; besides, 512
    bytes a position in forward, 256 a position and 256 a distinct candidate in backward. Operands
    whose channels are not consecutive are copied.
    """

    def __init__(self, sets: CandidateSets) -> None:
        assert sets.group_offsets is None
        ids, offsets = sets.ids.contiguous(), sets.offsets.contiguous()
        labels_N = sets.label_rows_N.contiguous()
        assert ids.dtype == torch.int32
        assert offsets.dtype == labels_N.dtype == torch.int64
        assert len(offsets) == len(labels_N) + 1
        assert int(offsets[-1]) == len(ids)
        # The compiled code reads what the ids name.
        if len(ids):
            low, high = ids.aminmax()
            assert int(low) >= 0
            assert int(high) < sets.num_rows
        self._head = _cpu.RestrictedHead(
            ids.data_ptr(),
            offsets.data_ptr(),
            labels_N.data_ptr(),
            len(labels_N),
            sets.num_rows,
            torch.get_num_threads(),
        )
        self._shape = len(labels_N), sets.num_rows

    def forward(self, hidden_NH: Tensor, weight_VH: Tensor) -> Partials:
        """As in ``ShardHead``. Raises ConfigError: as ``HEAD.resolve``."""
        hidden_NH, weight_VH = self._checked(hidden_NH, weight_VH)
        max_N, sum_N, label_logit_N = torch.empty(3, len(hidden_NH), dtype=torch.float32)
        self._head.forward(
            _operand(hidden_NH),
            _operand(weight_VH),
            hidden_NH.shape[1],
            max_N.data_ptr(),
            sum_N.data_ptr(),
            label_logit_N.data_ptr(),
            torch.get_num_threads(),
        )
        return Partials(max_N, sum_N, label_logit_N)

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
        """As in ``ShardHead``. A ``weight_grad_out`` whose channels are not consecutive is copied,
        and copied back.
        """
        hidden_NH, weight_VH = self._checked(hidden_NH, weight_VH)
        top_N, total_N, grad_N = (t.float().contiguous() for t in (*softmax, grad_N))
        dH_NH = torch.empty(hidden_NH.shape, dtype=torch.float32) if hidden_grad else None
        dW_VH = None if weight_grad_out is None else _with_rows(weight_grad_out)
        assert dW_VH is None or (dW_VH.dtype is torch.float32 and dW_VH.shape == weight_VH.shape)
        self._head.backward(
            _operand(hidden_NH),
            _operand(weight_VH),
            hidden_NH.shape[1],
            top_N.data_ptr(),
            total_N.data_ptr(),
            grad_N.data_ptr(),
            0 if dH_NH is None else dH_NH.data_ptr(),
            0 if dW_VH is None else dW_VH.data_ptr(),
            0 if dW_VH is None else dW_VH.stride(0),
            torch.get_num_threads(),
        )
        if weight_grad_out is not None and dW_VH is not weight_grad_out:
            assert dW_VH is not None
            weight_grad_out.copy_(dW_VH)
        return dH_NH

    def _checked(self, hidden_NH: Tensor, weight_VH: Tensor) -> tuple[Tensor, Tensor]:
        """The operands as the compiled code reads them; it checks nothing itself."""
        for operand in (hidden_NH, weight_VH):
            HEAD.resolve("cpu", operand)
        assert (len(hidden_NH), len(weight_VH)) == self._shape
        assert hidden_NH.shape[1] == weight_VH.shape[1]
        return _with_rows(hidden_NH.detach()), _with_rows(weight_VH.detach())


def backend() -> HeadBackend:
    """The head of CPUs."""
    return HeadBackend(_bind)


def _bind(sets: CandidateSets) -> ShardHead:
    """Shared sets use every product of a block: torch's matrix product does them as fast."""
    return CpuHead(sets) if sets.group_offsets is None else union_head(sets)


def _with_rows(matrix: Tensor) -> Tensor:
    """``matrix``, or a copy whose rows are consecutive numbers."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _operand(matrix: Tensor) -> tuple[int, int, bool]:
    return matrix.data_ptr(), matrix.stride(0), matrix.dtype is torch.bfloat16
