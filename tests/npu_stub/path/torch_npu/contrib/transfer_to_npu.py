"""The effects of torch_npu's module of this name that matter here.

torch.cuda's functions become torch.npu's, nccl becomes hccl, Tensor.cuda becomes Tensor.npu, and
torch.jit.script does nothing. tests.npu_stub.guard handles devices named "cuda".
"""

from __future__ import annotations

import functools
import warnings

import torch
import torch.distributed as dist
import torch_npu

warnings.filterwarnings(action="once")  # as torch_npu does
warnings.warn("torch.cuda.* are replaced with torch.npu.* now..", ImportWarning, stacklevel=2)
for _name in torch_npu.npu.NAMES:
    setattr(torch.cuda, _name, getattr(torch_npu.npu, _name))
torch.cuda.default_generators = torch_npu.npu.default_generators
torch.Tensor.cuda = torch.Tensor.npu
torch.jit.script = lambda obj, *_, **__: obj
_init_process_group = dist.init_process_group


@functools.wraps(_init_process_group)
def _init(backend=None, *args, **kwargs):
    return _init_process_group(backend and backend.replace("nccl", "hccl"), *args, **kwargs)


dist.init_process_group = _init
