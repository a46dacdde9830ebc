"""A stand-in for torch_npu on a machine without NPUs; tests put its folder on sys.path.

On import it changes torch as torch_npu does: the device is named "npu", ``torch.npu`` exists, and
so do the collectives "hccl" (here gloo). Tensors stay on the CPU; tests.npu_stub.guard records
which of them would be on an NPU, and reports that device for them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

torch.utils.rename_privateuse1_backend("npu")

from tests.npu_stub.fusion_attention import npu_fusion_attention  # noqa: E402
from tests.npu_stub.layers import npu_rms_norm, npu_rotary_mul, npu_swiglu  # noqa: E402
from torch_npu import npu  # noqa: E402

__all__ = ["npu", "npu_fusion_attention", "npu_rms_norm", "npu_rotary_mul", "npu_swiglu"]
torch._register_device_module("npu", npu)
# bf16 products with fp32 sums, as from 2.9.0.post6 on.
_aten = torch.library.Library("aten", "IMPL")
for key in ("CPU", "PrivateUse1"):
    _aten.impl("mm.dtype", lambda left, right, dtype: left.to(dtype) @ right.to(dtype), key)
torch.Tensor.npu = lambda self, device=None, non_blocking=False: self.to(device or "npu")


def _hccl(store, rank, size, timeout):
    if not npu.device_was_set():
        raise RuntimeError("set_device must come before init_process_group")
    return dist.ProcessGroupGloo(store, rank, size, timeout)


# For "cpu", since that is where the tensors are.
dist.Backend.register_backend("hccl", _hccl, devices=["cpu"])
distributed_c10d._get_object_coll_device = lambda group=None: "npu"
# torch reads the device of a barrier's tensor from the extension's C++ hooks, absent here.
torch._C._get_accelerator = lambda check=False: torch.device("cpu")
_get_backend = dist.ProcessGroup._get_backend
dist.ProcessGroup._get_backend = lambda group, device: _get_backend(group, torch.device("cpu"))
