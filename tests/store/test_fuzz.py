"""A short attack on every run; a long one is in docs/log.md."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_replay.errors import StoreError
from megatron_replay.store.document import CandidateBatch, DocumentCandidates
from megatron_replay.store.format import decode_record, encode_record
from megatron_replay.store.reader import decode_batch
from tests.store.examples import describe, document_of
from tests.store.fuzz import attack, damaged, seeds


def test_damaged_stores_are_read_or_refused(tmp_path: Path) -> None:
    stores = seeds()
    found = []
    for case in range(400):
        draw = random.Random(case)
        directory = tmp_path / str(case)
        directory.mkdir()
        found.append(attack(damaged(draw, draw.choice(stores)), directory))
    assert 20 < sum(found) < 380  # both ends are reached


def by_definition(record: bytes, vocab_size: int, logits: str) -> DocumentCandidates:
    return decode_record(memoryview(record), vocab_size=vocab_size, logits=logits)


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
    description = describe(vocab_size=vocab_size, logits=logits)
    records = [memoryview(record)] * 3
    try:
        expected = CandidateBatch.of([by_definition(record, vocab_size, logits)] * 3)
    except StoreError as error:
        with pytest.raises(StoreError, match=f"^record 0: {re.escape(str(error))}$"):
            decode_batch(records, description, lambda i: f"record {i}")
        return
    found = decode_batch(records, description, lambda i: f"record {i}")
    for name, value in vars(expected).items():
        other = getattr(found, name)
        if value is None:
            assert other is None
        else:
            assert other.dtype == value.dtype, name
            assert other.tobytes() == value.tobytes(), name


def test_bytes_of_any_kind_are_no_record() -> None:
    for seed in range(200):
        record = random.Random(seed).randbytes(seed)
        with pytest.raises(StoreError):
            by_definition(record, 151_936, "fp16")
