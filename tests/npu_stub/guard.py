"""Keeps account of which tensors would lie on an NPU, and of what an NPU would not do with them.

All of them are on the CPU. A function mode sends whatever asks for "npu" or "cuda" to the CPU,
marks the storage, and answers for marked tensors when asked for their device; a dispatch mode
carries the mark from the operands of every operator, in backward too, to its results, and holds
operators and collectives against the rules. Not seen: anything that happens within a C++ operator.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from tests.npu_stub import rules

ROOT = Path(__file__).parents[2]
#: Both take operands from two devices: they are how data moves.
MOVES = {"aten::copy_", "aten::_to_copy", "aten::_copy_from"}
_DEVICES = ("npu", "cuda")
_KEYWORDS = ("device", "map_location")
_OBJECTS = ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list")
#: These speak of devices and make no tensor.
_NAMING = ("device", "_parse_to")


def on_npu(tensor: Tensor) -> bool:
    """Whether it would lie on an NPU."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
        return False
    return getattr(torch._C.TensorBase.untyped_storage(tensor), "npu", False)


def mark(tensor: Tensor, npu: bool = True) -> None:
    """Let it lie on the NPU, or on the host, with all that shares its storage."""
    torch._C.TensorBase.untyped_storage(tensor).npu = npu  # type: ignore[attr-defined]


def caller() -> str:
    """File and function of the innermost frame of this project's package or of megatron-core.

    And torch's function in between, where it is one that sends objects.
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
    """``with guard:`` around what is to run as if on an NPU; then read ``found``.

    Attributes:
        found: how often each (rule, place) was broken.
    """

    def __init__(self) -> None:
        self.found: Counter[tuple[str, str]] = Counter()
        self._modes = (_Devices(self._add), _Operators(self._add))

    @contextlib.contextmanager
    def everywhere(self) -> Iterator[Guard]:
        """``with guard.everywhere():`` also guards threads started meanwhile, and backward."""
        run, backward = threading.Thread.run, torch.autograd._engine_run_backward

        def guarded_thread(thread: threading.Thread) -> None:
            with _Devices(self._add), _Operators(self._add):
                run(thread)

        def guarded_backward(*args: Any, **kwargs: Any) -> Any:
            with _Devices(self._add):  # torch calls it with function modes off
                return backward(*args, **kwargs)

        threading.Thread.run = guarded_thread  # type: ignore[method-assign]
        torch.autograd._engine_run_backward = guarded_backward
        try:
            with self:
                yield self
        finally:
            threading.Thread.run = run  # type: ignore[method-assign]
            torch.autograd._engine_run_backward = backward

    def _add(self, rule: str) -> None:
        self.found[rule, caller()] += 1

    def __enter__(self) -> Guard:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


def _asks_for(value: Any, *, keyword: bool = False) -> str | None:
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
            if name == "__get__" and owner == "device":
                return torch.device("npu", 0)
            if name == "__get__" and owner in ("is_cuda", "is_npu"):
                return True
            if name == "__get__" and owner == "is_cpu":
                return False
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
        """Call with "cpu" for every device, and mark the result."""
        named = [kwargs[word] for word in _KEYWORDS if kwargs.get(word) is not None]
        wanted = next((kind for x in named if (kind := _asks_for(x, keyword=True))), None)
        positional = args[1:] if first is not None else args
        wanted = wanted or next((kind for x in positional if (kind := _asks_for(x))), None)
        if name == "cpu":
            wanted = "cpu"
        if wanted in _DEVICES:
            kwargs = {k: "cpu" if k in _KEYWORDS else x for k, x in kwargs.items()}
            args = tuple("cpu" if _asks_for(x) in _DEVICES else x for x in args)
        result = function(*args, **kwargs)
        if name == "new_tensor" and wanted is None and first is not None:
            mark(result, on_npu(first))
        if wanted in (*_DEVICES, "cpu") and isinstance(result, Tensor):
            npu = wanted in _DEVICES
            if first is not None and on_npu(first) is not npu and _shares(result, first):
                result = torch.clone(result)  # the move that a CPU has no need of
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


__all__ = ["Guard", "mark", "on_npu", "tree_map"]
