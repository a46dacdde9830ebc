"""What tools/evaluate.py is tried on, and what stands in for measuring it."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from megatron_replay.checkpoint.hf import HFReader
from megatron_replay.checkpoint.model_files import digests_of
from megatron_replay.data.corpus import Corpus
from megatron_replay.data.corpus_writer import CorpusWriter
from megatron_replay.data.tokenizer import load_tokenizer
from megatron_replay.store import CandidateWriter, StoreDescription
from tests.evaluation.models import VOCAB_SIZE, random_documents, save_model
from tests.evaluation.test_candidate_mass import random_candidates


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def build_site(site: Path) -> Path:
    """A base, a model that differs from it, and every kind of input."""
    save_model(site / "base")
    weights = load_file(save_model(site / "tuned") / "model.safetensors")
    tuned = {name: 1.01 * tensor for name, tensor in weights.items()}
    save_file(tuned, site / "tuned" / "model.safetensors", metadata={"format": "pt"})
    write_rows(site / "text.jsonl", {"text": "general text " * 9}, {"text": "more"})
    write_rows(
        site / "questions.jsonl",
        {"prompt": "how many?\n", "completion": "select count(*) from book"},
        {"prompt": "which?\n", "completion": "select title from book"},
    )
    choice = {"prompt": "who?\n", "options": ["you", "me"], "answer": 1}
    write_rows(site / "choices.jsonl", choice, choice | {"answer": 0})
    write_rows(site / "wrong.jsonl", choice | {"options": ["me"] * 2})  # the first of equals wins
    connection = sqlite3.connect(site / "database.sqlite")
    connection.execute("create table book (title text)")
    connection.execute("insert into book values ('a')")
    connection.commit()
    connection.close()
    (site / "weights").mkdir()
    save_file(tuned, site / "weights" / "model.safetensors")
    _write_corpus_and_store(site)
    return site


def _write_corpus_and_store(site: Path) -> None:
    documents, rng = random_documents(5), np.random.default_rng(0)
    tokenizer = load_tokenizer(site / "base")
    with CorpusWriter(site / "corpus", tokenizer, row_format="random", source={}) as corpus:
        for document in documents:
            corpus.add(document)
    frozen = Corpus(site / "corpus")
    writer = CandidateWriter(
        site / "store",
        StoreDescription(
            vocab_size=VOCAB_SIZE,
            num_documents=len(documents),
            documents_per_shard=len(documents),
            codec="planar",
            logits="none",
            corpus_fingerprint=frozen.fingerprint,
            tokenizer_fingerprint=frozen.tokenizer_fingerprint,
            checkpoint_fingerprint=digests_of(HFReader(site / "base").files()),
            selection={},
        ),
    )
    with writer.shard(0) as shard:
        for number, document in enumerate(documents):
            shard.add(number, random_candidates(document, rng))
    writer.finish()


#: No query of these tests is stopped because the machine is busy.
SLOW_MACHINE = "--query-seconds=600"


def flags(site: Path, output: Path) -> list[str]:
    return [
        f"--base={site / 'base'}",
        f"--model=tuned={site / 'tuned'}",
        f"--sql=books={site}",
        f"--choices=domain={site / 'choices.jsonl'}",
        f"--general-choices=general={site / 'choices.jsonl'}",
        f"--general-text={site / 'text.jsonl'}",
        f"--data={site / 'questions.jsonl'}",
        f"--data-path={site / 'corpus'}",
        f"--store={site / 'store'}",
        f"--output={output}",
        "--max-new-tokens=4",
        SLOW_MACHINE,
    ]


class Measuring:
    """Stands in for `measure`: remembers what it measured, and is cut off at the model ``stop``."""

    def __init__(self) -> None:
        self.measured: list[str] = []
        self.stop = ""

    def __call__(self, name: str, path: Path, *_: object, **__: object) -> dict[str, Any]:
        if path.name == self.stop:
            raise KeyboardInterrupt
        self.measured.append(path.name)
        return {"general": {"perplexity": float(len(path.name))}}
