"""Which form of a piece of work runs for a tensor: chosen by name, or the best that can.

A form asked for by name runs or is refused with its reason, never replaced. "auto" takes the
compiled form of the tensor's device, or else the one that runs anywhere; ``describe`` says which,
and what keeps it from better, for the caller to print once.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor

from megatron_replay.errors import ConfigError
from megatron_replay.functional import momentum_step as plain
from megatron_replay.kernels.packed_attention import TORCH_ATTENTION, AttentionForm
from megatron_replay.loss.backends import HeadBackend
from megatron_replay.loss.blocks import DENSE, UNION
from megatron_replay.selection.shard_selection import TORCH_SELECTION, SelectionKernel

Form = TypeVar("Form")

#: The type of device that each compiled form runs on.
DEVICE = {"cpu": "cpu", "triton": "cuda", "ascend": "npu"}
_MISSING = {
    "cpu": "was not built; pip install -e . --no-build-isolation builds it",
    "triton": "needs triton",
    "ascend": "was not built, or finds no CANN (csrc/ascend/README.md)",
}
_FP32, _BF16, _FP16 = torch.float32, torch.bfloat16, torch.float16


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


@dataclass(frozen=True, kw_only=True, eq=False)
class Forms(Generic[Form]):
    """The forms of one piece of work.

    Attributes:
        what: the work, for messages.
        anywhere: forms that run on any tensor, by name; "auto" takes the last where no compiled
            one can run.
        compiled: dtypes that each compiled form takes, by name.
        module: of a compiled form, inside ``kernels/<name>/``.
        bind: makes the form out of its name and module.
        contiguous: whether compiled forms want contiguous tensors.
    """

    what: str
    anywhere: Mapping[str, Form]
    compiled: Mapping[str, tuple[torch.dtype, ...]]
    module: str
    bind: Callable[[str, Any], Form]
    contiguous: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """What may be asked for."""
        return ("auto", *self.anywhere, *self.compiled)

    def resolve(self, name: str, like: Tensor) -> str:
        """``name``, or for "auto" that of the best form that can run for tensors such as ``like``.

        Raises:
            ConfigError: no such form, or it cannot run for ``like``.
        """
        if name not in self.names:
            raise ConfigError(
                f"no such form of {self.what}", expected=", ".join(self.names), found=repr(name)
            )
        if name == "auto":
            best = self.best(like)
            if best is None or self.why_not(best, like):
                return list(self.anywhere)[-1]
            return best
        if reason := self.why_not(name, like):
            raise ConfigError(
                f"{self.what}: the {name} form cannot run",
                expected=f"tensors of {self._dtypes(name)} on {DEVICE[name]}, and compiled kernels",
                found=reason,
                fix="Choose auto, or " + " or ".join(self.anywhere),
            )
        return name

    def choose(self, name: str, like: Tensor) -> Form:
        """The form that ``resolve`` names."""
        name = self.resolve(name, like)
        if name in self.anywhere:
            return self.anywhere[name]
        form = _load(self, name)
        assert not isinstance(form, str)
        return cast(Form, form)

    def why_not(self, name: str, *tensors: Tensor) -> str | None:
        """What keeps the form ``name`` from running for ``tensors``; None where nothing does."""
        if name in self.anywhere:
            return None
        for tensor in tensors:
            if tensor.device.type != DEVICE[name]:
                return f"a tensor on {tensor.device}, where it runs on {DEVICE[name]}"
            if tensor.dtype not in self.compiled[name]:
                return f"a tensor of {tensor.dtype}, where it takes {self._dtypes(name)}"
            if self.contiguous and not tensor.is_contiguous():
                return "a tensor that is not contiguous"
        form = _load(self, name)
        return form if isinstance(form, str) else None

    def describe(self, name: str, like: Tensor) -> str:
        """What runs for tensors such as ``like``, and what keeps "auto" from better; for a log."""
        chosen, best = self.resolve(name, like), self.best(like)
        if name != "auto" or best in (None, chosen):
            return f"{chosen} kernels"
        assert best is not None
        return f"{chosen} kernels, not the faster {best} ones: {self.why_not(best, like)}"

    def best(self, like: Tensor) -> str | None:
        """Name of the compiled form for the device of ``like``, whether it can run or not."""
        on_device = (name for name in self.compiled if DEVICE[name] == like.device.type)
        return next(on_device, None)

    def _dtypes(self, name: str) -> str:
        return " or ".join(map(str, self.compiled[name]))


@functools.cache
def _load(forms: Forms[Form], name: str) -> Form | str:
    """The form, imported when first wanted, or why it cannot be."""
    try:
        return forms.bind(name, importlib.import_module(f"{__package__}.{name}.{forms.module}"))
    except ImportError as error:
        return f"a module that {_MISSING[name]} ({error})"
    except ConfigError as error:
        return str(error)


def _optimizer_kernels(name: str, module: Any) -> OptimizerKernels:
    return OptimizerKernels(
        name=name,
        dot_products=module.dot_products,
        square_sums=module.square_sums,
        momentum_step=module.momentum_step,
    )


#: The two passes of an optimizer's step.
OPTIMIZER = Forms[OptimizerKernels](
    what="the optimizer's passes",
    anywhere={"torch": _optimizer_kernels("torch", plain)},
    compiled={"cpu": (_FP32,), "triton": (_FP32,)},
    module="optimizer",
    bind=_optimizer_kernels,
    contiguous=True,
)
#: The restricted head; "torch" is its definition, at the cost of the full softmax.
HEAD = Forms[HeadBackend](
    what="the restricted head",
    anywhere={"torch": DENSE, "union": UNION},
    compiled={
        "cpu": (_FP32, _BF16),
        "triton": (_FP32, _BF16, _FP16),
        "ascend": (_FP32, _BF16, _FP16),
    },
    module="head",
    bind=lambda _, module: module.BACKEND,
)
#: Candidate selection in Stage 0.
SELECTION = Forms[SelectionKernel](
    what="candidate selection",
    anywhere={"torch": TORCH_SELECTION},
    compiled={"cpu": (_FP32, _BF16, _FP16), "triton": (_FP32, _BF16, _FP16)},
    module="selection",
    bind=lambda _, module: module.selection,
)
#: Attention inside documents.
ATTENTION = Forms[AttentionForm](
    what="attention",
    anywhere={"torch": TORCH_ATTENTION},
    compiled={"ascend": (_FP32, _BF16, _FP16)},
    module="attention",
    bind=lambda _, module: module.attention,
)
