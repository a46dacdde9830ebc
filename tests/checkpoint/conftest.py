"""Small real Qwen3 directories, as transformers saves them, with a tokenizer's files beside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import Qwen3ForCausalLM

from tests import tiny

SIDE_FILES = {
    "generation_config.json": '{"temperature": 0.6}',
    "tokenizer.json": "{}",
    "tokenizer_config.json": '{"model_max_length": 512}',
    "merges.txt": "a b\n",
    "chat_template.jinja": "{{ messages }}",
    "tokenizer.model": "\x00",
    "vocab.tiktoken": "YQ== 0",
    "additional_chat_templates/rag.jinja": "{{ documents }}",
    "LICENSE": "Terms",
    "Use_Policy.md": "Not for",
}


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory) -> dict[bool, Path]:
    """One file of weights each, tied and untied."""
    folder = tmp_path_factory.mktemp("qwen3")
    directories = {}
    for tied in (True, False):
        directories[tied] = tiny.save_qwen3(folder / f"tied-{tied}", tied=tied)
        for name, content in SIDE_FILES.items():
            (directories[tied] / name).parent.mkdir(exist_ok=True)
            (directories[tied] / name).write_text(content)
        (directories[tied] / "README.md").write_text("the base's card, which is not copied")
        (directories[tied] / "pytorch_model.bin.index.json").write_text("{}")
    return directories


@pytest.fixture(scope="session")
def sharded_qwen3(qwen3, tmp_path_factory) -> dict[bool, Path]:
    """The same models in several files, with an index."""
    folder = tmp_path_factory.mktemp("sharded")
    for tied, directory in qwen3.items():
        model = Qwen3ForCausalLM.from_pretrained(directory)
        model.save_pretrained(folder / f"tied-{tied}", max_shard_size="200KB")
        index = json.loads((folder / f"tied-{tied}" / "model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) > 2
    return {tied: folder / f"tied-{tied}" for tied in qwen3}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict[tuple[bool, int], Path]:
    """Tied and untied, of a vocabulary that TP divides and of one that it does not; in shards."""
    folder, models = tmp_path_factory.mktemp("small"), {}
    for tied in (True, False):
        for vocabulary in (96, 97):
            name = folder / f"{tied}-{vocabulary}"
            models[tied, vocabulary] = tiny.save_qwen3(
                name, tied=tied, vocab_size=vocabulary, hidden_size=16, intermediate_size=24,
                num_hidden_layers=2, head_dim=4,
            )  # fmt: skip
            (name / "tokenizer.json").write_text("{}")
    return models
