"""Small corpora without a tokenizer; a row's document, and its text as a reader sees it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_replay.data.corpus import Corpus, Document
from megatron_replay.data.corpus_writer import CorpusWriter
from megatron_replay.data.row_formats import detect_format, tokenize_row
from megatron_replay.data.rows import parse_row
from megatron_replay.errors import DataError

VOCAB_SIZE, PAD_ID = 90_000, 7
# Stands in for a tokenizer where only its facts are needed; ids beyond uint16 are meant.
FACTS = SimpleNamespace(
    path=Path("some/tokenizer"),
    fingerprint="f" * 64,
    files={"tokenizer.json": "e" * 64},
    vocab_size=VOCAB_SIZE,
    eos_id=1,
    pad_id=PAD_ID,
)


def random_documents(lengths: list[int], seed: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    return [
        Document(
            rng.integers(0, VOCAB_SIZE, size=n, dtype=np.int32), rng.integers(0, 2, size=n) > 0
        )
        for n in lengths
    ]


def write_corpus(
    prefix: Path, documents: list[Document], tokenizer: SimpleNamespace = FACTS, **source: object
) -> Corpus:
    with CorpusWriter(prefix, tokenizer, row_format="text", source=source) as writer:
        for document in documents:
            writer.add(document)
    return Corpus(prefix)


def parse(fields):
    return parse_row("rows.jsonl:7", json.dumps(fields).encode())


def document(fields, tokenizer, row_format=None):
    row = parse(fields)
    return tokenize_row(row, row_format or detect_format(row), tokenizer)


def refused(fields, tokenizer, message, row_format=None):
    """The row is, with its line and ``message``."""
    with pytest.raises(DataError, match=rf"^rows.jsonl:7: .*{message}"):
        document(fields, tokenizer, row_format)


def spans(document, tokenizer):
    """The document as [(text, carries loss), ...]: what a reader would check by eye."""
    cuts = [0, *(np.flatnonzero(np.diff(document.loss_mask)) + 1), len(document)]
    return [
        (tokenizer.decode(document.tokens[a:b].tolist()), bool(document.loss_mask[a]))
        for a, b in pairwise(cuts)
    ]


def as_lists(packs):
    return [pack.tolist() for pack in packs]
