"""What the stand-ins for operators of torch_npu share.

A wheel's own schema is registered, so torch itself refuses an argument of another name or type;
what the operator's documentation rules out is a RuntimeError. Computes in float64.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tests.npu_stub.guard import mark, on_npu

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
#: Calls of each operator.
calls: Counter[str] = Counter()
#: Operators whose documentation allows no strided tensors.
CONTIGUOUS = ("npu_swiglu",)
_library = torch.library.Library("npu", "FRAGMENT")


def stand_in(schema: str, compute: Callable[..., Any]) -> Callable[..., Any]:
    """The operator of ``schema``; ``compute`` takes all of its arguments by keyword."""
    name = schema.partition("(")[0]
    _library.define(schema)
    operator = getattr(torch.ops.npu, name)
    arguments = operator.default._schema.arguments

    def with_defaults(*values: Any) -> Any:
        # torch leaves out the arguments behind the last that is not its default.
        given = {x.name: x.default_value for x in arguments}
        return compute(**given | dict(zip(given, values, strict=False)))

    _library.impl(name, with_defaults, "CompositeImplicitAutograd")

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return operator(*args, **kwargs)

    return counted


def require(fulfilled: bool, what: str, *, name: str) -> None:
    """Raise as the operator ``name`` would."""
    if not fulfilled:
        raise RuntimeError(f"{name}: {what}")


class Float64(torch.autograd.Function):
    """``formula`` of tensors in float64: one operator for the guard, which sees no step inside."""

    @staticmethod
    def forward(ctx: Any, name: str, formula: Callable[..., Tensor], *operands: Tensor) -> Tensor:
        """In the dtype of the first operand."""
        _check_strides(name, operands)
        ctx.save_for_backward(*operands)
        ctx.name, ctx.formula = name, formula
        with _disable_current_modes():
            out = formula(*(x.double() for x in operands)).to(operands[0].dtype)
            mark(out, on_npu(operands[0]))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """That of each operand that needs one, in the dtype of the first operand."""
        _check_strides(ctx.name, [grad])
        with _disable_current_modes(), torch.enable_grad():
            leaves = [x.detach().double().requires_grad_() for x in ctx.saved_tensors]
            grads = torch.autograd.grad(ctx.formula(*leaves), leaves, grad.double())
            made = [x.to(grad.dtype).contiguous() for x in grads]
            for x in made:
                mark(x, on_npu(grad))
        return None, None, *made


def _check_strides(name: str, tensors: Any) -> None:
    if name in CONTIGUOUS:
        is_contiguous = all(x.is_contiguous() for x in tensors)
        require(is_contiguous, "a tensor that is not contiguous", name=name)
