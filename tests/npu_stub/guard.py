"""Records which tensors would be on an NPU, and which operators an NPU would refuse for them.

All tensors are on the CPU. A function mode replaces the devices "npu" and "cuda" by the CPU, marks
the storage, and reports "npu:0" as the device of marked tensors. A dispatch mode passes the mark
from the operands of every operator to its results, in backward too, and checks operators and
collectives against tests.npu_stub.rules. It sees nothing that happens within a C++ operator.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tests.npu_stub import rules

ROOT = Path(__file__).parents[2]
#: Copies, which take operands from two devices.
MOVES = {"aten::copy_", "aten::_to_copy", "aten::_copy_from"}
_DEVICES = ("npu", "cuda")
#: Properties of tensors on the NPU.
_ANSWERS = {
    "device": torch.device("privateuseone", 0), "is_cuda": True, "is_npu": True, "is_cpu": False,
}  # fmt: skip
_KEYWORDS = ("device", "map_location")
_OBJECTS = ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list")
#: Functions that take a device and make no tensor.
_NAMING = ("device", "_parse_to")


def on_npu(tensor: Tensor) -> bool:
    """Whether the tensor would be on an NPU."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
        return False
    return getattr(torch._C.TensorBase.untyped_storage(tensor), "npu", False)


def mark(tensor: Tensor, npu: bool = True) -> None:
    """Place the tensor, and all that share its storage, on the NPU or on the host."""
    torch._C.TensorBase.untyped_storage(tensor).npu = npu  # type: ignore[attr-defined]


def caller() -> str:
    """File and function of the innermost frame of this package or of megatron-core.

    Adds torch's function in between, where it is one that sends objects.
    """
    frame, way = sys._getframe(1), ""
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_qualname
        if name in _OBJECTS:
            way = f" by {name}"
        if file.startswith(f"{ROOT}/megatron_replay/"):
            return f"{Path(file).relative_to(ROOT)} {name}{way}"
        if "/megatron/core/" in file:
            return f"megatron/core/{file.rpartition('/megatron/core/')[2]} {name}{way}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


class Guard:
    """``with guard:`` around what runs as if on an NPU, new threads and backward included.

    Attributes:
        found: how often each (rule, place) was broken.
    """

    def __init__(self) -> None:
        self.found: Counter[tuple[str, str]] = Counter()
        self._stack = contextlib.ExitStack()

    def _add(self, rule: str) -> None:
        self.found[rule, caller()] += 1

    def __enter__(self) -> Guard:
        run, backward = threading.Thread.run, torch.autograd._engine_run_backward

        def guarded_thread(thread: threading.Thread) -> None:
            with _Devices(self._add), _Operators(self._add):
                run(thread)

        def guarded_backward(*args: Any, **kwargs: Any) -> Any:
            with _Devices(self._add):  # torch calls it with function modes off
                return backward(*args, **kwargs)

        for owner, name, value in (
            (threading.Thread, "run", guarded_thread),
            (torch.autograd, "_engine_run_backward", guarded_backward),
        ):
            self._stack.enter_context(mock.patch.object(owner, name, value))
        self._stack.enter_context(_Devices(self._add))
        self._stack.enter_context(_Operators(self._add))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()


def _named_device(value: Any, *, keyword: bool = False) -> str | None:
    """The kind of device an argument names; None if it names none."""
    if isinstance(value, torch.device):
        return value.type
    if isinstance(value, str) and value.partition(":")[0] in (*_DEVICES, "cpu", "meta"):
        return value.partition(":")[0]
    return "npu" if keyword and isinstance(value, int) else None


class _Devices(TorchFunctionMode):
    def __init__(self, add: Callable[[str], None]) -> None:
        super().__init__()
        self._add = add

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if name in _NAMING:
            return function(*args, **kwargs)
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is not None and on_npu(first):
            owner = getattr(getattr(function, "__self__", None), "__name__", "")
            if name == "__get__" and owner in _ANSWERS:
                return _ANSWERS[owner]
            if name == "type" and len(args) == 1 and not kwargs:
                return function(*args).replace("torch.", "torch.npu.")
            if name in ("numpy", "__array__", "pin_memory"):
                self._add(f"{name}() of a tensor on the device")
        if name == "pin_memory":
            return first
        if name == "is_pinned":
            return False
        kwargs.pop("pin_memory", None)
        if name in ("__getitem__", "__setitem__") and isinstance(args[1], list):
            index = torch.tensor(args[1], dtype=torch.int64)  # torch makes it where the tensor is
            mark(index, on_npu(args[0]))
            args = (args[0], index, *args[2:])
        if found := rules.of_function(name, args):
            self._add(found)
        return self._moved(function, name, first, args, kwargs)

    def _moved(
        self, function: Any, name: str, first: Tensor | None, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """Calls the function with "cpu" for every device, and marks the result."""
        kinds = [_named_device(kwargs.get(word), keyword=True) for word in _KEYWORDS]
        kinds += [_named_device(x) for x in (args[1:] if first is not None else args)]
        wanted = next(filter(None, kinds), None)
        if name == "cpu":
            wanted = "cpu"
        if wanted in _DEVICES:
            kwargs = {k: "cpu" if k in _KEYWORDS else x for k, x in kwargs.items()}
            args = tuple("cpu" if _named_device(x) in _DEVICES else x for x in args)
        result = function(*args, **kwargs)
        if name == "new_tensor" and wanted is None and first is not None:
            mark(result, on_npu(first))
        if wanted in (*_DEVICES, "cpu") and isinstance(result, Tensor):
            npu = wanted in _DEVICES
            if first is not None and on_npu(first) is not npu and _shares(result, first):
                result = torch.clone(result)  # on a CPU, to() copies nothing
            mark(result, npu)
        return result


def _shares(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


class _Operators(TorchDispatchMode):
    def __init__(self, add: Callable[[str], None]) -> None:
        super().__init__()
        self._add = add

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name
        operands = [x for x in _tensors((args, kwargs)) if x.layout is torch.strided]
        there = [x for x in operands if on_npu(x)]
        if there:
            if found := rules.of_operator(name, args, kwargs):
                self._add(found)
            if name not in MOVES and any(x.dim() and not on_npu(x) for x in operands):
                self._add(f"{name} of tensors on the device and on the host")
        elif name.startswith("c10d::") and not name.endswith("barrier"):
            self._add(f"{name} of tensors on the host")
        before = {x.untyped_storage()._cdata for x in operands}
        result = function(*args, **kwargs)
        if there:
            for x in _tensors(result):
                if x.layout is torch.strided and x.untyped_storage()._cdata not in before:
                    mark(x)
        return result
