"""Read a pickle of ``torch.save`` for its tensors, running nothing of what it names.

``torch.load(weights_only=True)`` refuses training checkpoints: it knows pickle's protocol 2 only
(MindSpeed-LLM writes 4), and no numpy states, enumerations and namespaces as Megatron keeps beside
the weights. Here tensors and plain containers are built, and whatever else a file names becomes an
object that does nothing.
"""

from __future__ import annotations

import collections
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

#: What makes up tensors, by the names under which pickles refer to it.
_BUILDS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
}


class _Inert:
    """Stands for anything else; takes all that a pickle does to an object, and does nothing."""

    def __init__(self, *arguments: object, **options: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def __hash__(self) -> int:
        return id(self)

    def append(self, item: object) -> None:
        """As a list."""

    def extend(self, items: object) -> None:
        """As a list."""

    def add(self, item: object) -> None:
        """As a set."""


class Unpickler(pickle.Unpickler):
    """Looks up tensors' parts; torch.load finds it in this module by its name."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """The one meant if it is a tensor's, else what does nothing."""
        known = _BUILDS.get((module_name, global_name))
        if known is None and module_name == "torch":
            named = getattr(torch, global_name, None)
            known = named if isinstance(named, torch.dtype) else None
        return _Inert if known is None else known


class _Module:
    """What torch.load expects of ``pickle_module``."""

    __name__ = "restricted_pickle"
    Unpickler = Unpickler


def load(path: Path) -> Any:
    """The content, tensors mapped from the file.

    Raises:
        Exception: of any kind: the file is damaged, or none of ``torch.save``'s zip files.
    """
    with warnings.catch_warnings():
        # torch.load would hand TorchScript, which is code, to another reader, with a warning.
        warnings.filterwarnings("error", message=".*TorchScript")
        return torch.load(
            path,
            map_location="cpu",
            mmap=True,
            weights_only=False,
            pickle_module=_Module,
        )
