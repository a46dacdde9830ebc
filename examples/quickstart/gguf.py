"""Reads GGUF, the file format of llama.cpp: fields, and tensors dequantised to fp32.

Version 3 (github.com/ggml-org/ggml, docs/gguf.md), and the types that examples need: F32, Q4_1 and
Q8_0, whose blocks hold 32 numbers x = scale · q + minimum.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_replay.errors import DataError

Array = np.ndarray[Any, Any]
BLOCK = 32
_STRING, _LIST = 8, 9
#: The format of a field of each other type.
_SCALARS = dict(enumerate("BbHhIif?")) | dict(zip((10, 11, 12), "Qqd", strict=True))


def _f32(blocks_NB: Array) -> Array:
    return blocks_NB.view("<f4")


def _q4_1(blocks_NB: Array) -> Array:
    scale_N1, minimum_N1 = (blocks_NB[:, i : i + 2].view("<f2").astype("f4") for i in (0, 2))
    low_and_high = (blocks_NB[:, 4:] & 15, blocks_NB[:, 4:] >> 4)
    return scale_N1 * np.concatenate(low_and_high, axis=1).astype("f4") + minimum_N1


def _q8_0(blocks_NB: Array) -> Array:
    return blocks_NB[:, :2].view("<f2").astype("f4") * blocks_NB[:, 2:].view("i1").astype("f4")


#: By type: numbers and bytes of a block, and how N blocks become N rows of numbers.
_TYPES: dict[int, tuple[int, int, Callable[[Array], Array]]] = {
    0: (1, 4, _f32),
    3: (BLOCK, 20, _q4_1),
    8: (BLOCK, 34, _q8_0),
}


class Tensor(NamedTuple):
    """A tensor of the file: the outermost dimension comes first, as in torch."""

    shape: tuple[int, ...]
    type: int
    content: memoryview

    def numbers(self) -> Array:
        """All numbers, dequantised: fp32 of ``shape``."""
        _, num_bytes, dequantise = _TYPES[self.type]
        blocks_NB = np.frombuffer(self.content, "u1").reshape(-1, num_bytes)
        return dequantise(blocks_NB).reshape(self.shape)


class Gguf(NamedTuple):
    """The fields and the tensors of a file, by name."""

    fields: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def read_gguf(content: bytes, where: Path | str) -> Gguf:
    """Read a GGUF file that is in memory; ``where`` names it in errors.

    Raises:
        DataError: it is of another format or version, has tensors of another type, or is cut off.
    """
    if content[:8] != b"GGUF" + struct.pack("<I", 3):
        raise DataError("not GGUF of version 3", where=where, found=repr(content[:8]))
    try:
        return _read(content)
    except (struct.error, KeyError, ValueError) as error:
        raise DataError(f"damaged GGUF, or of an unknown type: {error!r}", where=where) from error


def _read(content: bytes) -> Gguf:
    place = 8

    def number(form: str) -> Any:
        nonlocal place
        (found,) = struct.unpack_from(f"<{form}", content, place)
        place += struct.calcsize(f"<{form}")
        return found

    def text() -> str:
        nonlocal place
        length = number("Q")
        place += length
        return content[place - length : place].decode()

    def value(kind: int) -> Any:
        if kind == _LIST:
            inside, length = number("I"), number("Q")
            return [value(inside) for _ in range(length)]
        return text() if kind == _STRING else number(_SCALARS[kind])

    num_tensors, num_fields = number("Q"), number("Q")
    fields = {text(): value(number("I")) for _ in range(num_fields)}
    described = [
        (text(), [number("Q") for _ in range(number("I"))], number("I"), number("Q"))
        for _ in range(num_tensors)
    ]
    align = fields.get("general.alignment", 32)
    start = math.ceil(place / align) * align
    tensors = {}
    for name, innermost_first, kind, offset in described:
        numbers, num_bytes, _ = _TYPES[kind]
        size = math.prod(innermost_first) // numbers * num_bytes
        data = memoryview(content)[start + offset : start + offset + size]
        if len(data) != size:
            raise ValueError(f"{name} is cut off")
        tensors[name] = Tensor(tuple(reversed(innermost_first)), kind, data)
    return Gguf(fields, tensors)
