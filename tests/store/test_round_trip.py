"""What is written is what is read: over all shapes, against hand-built bytes, and for ever."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_replay.store import CandidateReader, CandidateWriter, DocumentCandidates
from megatron_replay.store.document import require_valid
from megatron_replay.store.format import (
    decode_ids,
    decode_record,
    encode_ids,
    encode_record,
    high_bits,
)
from tests.store.examples import (
    assert_same,
    contents,
    describe,
    document_of,
    draw_document,
    require_sound,
    write_store,
)

VOCABULARIES = [1, 2, 65_536, 65_537, 151_936, 1 << 18, 1 << 20, (1 << 20) + 1, 1 << 24]
GOLDEN = Path(__file__).parent / "golden"


@st.composite
def documents(draw: st.DrawFn) -> tuple[int, DocumentCandidates]:
    vocab_size = draw(st.sampled_from(VOCABULARIES))
    most = min(256, vocab_size)
    size = st.one_of(st.just(1), st.just(most), st.integers(1, most))
    document = draw_document(
        np.random.default_rng(draw(st.integers(0, 2**32))),
        vocab_size=vocab_size,
        set_sizes=draw(st.lists(size, max_size=6)),
        has_logits=draw(st.booleans()),
    )
    return vocab_size, document


@settings(deadline=None, derandomize=True, max_examples=150)
@given(documents())
def test_a_record_is_read_as_it_was_written(case: tuple[int, DocumentCandidates]) -> None:
    vocab_size, document = case
    for logits in ("fp16", "bf16") if document.logits is not None else ("none",):
        require_valid(document, vocab_size=vocab_size, logits=logits)
        record = encode_record(document, vocab_size=vocab_size, logits=logits)
        found = decode_record(memoryview(record), vocab_size=vocab_size, logits=logits)
        assert_same(found, document)


@pytest.mark.parametrize("logits", ["none", "fp16", "bf16"])
def test_a_store_is_read_as_it_was_written(tmp_path: Path, logits: str) -> None:
    description = describe(num_documents=11, documents_per_shard=4, logits=logits)
    write_store(tmp_path, description)
    reader = CandidateReader(tmp_path)
    assert len(reader) == 11
    assert reader.description == description
    for document_id in [10, 0, 3, 4, 3]:  # any order, and again
        assert_same(reader[document_id], document_of(description, document_id))
    assert len(list(reader)) == 11
    stops = [document_of(description, d).stop for d in range(11)]
    assert reader.stops().tolist() == stops
    batch, without = reader.read([7, 0, 10]), reader.read([7, 0, 10], logits=False)
    assert batch.stops.tolist() == [stops[7], 0, stops[10]]
    assert (batch.logits is None) == (logits == "none")
    assert_same(without, dataclasses.replace(batch, logits=None))
    require_sound(reader)


def test_the_ends_of_the_vocabulary_survive() -> None:
    for vocab_size in VOCABULARIES:
        ids = np.unique([0, vocab_size // 2, vocab_size - 1]).astype(np.int32)
        found = decode_ids(memoryview(encode_ids(ids, vocab_size)), len(ids), vocab_size)
        np.testing.assert_array_equal(found, ids)


@settings(deadline=None, derandomize=True)
@given(st.data(), st.sampled_from(VOCABULARIES))
def test_planar_is_the_documented_layout(data: st.DataObject, vocab_size: int) -> None:
    """Against one big integer: field i of the high plane sits at bit ``i * bits``."""
    ids = data.draw(st.lists(st.integers(0, vocab_size - 1), max_size=20))
    bits = high_bits(vocab_size)
    plane = sum((value >> 16) << (i * bits) for i, value in enumerate(ids))
    expected = struct.pack(f"<{len(ids)}H", *(value % 65_536 for value in ids))
    expected += plane.to_bytes(-(-len(ids) * bits // 8), "little")
    assert encode_ids(np.array(ids, np.int32), vocab_size) == expected


@pytest.mark.parametrize(
    ("vocab_size", "bits"),
    [(2, 0), (65_536, 0), (65_537, 1), (131_073, 2), (1 << 18, 2), ((1 << 18) + 1, 4),
     (1 << 20, 4), ((1 << 20) + 1, 8), (1 << 24, 8)],
)  # fmt: skip
def test_the_high_plane_is_as_narrow_as_the_vocabulary_allows(vocab_size: int, bits: int) -> None:
    assert high_bits(vocab_size) == bits


def test_a_record_by_hand() -> None:
    document = DocumentCandidates(
        positions=np.array([3, 7], np.int32),
        offsets=np.array([0, 2, 3], np.int64),
        ids=np.array([5, 70_000, 131_071], np.int32),
        lse=np.array([1.0, -2.0], np.float32),
        label_logprob=np.array([-0.5, -4.0], np.float32),
        tail_mass=np.array([0.25, 0.0], np.float32),
        logits=np.array([1.5, 2.5, -3.5], np.float32),
    )
    expected = struct.pack("<I2i2B", 2, 3, 7, 2 - 1, 1 - 1)
    expected += struct.pack("<2e2e2e", 1.0, -2.0, -0.5, -4.0, 0.25, 0.0)
    expected += struct.pack("<3HB", 5, 70_000 - 65_536, 65_535, 0b01_01_00)
    expected += struct.pack("<3e", 1.5, 2.5, -3.5)
    assert encode_record(document, vocab_size=151_936, logits="fp16") == expected


def test_this_version_writes_the_golden_bytes(tmp_path: Path) -> None:
    golden = CandidateReader(GOLDEN)
    writer = CandidateWriter(tmp_path, golden.description)
    for number in writer.missing_shards():
        with writer.shard(number) as shard:
            for document_id in golden.description.documents(number):
                shard.add(document_id, golden[document_id])
    writer.finish()
    assert contents(tmp_path) == contents(GOLDEN)


def test_this_version_reads_the_golden_bytes() -> None:
    reader = CandidateReader(GOLDEN)
    require_sound(reader)
    document = reader[3]
    assert document.positions.tolist() == [1084, 1961, 2543]
    assert document.ids.tolist() == [27555, 35979, 121741, 132067, 50473, 65807]
    assert document.offsets.tolist() == [0, 4, 5, 6]
    assert document.logits is not None
    assert document.logits.dtype == np.float32


def test_fp32_is_rounded_to_the_nearest_fp16(tmp_path: Path) -> None:
    description = describe(num_documents=1, vocab_size=2)
    values = np.array([12.3456789], np.float32)
    document = DocumentCandidates(
        positions=np.array([0], np.int32), offsets=np.array([0, 1]), ids=np.array([1], np.int32),
        lse=values, label_logprob=-values, tail_mass=values / 100, logits=None,
    )  # fmt: skip
    writer = CandidateWriter(tmp_path, description)
    with writer.shard(0) as shard:
        shard.add(0, document)
    writer.finish()
    lse = CandidateReader(tmp_path)[0].lse
    assert abs(float(lse[0]) - 12.3456789) <= 2.0**-8  # half a step of fp16 between 8 and 16
    assert lse[0] != values[0]
