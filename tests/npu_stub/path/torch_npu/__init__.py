"""A stand-in for torch_npu on a machine without NPUs: tests put its folder on sys.path.

It does to torch what torch_npu does on import: names the device "npu", gives it ``torch.npu`` and
the collectives "hccl" (here gloo). Tensors stay on the CPU; tests.npu_stub.guard keeps account of
which of them would lie on an NPU, and answers for them.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

__version__ = os.environ.get("NPU_STUB_VERSION", "2.13.0")
torch.utils.rename_privateuse1_backend("npu")

from tests.npu_stub import fusion_attention  # noqa: E402
from torch_npu import npu  # noqa: E402

torch._register_device_module("npu", npu)
torch.Tensor.npu = lambda self, device=None, non_blocking=False: self.to(device or "npu")


def npu_fusion_attention(*args: Any, **kwargs: Any) -> Any:
    """As recorded; it counts among torch.npu's calls."""
    npu.calls["npu_fusion_attention"] = npu.calls.get("npu_fusion_attention", 0) + 1
    return fusion_attention.operator(__version__)(*args, **kwargs)


def _hccl(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Backend:
    if not npu.device_was_set:
        raise RuntimeError("set_device must come before init_process_group")
    return dist.ProcessGroupGloo(store, rank, size, timeout)


# For "cpu", since that is where the tensors are.
dist.Backend.register_backend("hccl", _hccl, devices=["cpu"])
distributed_c10d._get_object_coll_device = lambda group=None: "npu"
# torch asks the extension's C++ hooks, which there are none of, where a barrier's tensor should be.
torch._C._get_accelerator = lambda check=False: torch.device("cpu")
_get_backend = dist.ProcessGroup._get_backend
dist.ProcessGroup._get_backend = lambda group, device: _get_backend(group, torch.device("cpu"))
