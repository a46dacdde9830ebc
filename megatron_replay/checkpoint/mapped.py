"""Tensors of a safetensors file, mapped into memory one by one and only while somebody holds them.

A mapping of the whole file would keep every page that was read counted as this process's memory
until the file is closed; these go with the last tensor that looks at them.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_replay.errors import CheckpointError
from megatron_replay.files import open_regular

#: The safetensors format's own limit on a header.
_MAX_HEADER = 100_000_000
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
#: All that reading untrusted JSON, and looking into it, may raise.
MALFORMED = (
    ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError,
)  # fmt: skip


class MappedTensor:
    """A tensor on disk. What indexing returns is a view of the file: copy it, or let it go."""

    def __init__(self, path: Path, dtype: str, shape: list[int], start: int, stop: int) -> None:
        self._path, self._dtype, self._shape = path, dtype, shape
        self._start, self._stop = start, stop

    def get_shape(self) -> list[int]:
        """The shape; reads nothing."""
        return list(self._shape)

    def get_dtype(self) -> str:
        """The dtype in the format's words ("BF16"); reads nothing."""
        return self._dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self._stop - self._start

    def torch_dtype(self) -> torch.dtype:
        """The dtype in torch's words.

        Raises:
            CheckpointError: torch on a CPU computes with no such numbers.
        """
        if self._dtype not in _DTYPES:
            raise CheckpointError(
                "unsupported dtype",
                where=self._path,
                expected=", ".join(_DTYPES),
                found=self._dtype,
            )
        return _DTYPES[self._dtype]

    def __getitem__(self, index: object) -> Tensor:
        """A part of the tensor, of whose pages only those that are looked at are read."""
        return self._whole()[index]  # type: ignore[index]

    def _whole(self) -> Tensor:
        dtype = self.torch_dtype()
        if self._start == self._stop:
            return torch.empty(self._shape, dtype=dtype)
        first = self._start - self._start % mmap.ALLOCATIONGRANULARITY
        try:
            with open(self._path, "rb") as handle:
                # A private mapping: torch wants memory it may write to, the file stays as it is.
                mapped = mmap.mmap(
                    handle.fileno(), self._stop - first, access=mmap.ACCESS_COPY, offset=first
                )
        except (OSError, ValueError) as error:  # ValueError: it has become shorter
            raise CheckpointError(f"cannot read: {error}", where=self._path) from error
        flat = torch.frombuffer(mapped, dtype=torch.uint8)[self._start - first :]
        if flat.data_ptr() % dtype.itemsize:  # the format allows it, torch does not
            flat = flat.clone()
        return flat.view(dtype).view(self._shape)


def mapped_tensors(path: Path) -> dict[str, MappedTensor]:
    """All tensors of a file that is known to be whole, by name.

    Raises:
        CheckpointError: it cannot be read, is truncated, or its header is not consistent.
    """
    table, data = read_header(path)
    try:
        with safe_open(path, "pt"):  # checks that offsets, shapes and dtypes agree
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"the header is damaged: {error}", where=path) from error
    return {
        name: MappedTensor(
            path,
            entry["dtype"],
            list(entry["shape"]),
            *(data + offset for offset in entry["data_offsets"]),
        )
        for name, entry in table.items()
    }


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The file's table of tensors, once it is as long as the table says, and where data start."""
    try:
        with open_regular(path, CheckpointError) as handle:
            size = os.fstat(handle.fileno()).st_size
            start = handle.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(
                    "truncated, or not a safetensors file", where=path, found=f"{size} bytes"
                )
            content = handle.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read: {error.strerror}", where=path) from error
    try:
        table = json.loads(content)
        table.pop("__metadata__", None)
        end = max((int(entry["data_offsets"][1]) for entry in table.values()), default=0)
    except MALFORMED as error:
        raise CheckpointError("the header is damaged", where=path) from error
    if size != 8 + length + end:
        raise CheckpointError(
            "truncated" if size < 8 + length + end else "longer than its header says",
            where=path,
            expected=f"{8 + length + end} bytes",
            found=f"{size} bytes",
        )
    return dict(table), 8 + length
