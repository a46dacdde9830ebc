"""The only place with code for cpu, cuda or npu: device, collectives, megatron-core patches.

``select("auto").prepare()`` must come before the first import of ``megatron``: it makes
megatron-core run on the platform. Elsewhere the project uses ``platform.device``.
"""

from __future__ import annotations

from megatron_replay.errors import ConfigError
from megatron_replay.platform.devices import CPU, CUDA, NPU, Platform

__all__ = ["PLATFORMS", "Platform", "kind_of", "select"]

#: In the order in which "auto" tries them.
PLATFORMS: tuple[type[Platform], ...] = (NPU, CUDA, CPU)


def select(name: str = "auto") -> Platform:
    """The platform called ``name``, or for "auto" the first one this machine has.

    Raises:
        ConfigError: no such platform, or this machine does not have it. A platform chosen by name
            is never replaced by another.
    """
    platform = kind_of(name)
    if not platform.available():
        raise ConfigError(
            f"this machine has no usable {name} device", where="--platform", fix=platform.__doc__
        )
    return platform()


def kind_of(name: str) -> type[Platform]:
    """The class of platform ``name``, which this machine need not have unless it is "auto".

    Raises:
        ConfigError: no such platform.
    """
    if name == "auto":
        return next(platform for platform in PLATFORMS if platform.available())
    for platform in PLATFORMS:
        if platform.name == name:
            return platform
    names = ", ".join(["auto", *(platform.name for platform in PLATFORMS)])
    raise ConfigError("no such platform", where="--platform", expected=names, found=repr(name))
