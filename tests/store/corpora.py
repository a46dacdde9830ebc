"""Small stores with the corpora that they could have been made from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from megatron_replay.data.corpus import Corpus, Document
from megatron_replay.data.corpus_writer import CorpusWriter
from megatron_replay.store import CandidateReader, CandidateWriter, DocumentCandidates
from tests.store.examples import describe, document_of

VOCAB_SIZE = 70_000


def text_of(document: DocumentCandidates) -> Document:
    """Tokens whose labels at the recorded positions, and no others, carry loss: sets' last ids."""
    labelled = document.positions + 1
    tokens = np.zeros(int(labelled.max(initial=1)) + 1, np.int32)
    loss_mask = np.zeros(len(tokens), np.bool_)
    tokens[labelled], loss_mask[labelled] = document.ids[document.offsets[1:] - 1], True
    return Document(tokens, loss_mask)


def write_corpus(
    prefix: Path, documents: list[Document], *, fingerprint: str = "tokenizer"
) -> Corpus:
    tokenizer: Any = SimpleNamespace(
        path="tokenizer", fingerprint=fingerprint, files={},
        vocab_size=VOCAB_SIZE, eos_id=0, pad_id=0,
    )  # fmt: skip
    with CorpusWriter(prefix, tokenizer, row_format="messages", source={}) as corpus:
        for document in documents:
            corpus.add(document)
    return Corpus(prefix)


def write_both(
    directory: Path, first: int, count: int, **changes: Any
) -> tuple[CandidateReader, list[Document]]:
    """A store of documents ``first`` and on, and their text; the corpus is ``DIRECTORY-corpus``."""
    fields = {"vocab_size": VOCAB_SIZE, "num_documents": count} | changes
    documents = [document_of(describe(**fields), first + i) for i in range(count)]
    texts = [text_of(document) for document in documents]
    corpus = write_corpus(directory.with_name(f"{directory.name}-corpus"), texts)
    description = describe(**(fields | {"corpus_fingerprint": corpus.fingerprint}))
    writer = CandidateWriter(directory, description)
    for number in writer.missing_shards():
        with writer.shard(number) as shard:
            for document_id in description.documents(number):
                shard.add(document_id, documents[document_id])
    writer.finish()
    return CandidateReader(directory), texts
