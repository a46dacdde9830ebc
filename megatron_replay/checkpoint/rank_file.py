"""One rank's file of Megatron's oldest layout: a pickle written by ``torch.save``.

A file holds {"model": {parameter: tensor}, "checkpoint_version": 3.0, "iteration": 1}, and what
training adds. ``torch.load(weights_only=True)`` does not read such files: it implements pickle
protocol 2 only (MindSpeed-LLM writes 4), and refuses the numpy states, enumerations and namespaces
that Megatron stores with the weights. The reader here builds tensors and plain containers;
everything else that a file names becomes an object that does nothing, so no code of the file runs.
"""

from __future__ import annotations

import collections
import errno
import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_replay.errors import CheckpointError, OutputError
from megatron_replay.files import output_error, require_regular


class RankFile:
    """The weights in one rank's file.

    Raises:
        CheckpointError: the file is missing, damaged, or holds no plain model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _require_intact(path)
        tensors = self._tensors()
        self.shapes = {name: tuple(held.shape) for name, held in tensors.items()}
        self.dtypes = {name: held.dtype for name, held in tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        """A tensor, mapped from the file; its pages are released together with it."""
        return self._tensors()[name]

    def _tensors(self) -> dict[str, Tensor]:
        try:
            content = _load(self.path)
        except Exception as error:  # damaged zip files and pickles raise many types
            raise _unreadable(self.path, error) from error
        model = content.get("model") if isinstance(content, dict) else None
        if not isinstance(model, dict):
            parts = sorted(map(str, content))[:4] if isinstance(content, dict) else []
            raise CheckpointError(
                "the file holds no plain model",
                where=self.path,
                expected="model",
                found=", ".join(parts) or type(content).__name__,
                fix="Virtual pipelines (model0, model1) are not supported: merge them with the "
                "tool that wrote them"
                if "model0" in parts
                else None,
            )
        tensors = {}
        for name, value in model.items():
            if str(name).endswith("_extra_state"):  # TransformerEngine's fp8 scales
                continue
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise CheckpointError(f"{name} is not a floating-point tensor", where=self.path)
            tensors[str(name)] = value.detach()
        return tensors


#: The types and functions that make up tensors, by the names under which pickles refer to them.
_BUILDS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
}


class _Inert:
    """Replaces any other object; accepts every operation of a pickle and does nothing."""

    def __init__(self, *arguments: object, **options: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def __hash__(self) -> int:
        return id(self)

    def append(self, item: object) -> None:
        """Accept an item, like a list."""

    extend = add = append


class _RestrictedPickle:
    """What torch.load expects of ``pickle_module``."""

    __name__ = "restricted_pickle"

    class Unpickler(pickle.Unpickler):
        """Resolves the parts of tensors only."""

        def find_class(self, module_name: str, global_name: str, /) -> Any:
            """The named object if it is part of a tensor, otherwise an inert one."""
            known = _BUILDS.get((module_name, global_name))
            if known is None and module_name == "torch":
                named = getattr(torch, global_name, None)
                known = named if isinstance(named, torch.dtype) else None
            return _Inert if known is None else known


def _load(path: Path) -> Any:
    """The content of a file of ``torch.save``, its tensors mapped from the file."""
    with warnings.catch_warnings():
        # Otherwise torch.load passes TorchScript, which is code, to another reader, and warns.
        warnings.filterwarnings("error", message=".*TorchScript")
        return torch.load(
            path, map_location="cpu", mmap=True, weights_only=False, pickle_module=_RestrictedPickle
        )


def _require_intact(path: Path) -> None:
    """Compare the content with the crc32 that torch.save stores for each tensor.

    torch does not, and would load a weight with a flipped bit.
    """
    require_regular(path, CheckpointError)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # damaged archives raise many types
        raise _unreadable(path, error) from error
    if damaged is not None:
        raise CheckpointError(
            f"damaged: the crc32 of {damaged} differs",
            where=path,
            fix="Copy it again from an intact copy (torch.save omits the crc32 only under "
            "torch.serialization.set_crc32_options(False))",
        )


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    # In a truncated file torch may seek beyond the end (EINVAL).
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        return CheckpointError(f"cannot read: {error.strerror}", where=path)
    return CheckpointError(
        f"truncated, or not a file of torch.save: {_first_line(error)}", where=path
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def write_rank(path: Path, parameters: dict[str, Tensor], iteration: int = 1) -> None:
    """Write one rank's file and sync it.

    Raises:
        OutputError: it cannot be written.
    """
    content = {"model": parameters, "checkpoint_version": 3.0, "iteration": iteration}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as handle:
            torch.save(content, handle)
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise output_error(path, error) from error
    except RuntimeError as error:  # the zip writer, after a write that failed
        cause = error.__context__
        if isinstance(cause, OSError):
            raise output_error(path, cause) from error
        raise OutputError(
            f"a file could not be written whole: {_first_line(error)}",
            where=path,
            fix="Is the disk full? Nothing was published",
        ) from error
