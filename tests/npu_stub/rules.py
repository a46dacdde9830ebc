"""What NPUs refuse, or run on their slow scalar processor (AICPU): one rule a line.

AICPU: for these dtypes the vendor's sources (ops-math and ops-nn of CANN, files op_api/*.cpp) start
an operator there on a 910B.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FP64, FP32, BF16, INT64 = torch.float64, torch.float32, torch.bfloat16, torch.int64
FLOATS = (FP32, BF16, torch.float16)
#: Dtypes that HCCL sums.
REDUCED = (BF16, torch.float16, FP32, torch.int32, INT64, torch.bool)
#: Operators, with the dtypes that they refuse.
REFUSED = {
    "aten::sort": (FP64,),
    "aten::argsort": (BF16,),
    "aten::index_select": (FP64,),
    "aten::searchsorted": (BF16,),
    "aten::logsumexp": (BF16,),
    "aten::atan2": (BF16, FP64),
    "aten::atan2_": (BF16, FP64),
}
#: Operators, with the dtypes of the result that do not run on the AICPU.
FAST = {
    "sort": FLOATS,
    "argsort": FLOATS,
    "topk": FLOATS,
    "cumsum": (*FLOATS, torch.int32),
    "scatter_add": (*FLOATS, torch.int32),
    "index_put": (*FLOATS, torch.int32, torch.int8, torch.bool),
    "searchsorted": (),
    "bincount": (),
    "__lshift__": (),
    "__ilshift__": (),
    "bitwise_left_shift": (),
    "__rshift__": (),
    "__irshift__": (),
    "bitwise_right_shift": (),
    "_unique2": (),
    "unique_dim": (),
    "unique_consecutive": (),
}
_TENSOR_COLLECTIVES = ("_allgather_base_", "_reduce_scatter_base_")
#: World sizes that ``*_into_tensor`` and ``*_tensor`` refuse.
_ODD_WORLDS = (3, 5, 6, 7)


def of_function(name: str, args: tuple[Any, ...]) -> str | None:
    """The rule that a torch function breaks, even where none of its operators does; or None."""
    if name == "take_along_dim" and args[0].dtype is not FP32:
        return f"take_along_dim of {args[0].dtype}"
    return None


def of_operator(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The rule that an operator or a collective breaks for these operands; None where none."""
    if name.startswith("c10d::"):
        return _of_collective(name.removeprefix("c10d::"), args)
    first = next((x for x in args if isinstance(x, Tensor)), None)
    dtype = None if first is None else first.dtype
    if dtype in REFUSED.get(name, ()):
        return f"{name} of {dtype}"
    if FP64 in (dtype, kwargs.get("dtype")):
        return f"{name} of {FP64}: AICPU"
    if name == "aten::topk" and not kwargs.get("sorted", args[4] if len(args) > 4 else True):
        return "aten::topk(sorted=False)"
    if name in ("aten::cumsum", "aten::cumsum_") and dtype not in FLOATS:
        dtype = kwargs.get("dtype") or INT64
    operator = name.removeprefix("aten::")
    if dtype not in FAST.get(operator, FAST.get(operator.removesuffix("_"), (dtype,))):
        return f"{name} of {dtype}: AICPU"
    if name in ("aten::index_put", "aten::index_put_", "aten::_index_put_impl_") and any(
        x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
    ):
        return "aten::index_put with a boolean index: slow"
    return None


def _of_collective(name: str, args: tuple[Any, ...]) -> str | None:
    tensors: list[Tensor] = []
    group_size = 0
    for arg in args:
        items = arg if isinstance(arg, list | tuple) else [arg]
        for item in items:
            nested = item if isinstance(item, list | tuple) else [item]
            tensors += [x for x in nested if isinstance(x, Tensor)]
        if isinstance(arg, torch.ScriptObject) and hasattr(arg, "size"):
            group_size = torch.distributed.ProcessGroup.unbox(arg).size()
    dtypes = {x.dtype for x in tensors}
    if any(not x.is_contiguous() for x in tensors):
        return f"{name} of a tensor that is not contiguous"
    if "allreduce" in name and not dtypes <= set(REDUCED):
        return f"{name} of {', '.join(map(str, dtypes))}"
    if ("allgather" in name or "reduce_scatter" in name) and dtypes & {INT64, FP64}:
        return f"{name} of {', '.join(map(str, dtypes))}"
    if name in _TENSOR_COLLECTIVES and group_size in _ODD_WORLDS:
        return f"{name} over {group_size} processes"
    return None
