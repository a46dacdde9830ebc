"""The parts of a layer between its matrix products and attention: norm, activation and rotation.

    rms_norm(x, w, eps) = x / sqrt(mean(x^2) + eps) * w
    swiglu([a, b])      = silu(a) * b
    rotate([x1, x2])    = [x1 cos - x2 sin, x2 cos + x1 sin]

The gate ``a`` comes first, as in the rows of megatron-core's ``linear_fc1``. Channels i and
i + D / 2 rotate together, as in Hugging Face's models.

Shapes: T rows of a micro-batch, N heads, D channels of a head, F channels of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


class Rotation(NamedTuple):
    """cos and sin of each row's angles, [T, 1, 1, D]; equal in both halves of the channels."""

    cos: Tensor
    sin: Tensor

    @staticmethod
    def of(angles_TC: Tensor, dtype: torch.dtype) -> Rotation:
        """Of the angles of C = D / 2 pairs of channels, in radians."""
        angles_T11D = torch.cat([angles_TC, angles_TC], dim=-1)[:, None, None]
        return Rotation(angles_T11D.cos().to(dtype), angles_T11D.sin().to(dtype))

    def at(self, rows_R: Tensor) -> Rotation:
        """Of some of the rows."""
        return Rotation(self.cos[rows_R], self.sin[rows_R])


@dataclass(frozen=True)
class LayerBackend:
    """Differentiable functions that a device runs.

    Attributes:
        rms_norm: (x [..., D], weight [D], eps) -> [..., D].
        swiglu: x [..., 2 F] -> [..., F].
        rotate: (x [T, 1, N, D], rotation) -> [T, 1, N, D].
    """

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    swiglu: Callable[[Tensor], Tensor]
    rotate: Callable[[Tensor, Rotation], Tensor]


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _swiglu(x: Tensor) -> Tensor:
    gate, linear = x.chunk(2, dim=-1)
    return F.silu(gate) * linear


def _rotate(x_T1ND: Tensor, rotation: Rotation) -> Tensor:
    first, second = x_T1ND.chunk(2, dim=-1)
    return x_T1ND * rotation.cos + torch.cat([-second, first], dim=-1) * rotation.sin


#: Runs on any device.
TORCH_LAYERS = LayerBackend(_rms_norm, _swiglu, _rotate)
