"""Norm, activation and rotation on Ascend NPUs, by torch_npu's fused operators: as in ``layers``.

The norm keeps its input and 1 / sqrt(mean(x^2) + eps) for backward, the activation its input, the
rotation nothing but the angles, which all layers share. The calls are those of MindSpeed, except
that a rotation's gradient is rotated back, so that its input need not be kept.

Compared with stand-ins for the operators (tests/kernels/test_layers.py); not run on an NPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch_npu import npu_rms_norm, npu_rotary_mul, npu_swiglu

from megatron_replay.kernels.layers import LayerBackend, Rotation


class _Rotate(torch.autograd.Function):
    """Layout SBND, with T rows as S; the operator takes up to 999 heads of an even D below 896."""

    @staticmethod
    def forward(ctx: Any, x_T1ND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        rotated: Tensor = npu_rotary_mul(x_T1ND, cos, sin)
        return rotated

    @staticmethod
    def backward(ctx: Any, grad_T1ND: Tensor) -> tuple[Tensor, None, None]:
        """By the opposite angle: a rotation's transpose is its inverse."""
        cos, sin = ctx.saved_tensors
        return npu_rotary_mul(grad_T1ND, cos, -sin), None, None


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    normed: Tensor = npu_rms_norm(x, weight, epsilon=eps)[0]
    return normed


def _swiglu(x: Tensor) -> Tensor:
    activated: Tensor = npu_swiglu(x, dim=-1)
    return activated


def _rotate(x_T1ND: Tensor, rotation: Rotation) -> Tensor:
    rotated: Tensor = _Rotate.apply(x_T1ND, *rotation)  # type: ignore[no-untyped-call]
    return rotated


def backend() -> LayerBackend:
    """The layers of NPUs."""
    return LayerBackend(_rms_norm, _swiglu, _rotate)
