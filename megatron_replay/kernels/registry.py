"""Which form of the optimizer's passes runs for a tensor: chosen by name, or the best that can.

A form asked for by name runs or is refused, never replaced. "auto" takes the compiled form of the
tensor's device, or else the plain torch form; ``why_not`` says why a form was passed over, for
the caller to print once.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_replay.errors import ConfigError
from megatron_replay.functional import momentum_step as plain


class MomentumStep(Protocol):
    """See ``__call__``."""

    def __call__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        coefficients: Tensor,
        *,
        bounded: bool,
        copies: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """As ``functional.momentum_step.momentum_step``."""
        ...


@dataclass(frozen=True, kw_only=True)
class OptimizerKernels:
    """One form of the three functions of ``functional.momentum_step``, which documents them."""

    name: str
    dot_products: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
    square_sums: Callable[[Sequence[Tensor]], Tensor]
    momentum_step: MomentumStep


#: The compiled form of each type of device.
COMPILED = {"cpu": "cpu", "cuda": "triton"}
DEVICE = {form: device for device, form in COMPILED.items()}
NAMES = ("auto", "torch", *DEVICE)


def why_not(name: str, *tensors: Tensor) -> str | None:
    """What keeps the form ``name`` from running for ``tensors``; None where nothing does."""
    if name == "torch":
        return None
    for tensor in tensors:
        if tensor.device.type != DEVICE[name]:
            return f"a tensor on {tensor.device}, where it runs on {DEVICE[name]}"
        if tensor.dtype is not torch.float32:
            return f"a tensor of {tensor.dtype}, where it takes torch.float32"
        if not tensor.is_contiguous():
            return "a tensor that is not contiguous"
    found = _load(name)
    return found if isinstance(found, str) else None


def optimizer_kernels(name: str, like: Tensor) -> OptimizerKernels:
    """The form called ``name``, or for "auto" the best one, for tensors such as ``like``.

    Raises:
        ConfigError: no such form, or it cannot run for ``like``.
    """
    if name not in NAMES:
        raise ConfigError("no such optimizer kernels", expected=", ".join(NAMES), found=repr(name))
    if name == "auto":
        best = COMPILED.get(like.device.type, "torch")
        name = "torch" if why_not(best, like) else best
    elif reason := why_not(name, like):
        raise ConfigError(
            f"the optimizer's {name} kernels cannot run",
            expected=f"contiguous float32 tensors on {DEVICE[name]}, and the kernels in place",
            found=reason,
            fix='Choose "auto" or "torch"',
        )
    kernels = _load(name)
    assert isinstance(kernels, OptimizerKernels)
    return kernels


def describe(name: str, like: Tensor) -> str:
    """What runs for tensors such as ``like``, and what keeps "auto" from better; for a log."""
    chosen = optimizer_kernels(name, like).name
    best = COMPILED.get(like.device.type)
    if chosen != "torch" or name == "torch" or best is None:
        return f"{chosen} kernels"
    return f"torch kernels, not the faster {best} ones: {why_not(best, like)}"


@functools.cache
def _load(name: str) -> OptimizerKernels | str:
    """The form, imported when first wanted, or why it cannot be."""
    try:
        module = f"{__package__}.{name}.optimizer"
        form = plain if name == "torch" else importlib.import_module(module)
    except ImportError as error:
        fix = {
            "cpu": "was not built; pip install -e . --no-build-isolation builds it",
            "triton": "needs triton",
        }
        return f"a module that {fix[name]} ({error})"
    return OptimizerKernels(
        name=name,
        dot_products=form.dot_products,
        square_sums=form.square_sums,
        momentum_step=form.momentum_step,
    )
