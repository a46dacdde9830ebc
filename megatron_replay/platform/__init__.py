"""The only place that knows cpu from cuda from npu: device, collectives, what Megatron needs there.

``select("auto").prepare()`` must come before the first import of ``megatron``: it makes
megatron-core run on the platform. Elsewhere the project speaks of ``platform.device``.
"""

from megatron_replay.platform.base import Platform
from megatron_replay.platform.registry import select

__all__ = ["Platform", "select"]
