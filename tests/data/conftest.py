from __future__ import annotations

import functools

import pytest

from megatron_replay.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.tiny_tokenizers import CHATML, save_hugging_face, save_sentencepiece


@pytest.fixture(scope="session")
def tokenizer(saved) -> Tokenizer:
    return saved()


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(save_sentencepiece(tmp_path_factory.mktemp("sp") / "tiny.model"))


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Make a Hugging Face tokenizer with a chat template, once for each."""

    @functools.cache
    def save(template=CHATML, **more):
        directory = tmp_path_factory.mktemp("hf") / "tokenizer"
        return load_tokenizer(save_hugging_face(directory, chat_template=template, **more))

    return save
