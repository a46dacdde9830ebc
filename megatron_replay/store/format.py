"""The bytes of a shard: one record per document in ``.bin``, an index of them in ``.idx``.

``docs/store_format.md`` describes both byte for byte. All numbers are little-endian. A file is not
trusted: every size, count and offset is checked before anything is allocated from it.

Shapes: P positions of a document, C candidates of a document (all its positions together),
N documents of a shard.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import IO

import numpy as np
import numpy.typing as npt

from megatron_replay.store.document import (
    MAX_SET_SIZE,
    DocumentCandidates,
    decode_logits,
    encode_logits,
    offsets_of_counts,
    require,
    require_valid,
    to_half,
)

FORMAT_VERSION = 2
BIN_MAGIC = b"REPLAYCB"
BIN_HEADER = struct.Struct("<8sI")  # magic, version

INDEX_MAGIC = b"REPLAYCI"
# magic, version, codec, three zero bytes, first document, documents, bytes and crc of the .bin
INDEX_HEADER = struct.Struct("<8sIB3sQQQI")
CRC = struct.Struct("<I")

#: How ids are written, by name in store.json and by number in an index. There is one way.
CODEC, CODEC_NUMBER = "planar", 0
#: Planar ids have 16 + 8 bits.
MAX_VOCAB_SIZE = 1 << 24

NUM_POSITIONS = struct.Struct("<I")
#: position int32, |S| - 1 uint8, and three fp16: lse, label_logprob, tail_mass.
BYTES_PER_POSITION = 4 + 1 + 3 * 2
#: Of a candidate, at most: an id of 24 bits and a logit.
_MOST_CANDIDATE_BYTES = 3 + 2
#: Read of an index at a time; a multiple of an offset.
_BLOCK_BYTES = 1 << 20


def high_bits(vocab_size: int) -> int:
    """Bits of an id above the low 16: the least of 0, 1, 2, 4, 8 that fits ``vocab_size``.

    Powers of two keep a field inside one byte, which is what makes the plane decode in a few
    vectorised passes. Qwen's 151,936 tokens need 2.
    """
    needed = max((vocab_size - 1).bit_length() - 16, 0)
    return next(bits for bits in (0, 1, 2, 4, 8) if bits >= needed)


def encode_ids(ids_C: npt.NDArray[np.int32], vocab_size: int) -> bytes:
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


def decode_ids(payload: memoryview, num_ids: int, vocab_size: int) -> npt.NDArray[np.int32]:
    """Inverse of ``encode_ids``; the padding of the last byte must be zero."""
    bits = high_bits(vocab_size)
    expected_bytes, found = 2 * num_ids + -(-num_ids * bits // 8), len(payload)
    require(
        found == expected_bytes, f"{num_ids} planar ids have another size", expected_bytes, found
    )
    ids_C = np.frombuffer(payload, "<u2", num_ids).astype(np.int32)
    if bits == 0:
        return ids_C
    packed = np.frombuffer(payload, np.uint8, offset=2 * num_ids)
    fields_per_byte, field_mask = 8 // bits, np.uint8((1 << bits) - 1)
    for field in range(fields_per_byte):
        high = (packed >> np.uint8(field * bits)) & field_mask
        room = len(ids_C[field::fields_per_byte])
        require(not high[room:].any(), "the padding after the last planar id is not zero")
        ids_C[field::fields_per_byte] |= high[:room].astype(np.int32) << 16
    return ids_C


def encode_record(document: DocumentCandidates, *, vocab_size: int, logits: str) -> bytes:
    """The bytes of one valid document (see ``require_valid``)."""
    parts = [
        NUM_POSITIONS.pack(len(document.positions)),
        document.positions.astype("<i4").tobytes(),
        (np.diff(document.offsets) - 1).astype(np.uint8).tobytes(),
        to_half(document.lse).tobytes(),
        to_half(document.label_logprob).tobytes(),
        to_half(document.tail_mass).tobytes(),
        encode_ids(document.ids, vocab_size),
    ]
    if document.logits is not None:
        parts.append(encode_logits(document.logits, logits))
    return b"".join(parts)


def decode_record(record: memoryview, *, vocab_size: int, logits: str) -> DocumentCandidates:
    """Inverse of ``encode_record``.

    Raises:
        StoreError: the record is shorter or longer than its own counts, or breaks a rule of
            ``require_valid``.
    """
    require(len(record) >= NUM_POSITIONS.size, "a record is cut off")
    (num_positions,) = NUM_POSITIONS.unpack_from(record)
    ids_start = NUM_POSITIONS.size + num_positions * BYTES_PER_POSITION
    require(ids_start <= len(record), "a record is cut off", f"{ids_start} bytes", len(record))
    sizes_start = NUM_POSITIONS.size + 4 * num_positions
    sizes_P = np.frombuffer(record, "u1", num_positions, sizes_start)
    halves = np.frombuffer(record, "<f2", 3 * num_positions, sizes_start + num_positions)
    lse_P, label_logprob_P, tail_mass_P = halves.reshape(3, -1).astype(np.float32)
    offsets = offsets_of_counts(sizes_P.astype(np.int64) + 1)
    num_ids = int(offsets[-1])
    ids_stop = len(record) - (0 if logits == "none" else 2 * num_ids)
    require(ids_start <= ids_stop, "a record is too short for its logits")
    document = DocumentCandidates(
        positions=np.frombuffer(record, "<i4", num_positions, NUM_POSITIONS.size).astype(np.int32),
        offsets=offsets,
        ids=decode_ids(record[ids_start:ids_stop], num_ids, vocab_size),
        lse=lse_P,
        label_logprob=label_logprob_P,
        tail_mass=tail_mass_P,
        logits=None if logits == "none" else decode_logits(record[ids_stop:], logits),
    )
    require_valid(document, vocab_size=vocab_size, logits=logits)
    return document


def require_likely(record: memoryview | bytes, size: int) -> None:
    """Raise StoreError unless a record that begins with these four bytes can have ``size`` bytes.

    To be called before the rest of the record is read.
    """
    (num_positions,) = NUM_POSITIONS.unpack_from(record)
    least = NUM_POSITIONS.size + BYTES_PER_POSITION * num_positions
    most = least + num_positions * MAX_SET_SIZE * _MOST_CANDIDATE_BYTES
    require(
        least <= size <= most,
        f"a record of {num_positions} positions has an impossible size",
        f"{least} to {most} bytes",
        size,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardIndex:
    """The index of a ``.bin``, read from its ``.idx``."""

    first_document: int
    offsets: npt.NDArray[np.int64]
    """int64 [N + 1]: record i is ``bin[offsets[i]:offsets[i + 1]]``; the last is the file size."""
    record_crcs: npt.NDArray[np.uint32]
    """uint32 [N]: crc32 of each record."""
    stops: npt.NDArray[np.int32]
    """int32 [N]: last position of each document, plus one; 0 where it has none."""
    bin_crc: int

    @property
    def bin_bytes(self) -> int:
        """Size of the ``.bin``."""
        return int(self.offsets[-1])


def encode_index(index: ShardIndex) -> bytes:
    """The bytes of an ``.idx``; its last four are the crc32 of all before them."""
    body = INDEX_HEADER.pack(
        INDEX_MAGIC, FORMAT_VERSION, CODEC_NUMBER, bytes(3), index.first_document,
        len(index.stops), index.bin_bytes, index.bin_crc,
    )  # fmt: skip
    body += index.offsets.astype("<i8").tobytes() + index.record_crcs.astype("<u4").tobytes()
    body += index.stops.astype("<i4").tobytes()
    return body + CRC.pack(zlib.crc32(body))


def require_header(magic: bytes, expected_magic: bytes, version: int) -> None:
    """Raise StoreError unless a file is of the expected kind, in a version this code reads."""
    require(magic == expected_magic, "not a file of a candidate store", expected_magic, magic)
    require(version == FORMAT_VERSION, "another version of the format", FORMAT_VERSION, version)


def decode_index(handle: IO[bytes], size: int, documents: range) -> tuple[ShardIndex, int]:
    """The index of the shard that holds ``documents``, and the crc32 that it ends with.

    Inverse of ``encode_index``. Reads block by block and stops at the first block that is damaged:
    a sparse file may be far larger than what was written to it.

    Raises:
        StoreError: damaged, of another version or codec, or the index of other documents.
    """
    header = handle.read(INDEX_HEADER.size)
    require(len(header) == INDEX_HEADER.size, "the index is cut off")
    magic, version, codec, zeros, first, count, bin_bytes, bin_crc = INDEX_HEADER.unpack(header)
    require_header(magic, INDEX_MAGIC, version)
    num_documents = len(documents)
    expected_bytes = INDEX_HEADER.size + 8 * (num_documents + 1) + 8 * num_documents + CRC.size
    require(size == expected_bytes, "the index is cut off", expected_bytes, size)
    offsets = _read_offsets(handle, num_documents + 1)
    columns = handle.read(8 * num_documents)
    crc = zlib.crc32(header + offsets.astype("<i8").tobytes() + columns)
    require(handle.read(CRC.size) == CRC.pack(crc), "the index is damaged: its crc32 differs")
    require(zeros == bytes(3), "reserved bytes of the index are not zero")
    require(codec == CODEC_NUMBER, "unknown codec", CODEC_NUMBER, codec)
    require(
        (first, count) == (documents.start, num_documents),
        "the index of other documents",
        f"{num_documents} from {documents.start}",
        f"{count} from {first}",
    )
    require(
        offsets[0] == BIN_HEADER.size and offsets[-1] == bin_bytes,
        "the records of the index do not fill the .bin",
    )
    index = ShardIndex(
        first_document=first,
        offsets=offsets,
        record_crcs=np.frombuffer(columns, "<u4", count).astype(np.uint32),
        stops=np.frombuffer(columns, "<i4", count, 4 * count).astype(np.int32),
        bin_crc=bin_crc,
    )
    return index, crc


def _read_offsets(handle: IO[bytes], count: int) -> npt.NDArray[np.int64]:
    parts, left = [np.empty(0, np.int64)], 8 * count
    while left:
        block = handle.read(min(left, _BLOCK_BYTES))
        # Shorter where the file was cut off after its size was taken.
        require(len(block) == min(left, _BLOCK_BYTES), "the index is cut off")
        parts.append(np.frombuffer(block, "<i8").astype(np.int64))
        joined = np.concatenate([parts[-2][-1:], parts[-1]])
        require(
            joined.min() >= 0 and (np.diff(joined) >= NUM_POSITIONS.size).all(),
            "the index is damaged: its offsets do not ascend",
        )
        left -= len(block)
    return np.concatenate(parts)
