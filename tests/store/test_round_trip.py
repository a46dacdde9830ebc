"""What is written is what is read: over all shapes, against hand-built bytes, and for ever."""

from __future__ import annotations

import dataclasses
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_replay.errors import StoreError
from megatron_replay.store import CandidateReader, DocumentCandidates
from megatron_replay.store.document import CandidateBatch, require_valid
from megatron_replay.store.format import decode_ids, decode_record, encode_ids, encode_record
from megatron_replay.store.reader import decode_batch
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
        assert_same(
            decode_record(memoryview(record), vocab_size=vocab_size, logits=logits), document
        )


@pytest.mark.parametrize("logits", ["none", "fp16", "bf16"])
def test_a_store_is_read_as_it_was_written(tmp_path: Path, logits: str) -> None:
    description = describe(num_documents=11, documents_per_shard=4, logits=logits)
    reader = write_store(tmp_path, description)
    assert reader.description == description
    for document_id in [10, 0, 3, 4, 3]:  # any order, and again
        assert_same(reader[document_id], document_of(description, document_id))
    assert len(reader) == len(list(reader)) == 11
    stops = [document_of(description, d).stop for d in range(11)]
    assert reader.stops().tolist() == stops
    batch, without = reader.read([7, 0, 10]), reader.read([7, 0, 10], logits=False)
    assert batch.stops.tolist() == [stops[7], 0, stops[10]]
    assert (batch.logits is None) == (logits == "none")
    assert_same(without, dataclasses.replace(batch, logits=None))
    require_sound(reader)


@settings(deadline=None, derandomize=True)
@given(st.data(), st.sampled_from(VOCABULARIES))
def test_planar_is_the_documented_layout(data: st.DataObject, vocab_size: int) -> None:
    """Against one big integer: field i of the high plane sits at bit ``i * bits``."""
    ids = [*data.draw(st.lists(st.integers(0, vocab_size - 1), max_size=20)), 0, vocab_size - 1]
    bits = next(bits for bits in (0, 1, 2, 4, 8) if vocab_size <= 1 << (16 + bits))
    plane = sum((value >> 16) << (i * bits) for i, value in enumerate(ids))
    expected = struct.pack(f"<{len(ids)}H", *(value % 65_536 for value in ids))
    expected += plane.to_bytes(-(-len(ids) * bits // 8), "little")
    assert encode_ids(np.array(ids, np.int32), vocab_size) == expected
    assert decode_ids(memoryview(expected), len(ids), vocab_size).tolist() == ids


@pytest.mark.parametrize("logits", ["fp16", "bf16"])
def test_a_record_by_hand(logits: str) -> None:
    """Numbers are rounded to the nearest: by struct and by torch, which know fp16 and bf16."""
    numbers = [1.5, 12.3456789, -3.1415927]
    document = DocumentCandidates(
        positions=np.array([3, 7], np.int32),
        offsets=np.array([0, 2, 3], np.int64),
        ids=np.array([5, 70_000, 131_071], np.int32),
        lse=np.array([12.3456789, -2.0], np.float32),
        label_logprob=np.array([-0.5, -4.0], np.float32),
        tail_mass=np.array([0.1, 0.0], np.float32),
        logits=np.array(numbers, np.float32),
    )
    expected = struct.pack("<I2i2B", 2, 3, 7, 2 - 1, 1 - 1)
    expected += struct.pack("<2e2e2e", 12.3456789, -2.0, -0.5, -4.0, 0.1, 0.0)
    expected += struct.pack("<3HB", 5, 70_000 - 65_536, 65_535, 0b01_01_00)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[logits]
    expected += torch.tensor(numbers).to(dtype).view(torch.int16).numpy().astype("<i2").tobytes()
    assert encode_record(document, vocab_size=151_936, logits=logits) == expected


def test_this_version_reads_and_writes_the_golden_bytes(tmp_path: Path) -> None:
    golden = CandidateReader(GOLDEN)
    require_sound(golden)
    document = golden[3]
    assert document.positions.tolist() == [1084, 1961, 2543]
    assert document.ids.tolist() == [27555, 35979, 121741, 132067, 50473, 65807]
    assert document.offsets.tolist() == [0, 4, 5, 6]
    assert document.logits is not None
    write_store(tmp_path, golden.description, lambda _, document_id: golden[document_id])
    assert contents(tmp_path) == contents(GOLDEN)


@st.composite
def damaged_records(draw: st.DrawFn) -> tuple[bytes, int, str]:
    logits = draw(st.sampled_from(["none", "bf16"]))
    vocab_size = draw(st.sampled_from([300, 70_000, 151_936, 1 << 20, 1 << 24]))
    description = describe(vocab_size=vocab_size, logits=logits)
    document = document_of(description, draw(st.integers(0, 30)))
    record = bytearray(encode_record(document, vocab_size=vocab_size, logits=logits))
    for at in draw(st.lists(st.integers(0, len(record) - 1), max_size=3)):
        record[at] = draw(st.integers(0, 255))
    stop = draw(st.one_of(st.just(len(record)), st.integers(0, len(record))))
    return bytes(record[:stop]) + draw(st.binary(max_size=2)), vocab_size, logits


@settings(deadline=None, derandomize=True, max_examples=400)
@given(damaged_records())
def test_the_kernel_takes_and_refuses_what_the_definition_does(
    case: tuple[bytes, int, str],
) -> None:
    record, vocab_size, logits = case
    records = [memoryview(record)] * 3

    def batch() -> CandidateBatch:
        description = describe(vocab_size=vocab_size, logits=logits)
        return decode_batch(records, description, lambda i: f"record {i}")

    try:
        document = decode_record(records[0], vocab_size=vocab_size, logits=logits)
    except StoreError as error:
        with pytest.raises(StoreError, match=f"^record 0: {re.escape(str(error))}$"):
            batch()
    else:
        assert_same(batch(), CandidateBatch.of([document] * 3))


PAGE = Path(__file__).parents[2] / "docs" / "store_format.md"


@pytest.fixture(scope="module")
def read_store() -> Callable[[Path], Iterator[tuple[Any, ...]]]:
    """The reader printed in docs/store_format.md: the page says enough to read a store."""
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 40
    assert not re.search("megatron_replay|numpy", code)
    names: dict[str, Any] = {}
    exec(code, names)
    return names["read_store"]


@pytest.mark.parametrize("logits", ["none", "fp16", "bf16"])
@pytest.mark.parametrize("vocab_size", [3, 65_536, 65_537, 151_936, 1 << 20, 1 << 24])
def test_the_printed_reader_reads_what_we_wrote(
    tmp_path: Path,
    read_store: Callable[[Path], Iterator[tuple[Any, ...]]],
    vocab_size: int,
    logits: str,
) -> None:
    description = describe(
        vocab_size=vocab_size, num_documents=9, documents_per_shard=4, logits=logits
    )
    expected = []
    for document_id, document in enumerate(write_store(tmp_path, description)):
        for i, position in enumerate(document.positions.tolist()):
            chosen = slice(document.offsets[i], document.offsets[i + 1])
            numbers = (document.lse[i], document.label_logprob[i], document.tail_mass[i])
            stored = None if document.logits is None else tuple(document.logits[chosen])
            ids = tuple(document.ids[chosen].tolist())
            expected.append((document_id, position, ids, *numbers, stored))
    assert list(read_store(tmp_path)) == expected
