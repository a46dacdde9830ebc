"""The rows of the benchmark of shared prefixes: Spider's, or generated ones that share as much."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.stages import (
    ANSWER,
    random_documents,
    save_corpus,
    schema_documents,
)
from megatron_replay.data.corpus import Corpus, Document
from megatron_replay.data.forest import Forest, stems
from megatron_replay.data.loader import GlobalBatches
from megatron_replay.data.packing import forest_of
from megatron_replay.data.row_formats import tokenize_row
from megatron_replay.data.rows import Row
from megatron_replay.data.tokenizer import load_tokenizer
from megatron_replay.evaluation.sql.sets import read_questions

#: The paper's step: packs, and tokens of a pack.
PACKS, SEQ_LENGTH = 16, 4096
GROUP = 8
#: Of generated rows: databases, documents, and the standard deviation of the logarithm of a
#: database's number of documents.
DATABASES, DOCUMENTS, SPREAD = 140, 6904, 0.8


def spider_rows(directory: Path, tokenizer_path: Path) -> list[Document]:
    """Spider's training questions as tools/preprocess_data.py makes them, ids renumbered."""
    tokenizer = load_tokenizer(tokenizer_path)
    documents = [
        tokenize_row(
            Row(question.where, {"prompt": question.prompt, "completion": question.gold}),
            "prompt",
            tokenizer,
        )
        for question in read_questions(directory / "train_spider.json", "spider")
    ]
    known = np.unique(np.concatenate([document.tokens for document in documents]))
    return [
        replace(document, tokens=np.searchsorted(known, document.tokens).astype(np.int32))
        for document in documents
    ]


def generated_rows(vocab_size: int) -> list[Document]:
    """Schemas with log-normal numbers of documents, which share as much as Spider's rows."""
    normal = statistics.NormalDist()
    places = [(k + 0.5) / DATABASES for k in range(DATABASES)]
    sizes = np.exp(SPREAD * np.array([normal.inv_cdf(place) for place in places]))
    counts = np.rint(DOCUMENTS * sizes / sizes.sum()).astype(int)
    return list(schema_documents(vocab_size, counts.tolist()))


@dataclass(frozen=True)
class Rows:
    """What is measured: parts of the corpus, and a step of rows that share nothing."""

    random: Corpus
    grouped: Corpus
    stage0: Corpus
    nothing: Corpus

    @staticmethod
    def of(folder: Path, vocab_size: int, documents: Sequence[Document]) -> Rows:
        whole = save_corpus(folder / "whole", vocab_size, documents)
        print_shares(whole)
        stem_D = stems(whole, whole.lengths)

        def part(name: str, ids: Sequence[int]) -> Corpus:
            return save_corpus(folder / name, vocab_size, [documents[i] for i in ids])

        # Every eighth schema, by size: of the eight choices the one that shares as all rows do.
        known, sizes = np.unique(stem_D, return_counts=True)
        by_size = known[np.argsort(sizes, kind="stable")]
        eighths = [np.flatnonzero(np.isin(stem_D, by_size[k::8])) for k in range(8)]
        share = share_of(forest(whole))
        eighth = min(eighths, key=lambda ids: abs(share_of(forest(whole, ids)) - share))
        random = typical_step(whole, None)
        alike = [(len(documents[i]) - ANSWER, ANSWER) for i in random[::32]]
        return Rows(
            random=part("random", random),
            grouped=part("grouped", typical_step(whole, stem_D)),
            stage0=part("stage0", eighth.tolist()),
            nothing=save_corpus(
                folder / "nothing", vocab_size, random_documents(vocab_size, alike)
            ),
        )


def typical_step(corpus: Corpus, stem_D: Any) -> list[int]:
    """Of the steps of an epoch, the one that shares most nearly as much as all of them do.

    ``stem_D``: for groups; None: random order.
    """
    batches = GlobalBatches(
        corpus.lengths,
        seq_length=SEQ_LENGTH,
        global_batch_size=PACKS,
        seed=0,
        epochs=1,
        stem_D=stem_D,
        group=GROUP,
    )
    step_K = [batches.documents(k) for k in range(batches.num_batches)]
    forests = [forest(corpus, step) for step in step_K]
    epoch = sum(f.computed for f in forests) / sum(f.positions for f in forests)
    k = int(np.argmin([abs(share_of(f) - epoch) for f in forests[:-1]]))
    order = "random order" if stem_D is None else f"groups of {GROUP}"
    print(
        f"  {PACKS} packs, {order}: an epoch {epoch:.3f}, the step measured "
        f"{share_of(forests[k]):.3f}"
    )
    return [int(document) for document in step_K[k]]


def forest(corpus: Corpus, ids: Any = None, *, share: bool = True) -> Forest:
    ids = np.arange(len(corpus)) if ids is None else ids
    return forest_of(corpus, ids, corpus.lengths, share=share)


def share_of(forest: Forest) -> float:
    return forest.computed / forest.positions


def labels(corpus: Corpus) -> int:
    return corpus.description.num_loss_tokens


def print_shares(whole: Corpus) -> None:
    """Of all tokens, how many are computed."""
    rng = np.random.default_rng(0)
    print(
        f"{len(whole):,} documents, {whole.lengths.mean():.0f} tokens each, "
        f"{labels(whole) / len(whole):.0f} with loss\n"
        f"computed of all tokens: the whole corpus {share_of(forest(whole)):.3f}"
    )
    for count in (64, 128, 256):
        drawn = [rng.choice(len(whole), count, replace=False) for _ in range(20)]
        mean = statistics.mean(share_of(forest(whole, ids)) for ids in drawn)
        print(f"  {count} documents at random {mean:.3f}")
