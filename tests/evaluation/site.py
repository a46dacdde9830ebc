"""What tools/evaluate.py is tried on: a very small Qwen3, a tokenizer of bytes, and every input."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_replay.checkpoint.hf import HFReader
from megatron_replay.checkpoint.model_files import digests_of
from megatron_replay.data.corpus import Corpus, Document
from megatron_replay.data.corpus_writer import CorpusWriter
from megatron_replay.data.tokenizer import load_tokenizer
from megatron_replay.store import DocumentCandidates
from tests.data.tiny_tokenizers import CHATML
from tests.store.examples import describe, write_store
from tests.tiny import save_qwen3

VOCAB_SIZE, EOS = 257, 256
#: No query of these tests is stopped because the machine is busy.
SLOW_MACHINE = ("--query-seconds=600", "--gold-seconds=600")


def save_model(directory: Path, *, scale: float = 1.0, **changes: Any) -> Path:
    """Bytes are the tokens, so that any text can be read and, with all of them, written."""
    settings = {"tied": True, "vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    save_qwen3(directory, **(settings | changes))
    save_tokenizer(directory)
    file = directory / "model.safetensors"
    save_file({k: scale * v for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    return directory


def save_tokenizer(directory: Path) -> None:
    """Of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(directory)


def save_chat_model(directory: Path, **changes: Any) -> Path:
    """Bytes, turn markers and ChatML; as in Qwen3's base models, EOS ends no turn."""
    save_model(directory, vocab_size=VOCAB_SIZE + 2, **changes)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(directory)
    return directory


def random_documents(count: int, *, seed: int = 0, longest: int = 20) -> list[Document]:
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        n = int(rng.integers(2, longest + 1))
        loss_mask = rng.random(n) < 0.6
        loss_mask[-1] = True
        documents.append(Document(rng.integers(0, VOCAB_SIZE, n).astype(np.int32), loss_mask))
    return documents


def candidates_of(positions: list[int], sets: list[list[int]]) -> DocumentCandidates:
    zeros = np.zeros(len(positions), dtype=np.float32)
    return DocumentCandidates(
        positions=np.array(positions, dtype=np.int32),
        offsets=np.cumsum([0, *map(len, sets)]).astype(np.int64),
        ids=np.array([i for ids in sets for i in ids], dtype=np.int32),
        lse=zeros,
        label_logprob=zeros,
        tail_mass=zeros,
        logits=None,
    )


def random_candidates(document: Document, rng: np.random.Generator) -> DocumentCandidates:
    positions = document.eligible_positions().tolist()
    sets = [
        sorted({int(document.tokens[t + 1]), *rng.integers(0, VOCAB_SIZE, 30).tolist()})
        for t in positions
    ]
    return candidates_of(positions, sets)


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_database(path: Path, *statements: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()
    return path


def write_corpus(prefix: Path, base: Path, documents: list[Document]) -> Corpus:
    tokenizer = load_tokenizer(base)
    with CorpusWriter(prefix, tokenizer, row_format="random", source={}) as corpus:
        for document in documents:
            corpus.add(document)
    return Corpus(prefix)


def build_site(site: Path) -> Path:
    """A base, a model that differs from it, and every kind of input."""
    save_model(site / "base")
    tuned = load_file(save_model(site / "tuned", scale=1.01) / "model.safetensors")
    (site / "weights").mkdir()
    save_file(tuned, site / "weights" / "model.safetensors")
    write_rows(site / "text.jsonl", {"text": "general text " * 9}, {"text": "more"})
    write_rows(
        site / "questions.jsonl",
        {"prompt": "how many?\n", "completion": "select count(*) from book"},
        {"prompt": "which?\n", "completion": "select title from book"},
    )
    choice = {"prompt": "who?\n", "options": ["you", "me"], "answer": 1}
    write_rows(site / "choices.jsonl", choice, choice | {"answer": 0})
    write_rows(site / "wrong.jsonl", choice | {"options": ["me"] * 2})  # the first of equals wins
    create, insert = "create table book (title text)", "insert into book values ('a')"
    write_database(site / "database.sqlite", create, insert)
    documents, rng = random_documents(5), np.random.default_rng(0)
    corpus = write_corpus(site / "corpus", site / "base", documents)
    description = describe(
        vocab_size=VOCAB_SIZE,
        documents_per_shard=len(documents),
        corpus_fingerprint=corpus.fingerprint,
        tokenizer_fingerprint=corpus.tokenizer_fingerprint,
        checkpoint_fingerprint=digests_of(HFReader(site / "base").files()),
    )
    draw = {number: random_candidates(document, rng) for number, document in enumerate(documents)}
    write_store(site / "store", description, lambda _, number: draw[number])
    return site
