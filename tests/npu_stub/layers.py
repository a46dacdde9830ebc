"""Stand-ins for ``torch_npu.npu_rms_norm``, ``npu_swiglu`` and ``npu_rotary_mul``.

Written from torch_npu's documentation of the operators (``_op_plugin_docs.py`` in its wheels) and
CANN's of those behind them (aclnnRmsNorm, aclnnSwiGlu, aclnnRotaryPositionEmbedding). Of the
rotation: layout SBND with angles S11D, mode "half".
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu
from torch.utils._python_dispatch import _disable_current_modes

from tests.npu_stub.guard import mark, on_npu
from tests.npu_stub.stand_in import DTYPES, Float64, require, stand_in

SCHEMAS = (
    "npu_rms_norm(Tensor self, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)",
    "npu_swiglu(Tensor self, int dim=-1) -> Tensor",
    "npu_rotary_mul(Tensor self, Tensor r1, Tensor r2, str rotary_mode='half',"
    " Tensor? rotate=None) -> Tensor",
)


def _rms_norm(**given: Any) -> tuple[Tensor, Tensor]:
    x, gamma, epsilon = given["self"], given["gamma"], given["epsilon"]
    _require = partial(require, name="npu_rms_norm")
    with _disable_current_modes():
        _require(x.dtype is gamma.dtype and x.dtype in DTYPES, f"{x.dtype}, {gamma.dtype}")
        _require(2 <= x.dim() <= 8 and gamma.numel() > 0, "2 to 8 dimensions")
        _require(gamma.dim() < x.dim(), "no dimension before those of gamma")
        _require(gamma.shape == x.shape[-gamma.dim() :], "gamma is not of the last dimensions")
    dims = tuple(range(-gamma.dim(), 0))

    def rstd(x: Tensor) -> Tensor:
        return (x.square().mean(dims, keepdim=True) + epsilon).rsqrt()

    with _disable_current_modes(), torch.no_grad():
        kept = rstd(x.double()).float()
        mark(kept, on_npu(x))
    return Float64.apply("npu_rms_norm", lambda x, w: x * rstd(x) * w, x, gamma), kept


def _swiglu(**given: Any) -> Tensor:
    x, dim = given["self"], given["dim"]
    _require = partial(require, name="npu_swiglu")
    with _disable_current_modes():
        _require(x.dtype in DTYPES and 1 <= x.dim() <= 8, f"{x.dtype} {x.shape}")
        _require(x.shape[dim] % 2 == 0, "an odd size")

    def formula(x: Tensor) -> Tensor:
        gate, linear = x.chunk(2, dim)
        return silu(gate) * linear

    return Float64.apply("npu_swiglu", formula, x)


def _rotary_mul(**given: Any) -> Tensor:
    x, cos, sin = (given[name] for name in ("self", "r1", "r2"))
    _require = partial(require, name="npu_rotary_mul")
    with _disable_current_modes():
        _require(given["rotary_mode"] == "half" and given["rotate"] is None, "not here")
        _require(x.dtype is cos.dtype is sin.dtype and x.dtype in DTYPES, "dtypes")
        _require(x.dim() == 4, "four dimensions")
        S, B, N, D = x.shape
        _require(B < 1000 and N < 1000 and D < 896 and D % 2 == 0, f"{x.shape}")
        _require(cos.shape == sin.shape == (S, 1, 1, D), "angles that are not S11D")
        _require(not (cos.requires_grad or sin.requires_grad), "gradients of angles")
        if S:
            _require(max(float(y.abs().max()) for y in (cos, sin)) <= 1, "not cosines")

    def formula(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return cos * x + sin * torch.cat([-second, first], -1)

    return Float64.apply("npu_rotary_mul", formula, x, cos, sin)


npu_rms_norm = stand_in(SCHEMAS[0], _rms_norm)
npu_swiglu = stand_in(SCHEMAS[1], _swiglu)
npu_rotary_mul = stand_in(SCHEMAS[2], _rotary_mul)
