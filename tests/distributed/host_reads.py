"""Counts what makes the host wait for the device within a training step, and where it is called.

A CPU waits for nothing; what would make it wait on a device is known by name: methods of a tensor
that hand its numbers to Python, operators whose result has a size that depends on the numbers, and
tensors made of Python's numbers, which are copied from memory that is not pinned.
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
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[2]
READING = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
COPYING = ("tensor", "as_tensor")
SIZED_BY_VALUES = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::bincount",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
}


def caller() -> str:
    """File and function of the innermost frame of the package or of megatron-core."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_qualname
        if file.startswith(f"{ROOT}/megatron_replay/"):
            return f"{Path(file).relative_to(ROOT / 'megatron_replay')} {name}"
        if "/megatron/core/" in file:
            return f"megatron/core/{file.rpartition('/megatron/core/')[2]} {name}"
        frame = frame.f_back
    return "elsewhere"


class _Operators(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = function._schema.name, kwargs or {}
        if _waits(name, args, kwargs):
            self._found[f"{name} in {caller()}"] += 1
        return function(*args, **kwargs)


def _waits(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name == "aten::repeat_interleave":
        return kwargs.get("output_size") is None
    if name in ("aten::index", "aten::index_put", "aten::index_put_"):
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return name in SIZED_BY_VALUES


@contextlib.contextmanager
def counted(on_host: Callable[[torch.Tensor], bool] = lambda _: False) -> Iterator[Counter[str]]:
    """How often each (what, where) happens in the block; ``on_host`` tensors may be read."""
    found: Counter[str] = Counter()
    thread = threading.get_ident()

    def recorded(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            here = threading.get_ident() == thread  # the loader's may read what it likes
            if here and (name in COPYING or not on_host(args[0])):
                found[f"{name} in {caller()}"] += 1
            with mock.patch.object(_Operators, "__torch_dispatch__", _let_through):
                return original(*args, **kwargs)

        return call

    with contextlib.ExitStack() as patches:
        for owner, names in ((torch.Tensor, READING), (torch, COPYING)):
            for name in names:
                call = recorded(name, getattr(owner, name))
                patches.enter_context(mock.patch.object(owner, name, call))
        patches.enter_context(_Operators(found))
        yield found


def _let_through(
    self: Any, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
) -> Any:
    return function(*args, **kwargs or {})
