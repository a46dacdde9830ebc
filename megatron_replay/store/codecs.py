"""How candidate ids become bytes: one byte in the index names the codec of a shard.

A codec turns the ids of one document, all positions end to end, into bytes and back. It sees ids
that were checked already (``0 <= id < vocab_size``), and must refuse bytes it would not have
written itself, so that equal documents mean equal files.

Shapes: C candidates of a document, all its positions together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_replay.errors import StoreError

#: The planar codec holds 16 + 8 bits of an id.
MAX_VOCAB_SIZE = 1 << 24

Ids = npt.NDArray[np.integer[Any]]


class Codec(NamedTuple):
    """A codec: its name, and its two directions."""

    name: str
    encode: Callable[[Ids, int], bytes]
    """``encode(ids_C, vocab_size) -> payload``"""
    decode: Callable[[memoryview, int, int], npt.NDArray[np.int32]]
    """``decode(payload, num_ids, vocab_size) -> ids_C``; StoreError when they do not agree"""


def high_bits(vocab_size: int) -> int:
    """Bits of an id above the low 16: the least of 0, 1, 2, 4, 8 that fits ``vocab_size``.

    Powers of two keep a field inside one byte, which is what makes the plane decode in a few
    vectorised passes. Qwen's 151 936 tokens need 2.
    """
    needed = max((vocab_size - 1).bit_length() - 16, 0)
    return next(bits for bits in (0, 1, 2, 4, 8) if bits >= needed)


def encode_planar(ids_C: Ids, vocab_size: int) -> bytes:
    """Low plane: uint16 per id. High plane: ``high_bits`` per id, least significant field first."""
    low_plane = (ids_C & 0xFFFF).astype("<u2").tobytes()
    bits = high_bits(vocab_size)
    if bits == 0:
        return low_plane
    fields_per_byte = 8 // bits
    packed = np.zeros(-(-len(ids_C) // fields_per_byte), np.uint8)
    for field in range(fields_per_byte):
        high = (ids_C[field::fields_per_byte] >> 16).astype(np.uint8)
        packed[: len(high)] |= high << np.uint8(field * bits)
    return low_plane + packed.tobytes()


def decode_planar(payload: memoryview, num_ids: int, vocab_size: int) -> npt.NDArray[np.int32]:
    """Inverse of ``encode_planar``; the padding of the last byte must be zero."""
    bits = high_bits(vocab_size)
    expected_bytes = 2 * num_ids + -(-num_ids * bits // 8)
    if len(payload) != expected_bytes:
        raise StoreError(
            f"{num_ids} planar ids have another size", expected=expected_bytes, found=len(payload)
        )
    ids_C = np.frombuffer(payload, "<u2", num_ids).astype(np.int32)
    if bits == 0:
        return ids_C
    packed = np.frombuffer(payload, np.uint8, offset=2 * num_ids)
    fields_per_byte, field_mask = 8 // bits, np.uint8((1 << bits) - 1)
    for field in range(fields_per_byte):
        high = (packed >> np.uint8(field * bits)) & field_mask
        room = len(ids_C[field::fields_per_byte])
        if high[room:].any():
            raise StoreError("the padding after the last planar id is not zero")
        ids_C[field::fields_per_byte] |= high[:room].astype(np.int32) << 16
    return ids_C


PLANAR = 0

#: Codec byte of an index -> codec. A number, once released, keeps its meaning for ever.
CODECS: dict[int, Codec] = {PLANAR: Codec("planar", encode_planar, decode_planar)}
