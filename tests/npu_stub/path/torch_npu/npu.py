"""``torch.npu``: what megatron-core and this project call of it, with torch_npu's own parameters.

tests/npu_stub/check_wheels.py compares these definitions with wheels of torch_npu. A call with
other arguments is a TypeError; any other name is torch.cuda's, which fails without a GPU.
"""

from __future__ import annotations

import contextlib

import torch

default_generators = (torch.default_generator,)
_current: int | None = None


class Stream:
    """The one stream there is."""

    npu_stream = 0x5EA

    def wait_stream(self, stream): ...

    def synchronize(self): ...


class device(contextlib.nullcontext):  # noqa: N801 - torch_npu's name
    def __init__(self, device):
        super().__init__()


def is_available():
    return True


def device_count():
    return 8


def set_device(device):
    global _current
    index = device if isinstance(device, int) else torch.device(device).index
    if not 0 <= index < device_count():
        raise RuntimeError(f"invalid device {device}")
    _current = index


def current_device():
    return _current or 0


def device_was_set() -> bool:
    return _current is not None


def synchronize(device=None): ...


def current_stream(device=None):
    return Stream()


def get_amp_supported_dtype():
    return [torch.float16, torch.bfloat16]


def manual_seed(seed):
    torch.default_generator.manual_seed(seed)


def get_rng_state(device="npu"):
    return torch.default_generator.get_state()


def set_rng_state(new_state, device="npu"):
    torch.default_generator.set_state(new_state)


def max_memory_allocated(device=None):
    return 1 << 30


OURS = ("device_was_set",)  # not torch_npu's
NAMES = [name for name, value in globals().items() if callable(value) and name not in OURS]
