"""Tokenizers: a Hugging Face directory, or a sentencepiece ``.model`` file. Nothing is downloaded.

transformers and sentencepiece are imported when a tokenizer is loaded, not before: reading a frozen
corpus needs neither, and transformers alone costs seconds.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_replay.errors import DataError
from megatron_replay.files import sha256_of_files

# Everything in a Hugging Face directory that decides which ids a text becomes.
_TOKENIZER_FILES = (
    "tokenizer*.json",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "*.model",
    "*.tiktoken",
)

Message = Mapping[str, Any]


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        path: the directory or file it was loaded from.
        vocab_size: ids lie in [0, vocab_size); a model's embedding may have more rows.
        eos_id: the end-of-sequence token.
        pad_id: what empty positions hold; the EOS where the tokenizer names no padding token.
            That is harmless: padding is known by its document id (-1), never by its token.
        special_ids: control tokens (turn markers, BOS, EOS, padding).
        fingerprint: SHA-256 of the files that decide the ids.
    """

    path: Path
    vocab_size: int
    eos_id: int
    pad_id: int
    special_ids: frozenset[int]
    fingerprint: str

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; no BOS, EOS or other special token is added.

        A Hugging Face tokenizer reads a special token spelled out in ``text`` as that token.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens included.

        A model may have more rows than its tokenizer has tokens, and say one: it has no text.
        """

    @abstractmethod
    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool
    ) -> list[int]:
        """Ids of a conversation as the tokenizer's own template renders it.

        Raises:
            DataError: there is no template, or it refuses the conversation.
        """


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load a Hugging Face tokenizer directory or a sentencepiece ``.model`` file.

    Raises:
        DataError: nothing is there, it cannot be read, or it has no EOS token.
    """
    path = Path(path)
    if path.is_dir():
        return _HuggingFaceTokenizer(path)
    if path.is_file() and path.suffix == ".model":
        return _SentencePieceTokenizer(path)
    raise DataError(
        "no tokenizer here",
        where=path,
        expected="a Hugging Face directory or a sentencepiece .model file",
        found="another kind of file" if path.exists() else "nothing",
    )


class _HuggingFaceTokenizer(Tokenizer):
    def __init__(self, path: Path) -> None:
        files = {file for pattern in _TOKENIZER_FILES for file in path.glob(pattern)}
        if not files:
            raise DataError(
                "no tokenizer files in this directory",
                where=path,
                expected="tokenizer.json, or a vocabulary with tokenizer_config.json",
            )
        self.path = path
        self.fingerprint = sha256_of_files(list(files))
        self._backend = self._load(path)
        # Added tokens may leave holes, so the number of entries is not the bound.
        self.vocab_size = max(self._backend.get_vocab().values()) + 1
        self.eos_id = _require_eos(self._backend.eos_token_id, path)
        pad_id = self._backend.pad_token_id
        self.pad_id = self.eos_id if pad_id is None else pad_id
        added = self._backend.added_tokens_decoder
        self.special_ids = frozenset(
            {id_ for id_, token in added.items() if token.special} | {self.eos_id, self.pad_id}
        )

    @staticmethod
    def _load(path: Path) -> Any:
        from transformers import AutoTokenizer

        try:
            backend = AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers promises no type here
            raise DataError(f"cannot load the tokenizer: {error}", where=path) from error
        # Documents may be longer than a model's context; transformers would warn at each.
        backend.model_max_length = 1 << 62
        return backend

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        return str(
            self._backend.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool
    ) -> list[int]:
        from jinja2 import TemplateError

        if not self._backend.chat_template:
            raise DataError(
                "the tokenizer has no chat template",
                where=self.path,
                fix="Use an instruction-tuned model's tokenizer, or prompt/completion rows",
            )
        try:
            # return_dict=False: transformers 5 would otherwise return a BatchEncoding.
            ids = self._backend.apply_chat_template(
                list(messages), add_generation_prompt=add_generation_prompt, return_dict=False
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise DataError(f"the chat template refuses the conversation: {error}") from error
        return list(ids)


class _SentencePieceTokenizer(Tokenizer):
    def __init__(self, path: Path) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise DataError(
                "this file needs the sentencepiece package",
                where=path,
                fix="Run: pip install sentencepiece",
            ) from error
        self._backend = SentencePieceProcessor()
        try:
            self._backend.LoadFromFile(str(path))
        except (RuntimeError, OSError) as error:
            raise DataError(f"not a sentencepiece model: {error}", where=path) from error
        self.path = path
        self.fingerprint = sha256_of_files([path])
        self.vocab_size = self._backend.vocab_size()
        eos_id, pad_id = self._backend.eos_id(), self._backend.pad_id()  # -1: there is none
        self.eos_id = _require_eos(None if eos_id < 0 else eos_id, path)
        self.pad_id = self.eos_id if pad_id < 0 else pad_id
        self.special_ids = frozenset(
            id_ for id_ in range(self.vocab_size) if self._backend.IsControl(id_)
        )

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text, out_type=int))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode([i for i in ids if i < self.vocab_size]))

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool
    ) -> list[int]:
        raise DataError(
            "a sentencepiece model has no chat template",
            where=self.path,
            fix="Use a Hugging Face tokenizer directory, or prompt/completion rows",
        )


def _require_eos(eos_id: int | None, path: Path) -> int:
    if eos_id is None:
        raise DataError(
            "the tokenizer has no EOS token",
            where=path,
            fix="Name one: eos_token in tokenizer_config.json",
        )
    return eos_id
