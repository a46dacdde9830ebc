"""The only place that tells cpu, cuda and npu apart: device, collectives, patches of megatron-core.

``select("auto").prepare()`` must come before the first import of ``megatron``: it makes
megatron-core run on the platform. Elsewhere the project uses ``platform.device``.
"""

from megatron_replay.platform.base import Platform
from megatron_replay.platform.registry import select

__all__ = ["Platform", "select"]
