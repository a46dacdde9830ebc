"""How candidate ids become bytes: one byte in the index names the codec of a shard.

A codec turns the sets of one document, all positions end to end, into bytes and back. It sees sets
that were checked already (ids ascend inside a set, ``0 <= id < vocab_size``); what it decodes from
foreign bytes is checked afterwards, but the room it takes for that is its own affair.

Shapes: P positions of a document, C candidates of a document (all its positions together).
"""

from __future__ import annotations

import lzma
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_replay.errors import StoreError

#: The planar codec holds 16 + 8 bits of an id.
MAX_VOCAB_SIZE = 1 << 24

Ids = npt.NDArray[np.integer[Any]]
Offsets = npt.NDArray[np.int64]


class Codec(NamedTuple):
    """A codec: its name, and its two directions. Offsets [P + 1] tell the sets apart."""

    name: str
    encode: Callable[[Ids, Offsets, int], bytes]
    """``encode(ids_C, offsets, vocab_size) -> payload``"""
    decode: Callable[[memoryview, Offsets, int], npt.NDArray[np.int32]]
    """``decode(payload, offsets, vocab_size) -> ids_C``; StoreError when they do not agree"""


def high_bits(vocab_size: int) -> int:
    """Bits of an id above the low 16: the least of 0, 1, 2, 4, 8 that fits ``vocab_size``.

    Powers of two keep a field inside one byte, which is what makes the plane decode in a few
    vectorised passes. Qwen's 151 936 tokens need 2.
    """
    needed = max((vocab_size - 1).bit_length() - 16, 0)
    return next(bits for bits in (0, 1, 2, 4, 8) if bits >= needed)


def planar_bytes(num_ids: int, vocab_size: int) -> int:
    """Bytes that ``num_ids`` ids take."""
    return 2 * num_ids + -(-num_ids * high_bits(vocab_size) // 8)


def encode_planar(ids_C: Ids, _: Offsets, vocab_size: int) -> bytes:
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


def decode_planar(payload: memoryview, offsets: Offsets, vocab_size: int) -> npt.NDArray[np.int32]:
    """Inverse of ``encode_planar``; the padding of the last byte must be zero."""
    num_ids, bits = int(offsets[-1]), high_bits(vocab_size)
    expected_bytes = planar_bytes(num_ids, vocab_size)
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


#: One byte a gap, but for this one: it says that the gap is this long or longer.
_LONG = 255
#: Bytes of a long gap: ids lie below 2^24.
_LONG_BYTES = 3
#: A raw LZMA1 stream. Gaps are literals (pb, lp: no alignment); 1 MiB of window holds any document
#: of 4,096 positions at 256 ids, and bounds what a decoder needs.
_LZMA = [{"id": lzma.FILTER_LZMA1, "preset": 1, "dict_size": 1 << 20, "lc": 3, "lp": 0, "pb": 0}]


def encode_archive(ids_C: Ids, offsets: Offsets, _: int) -> bytes:
    """Gap of each id to the one before it in its set (from -1), less one; then LZMA.

    A byte per gap, 255 for any that does not fit; then gap - 255 of those, three planes of bytes,
    low ones first. No bytes at all for no ids.
    """
    if not len(ids_C):
        return b""
    gaps_C = _gaps(ids_C, offsets)
    long_gaps = gaps_C[gaps_C >= _LONG] - _LONG
    planes = long_gaps.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :_LONG_BYTES].T
    literals = np.minimum(gaps_C, _LONG).astype(np.uint8).tobytes() + planes.tobytes()
    return lzma.compress(literals, lzma.FORMAT_RAW, filters=_LZMA)


def _gaps(ids_C: Ids, offsets: Offsets) -> npt.NDArray[np.int64]:
    before_C = np.empty(len(ids_C), np.int64)
    before_C[1:] = ids_C[:-1]
    before_C[offsets[:-1]] = -1
    return ids_C - before_C - 1


def decode_archive(payload: memoryview, offsets: Offsets, _: int) -> npt.NDArray[np.int32]:
    """Inverse of ``encode_archive``; never makes more than 4 bytes an id of the payload."""
    num_ids = int(offsets[-1])
    if not num_ids:
        if payload:
            raise StoreError("compressed ids of no candidate", expected=0, found=len(payload))
        return np.empty(0, np.int32)
    content = _decompressed(payload, (1 + _LONG_BYTES) * num_ids)
    if len(content) < num_ids:
        raise StoreError("gaps are missing", expected=num_ids, found=len(content))
    gaps_C = np.frombuffer(content, np.uint8, num_ids).astype(np.int64)
    is_long_C = gaps_C == _LONG
    num_long = int(is_long_C.sum())
    if len(content) != num_ids + _LONG_BYTES * num_long:
        raise StoreError(
            "long gaps are missing, or too many",
            expected=f"{num_ids + _LONG_BYTES * num_long} bytes",
            found=len(content),
        )
    planes = np.frombuffer(content, np.uint8, offset=num_ids).reshape(_LONG_BYTES, num_long)
    gaps_C[is_long_C] += planes.T.astype(np.int64) @ (1 << 8 * np.arange(_LONG_BYTES))
    ids_C = np.cumsum(gaps_C + 1)
    before_P = np.concatenate(([0], ids_C))[offsets[:-1]]
    ids_C -= np.repeat(before_P, np.diff(offsets)) + 1
    if ids_C.max() >= MAX_VOCAB_SIZE:
        raise StoreError("a gap leads out of every vocabulary", expected=MAX_VOCAB_SIZE - 1)
    return ids_C.astype(np.int32)


def _decompressed(payload: memoryview, most: int) -> bytes:
    """The content of a raw LZMA stream that ends with the payload and has ``most`` bytes or less.

    Sizes, counts and the stream are independent claims of the file, so none is believed: output
    beyond ``most`` is never made.
    """
    decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_LZMA)
    try:
        content = decoder.decompress(payload, max_length=most)
        if not decoder.eof and not decoder.needs_input:  # its end marker may be all that is left
            content += decoder.decompress(b"", max_length=1)
    except lzma.LZMAError as error:
        raise StoreError(f"the compressed ids are damaged: {error}") from error
    if not decoder.eof or decoder.unused_data or len(content) > most:
        raise StoreError("the compressed ids do not end where their record does")
    return content


PLANAR, ARCHIVE = 0, 1

#: Codec byte of an index -> codec. A number, once released, keeps its meaning for ever.
CODECS: dict[int, Codec] = {
    PLANAR: Codec("planar", encode_planar, decode_planar),
    ARCHIVE: Codec("archive", encode_archive, decode_archive),
}
CODEC_NUMBERS = {codec.name: number for number, codec in CODECS.items()}
