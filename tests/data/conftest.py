from __future__ import annotations

import pytest

from megatron_replay.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.tiny_tokenizers import save_hugging_face, save_sentencepiece


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(save_hugging_face(tmp_path_factory.mktemp("hf") / "tokenizer"))


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(save_sentencepiece(tmp_path_factory.mktemp("sp") / "tiny.model"))
