"""Small corpora without a tokenizer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from megatron_replay.data.corpus import Corpus, Document
from megatron_replay.data.corpus_writer import CorpusWriter

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


def write_corpus(prefix: Path, documents: list[Document], **source: object) -> Corpus:
    with CorpusWriter(prefix, FACTS, row_format="text", source=source) as writer:
        for document in documents:
            writer.add(document)
    return Corpus(prefix)
