"""``torch.npu``: every name and signature recorded from the wheel, few of them with a body.

A call with other arguments than the wheel's function takes is a TypeError; a name that no recorded
release has is an AttributeError; one that has no body here says so.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import torch_npu

RECORD = json.loads((Path(__file__).parents[3] / "signatures.json").read_text())
_SIGNATURES = {
    name: found[torch_npu.__version__]
    for name, found in RECORD["signatures"].items()
    if torch_npu.__version__ in found
}
__all__ = sorted(name for name in _SIGNATURES if "." not in name)
#: How often each was called, by name.
calls: dict[str, int] = {}
device_was_set = False
default_generators = (torch.default_generator,)


def _signature(text: str) -> inspect.Signature:
    return inspect.signature(eval(f"lambda {text[1:-1]}: None"))


def _set_device(device: Any) -> None:
    global device_was_set
    device_was_set = True
    index = device if isinstance(device, int) else torch.device(device).index
    if not 0 <= index < _device_count():
        raise RuntimeError(f"invalid device {device}")
    bodies["current_device"] = lambda: index


def _device_count() -> int:
    return 8


class _Stream:
    """The one stream there is."""

    npu_stream = 0x5EA

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None: ...

    def _nothing(self, *_: Any, **__: Any) -> None: ...

    wait_stream = wait_event = record_event = synchronize = record = wait = _nothing

    def query(self) -> bool:
        return True


class _Device(contextlib.nullcontext):
    def __init__(self, device: Any) -> None:
        super().__init__()


#: Of the recorded names, those that do something.
bodies: dict[str, Callable[..., Any]] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "is_bf16_supported": lambda including_emulation=False: True,
    "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
    "device_count": _device_count,
    "set_device": _set_device,
    "current_device": lambda: 0,
    "synchronize": lambda device=None: None,
    "empty_cache": lambda: None,
    "current_stream": lambda device=None: _Stream(),
    "default_stream": lambda device=None: _Stream(),
    "stream": lambda stream: contextlib.nullcontext(),
    "manual_seed": lambda seed: torch.default_generator.manual_seed(seed) and None,
    "get_rng_state": lambda device="npu": torch.default_generator.get_state(),
    "set_rng_state": lambda new_state, device="npu": torch.default_generator.set_state(new_state),
    "max_memory_allocated": lambda device=None: 1 << 30,
    "memory_allocated": lambda device=None: 1 << 29,
    "memory_reserved": lambda device=None: 1 << 30,
    "reset_peak_memory_stats": lambda device=None: None,
    "memory_stats": lambda device=None: {},
}
_CLASSES = {"Stream": _Stream, "Event": _Stream, "device": _Device}


def _checked(name: str, text: str | None) -> Callable[..., Any]:
    signature = None if text is None else _signature(text)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[name] = calls.get(name, 0) + 1
        if signature is not None:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                found = f"torch_npu {torch_npu.__version__} has torch.npu.{name}{text}"
                raise TypeError(f"{found}: {error}") from None
        if name not in bodies:
            raise NotImplementedError(f"torch.npu.{name} has no body in tests/npu_stub")
        return bodies[name](*args, **kwargs)

    call.__name__ = call.__qualname__ = name
    return call


for _name in __all__:
    _text = _SIGNATURES[_name]
    if _text == "class":
        _made: Any = _CLASSES.get(_name, type(_name, (), {}))
    else:
        _made = _checked(_name, _text)
    globals()[_name] = _made


def __getattr__(name: str) -> Any:
    raise AttributeError(f"torch_npu {torch_npu.__version__} has no torch.npu.{name}")
