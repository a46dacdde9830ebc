"""The reader printed in docs/store_format.md is run: the page says enough to read a store."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_replay.store import CandidateReader
from tests.store.examples import describe, write_store

PAGE = Path(__file__).parents[2] / "docs" / "store_format.md"


def printed_code() -> str:
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return code


@pytest.fixture(scope="module")
def read_store() -> Callable[[Path], Iterator[tuple[Any, ...]]]:
    names: dict[str, Any] = {}
    exec(printed_code(), names)
    return names["read_store"]


def test_the_printed_reader_stands_alone() -> None:
    code = printed_code()
    assert len(code.splitlines()) <= 40
    assert "megatron_replay" not in code
    assert "numpy" not in code


@pytest.mark.parametrize("logits", ["none", "fp16", "bf16"])
@pytest.mark.parametrize("vocab_size", [3, 65_536, 65_537, 151_936, 1 << 20, 1 << 24])
def test_the_printed_reader_reads_what_we_wrote(
    tmp_path: Path,
    read_store: Callable[[Path], Iterator[tuple[Any, ...]]],
    vocab_size: int,
    logits: str,
) -> None:
    write_store(
        tmp_path,
        describe(vocab_size=vocab_size, num_documents=9, documents_per_shard=4, logits=logits),
    )
    expected = []
    for document_id, document in enumerate(CandidateReader(tmp_path)):
        for i, position in enumerate(document.positions.tolist()):
            candidates = slice(document.offsets[i], document.offsets[i + 1])
            expected.append(
                (
                    document_id,
                    position,
                    tuple(document.ids[candidates].tolist()),
                    document.lse[i],
                    document.label_logprob[i],
                    document.tail_mass[i],
                    tuple(document.logits[candidates]) if document.logits is not None else None,
                )
            )
    assert list(read_store(tmp_path)) == expected
