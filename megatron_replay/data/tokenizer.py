"""Tokenizers: a Hugging Face directory, or a sentencepiece ``.model`` file. Nothing is downloaded.

transformers and sentencepiece are imported when a tokenizer is loaded, not before: reading a frozen
corpus needs neither, and transformers alone costs seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_replay.data.tokenizer_limits import (
    MAX_TEXT,
    render_limits,
    require_declared_ids,
    require_ids,
    tokenizer_files,
)
from megatron_replay.errors import DataError
from megatron_replay.files import open_regular, require_regular, sha256_of_files

# What transformers may open: a tokenizer's files, model configurations, other vocabularies.
_OPENED_FILES = ("*.json", "*.txt", "*.jinja")
_MAX_TEMPLATE = 1 << 20  # characters; published ones have up to 50,000
Message = Mapping[str, Any]


class TextError(DataError):
    """The tokenizer, or its chat template, fails on a text. It does not know where that is."""


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        path: the directory or file it was loaded from.
        vocab_size: ids are in [0, vocab_size); a model's embedding may have more rows.
        eos_id: the end-of-sequence token.
        bos_id: the beginning-of-sequence token; None where there is none.
        adds_bos: the tokenizer itself puts it before a text, as its model expects.
        pad_id: the token at empty positions; the EOS where the tokenizer names no padding token.
            That is harmless: padding carries no loss, and no document attends to it.
        special_ids: control tokens (turn markers, BOS, EOS, padding).
        files: SHA-256 by name of each file that decides the ids.
        fingerprint: SHA-256 of all of them.
        chat_template: the Jinja source that renders conversations; None where there is none.
    """

    vocab_size: int
    eos_id: int
    bos_id: int | None
    adds_bos: bool = False
    pad_id: int
    special_ids: frozenset[int]
    chat_template: str | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = tokenizer_digests(path)
        self.fingerprint = sha256_of_files(tokenizer_files(path))

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; no BOS, EOS or other special token is added.

        A Hugging Face tokenizer reads a special token spelled out in ``text`` as that token.

        Raises:
            TextError: the tokenizer fails on it.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens included; ids beyond the vocabulary have no text."""

    def rules(self) -> str:
        """What decides ids and text, whatever the files' notation; equal: one tokenizer."""
        return self.fingerprint

    def render_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool, **variables: Any
    ) -> str:
        """A conversation as the tokenizer's own template writes it, within ``render_limits``.

        Args:
            variables: others that the template may read, such as ``enable_thinking``.

        Raises:
            TextError: there is no template, it fails on the conversation, or writes too much.
        """
        raise TextError(
            "the tokenizer has no chat template",
            where=self.path,
            fix="Use an instruction-tuned model's directory, or prompt/completion rows",
        )


def tokenizer_digests(path: str | os.PathLike[str]) -> dict[str, str]:
    """SHA-256 by name of each file of a tokenizer that decides which ids a text becomes.

    Args:
        path: a Hugging Face directory (one without a tokenizer gives {}), or a ``.model`` file.

    Raises:
        DataError: nothing is there, or a file is no regular file, too large or not readable.
    """
    path, digests = Path(path), {}
    for file in tokenizer_files(path):
        with open_regular(file, DataError) as handle:
            name = file.relative_to(path if path.is_dir() else path.parent).as_posix()
            digests[name] = hashlib.sha256(handle.read()).hexdigest()
    return digests


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load a Hugging Face tokenizer directory or a sentencepiece ``.model`` file.

    Raises:
        DataError: nothing is there, it cannot be read, is damaged, or has no EOS token.
    """
    path = Path(path)
    return _HuggingFaceTokenizer(path) if path.is_dir() else _SentencePieceTokenizer(path)


class _HuggingFaceTokenizer(Tokenizer):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if not self.files:
            raise DataError(
                "no tokenizer files in this directory",
                where=path,
                expected="tokenizer.json, or a vocabulary with tokenizer_config.json",
            )
        for file in (file for pattern in _OPENED_FILES for file in path.glob(pattern)):
            if os.path.exists(file) and not (file.is_file() or file.is_dir()):  # such as a pipe
                require_regular(file, DataError)
        with _failing("cannot load the tokenizer", DataError, where=path):
            self._load()

    def _load(self) -> None:
        from transformers import AutoTokenizer

        for file in sorted(self.files):
            require_declared_ids(self.path / file)
        backend = self._backend = AutoTokenizer.from_pretrained(
            self.path, local_files_only=True, trust_remote_code=False
        )
        # Documents may be longer than a model's context; transformers would warn at each.
        backend.model_max_length = 1 << 62
        # Added tokens may leave holes, so the number of entries is not the bound.
        self.vocab_size = max(backend.get_vocab().values()) + 1
        require_ids([self.vocab_size - 1], self.path)
        self.eos_id = _require_eos(backend.eos_token_id, self.path)
        self.bos_id = backend.bos_token_id
        self.adds_bos = self.bos_id is not None and backend.encode("a")[0] == self.bos_id
        pad_id = backend.pad_token_id
        self.pad_id = self.eos_id if pad_id is None else pad_id
        added = backend.added_tokens_decoder
        special = {id_ for id_, token in added.items() if token.special}
        self.special_ids = frozenset(special | {self.eos_id, self.pad_id})
        template = backend.chat_template
        if isinstance(template, dict):  # several by name
            template = template.get("default")
        if template and not (isinstance(template, str) and len(template) <= _MAX_TEMPLATE):
            is_text = isinstance(template, str)
            raise DataError(
                f"the chat template is {'too large' if is_text else 'no text'}",
                where=self.path,
                expected=f"at most {_MAX_TEMPLATE} characters",
                found=len(template) if is_text else type(template).__name__,
            )
        self.chat_template = template or None

    def encode(self, text: str) -> list[int]:
        with _failing("the tokenizer cannot encode the text", TextError):
            return list(self._backend.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        return str(
            self._backend.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def rules(self) -> str:
        backend = getattr(self._backend, "backend_tokenizer", None)
        if backend is None:  # written in Python: its files are all there is to compare
            return self.fingerprint
        content = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
        return json.dumps([content, self.eos_id, self.chat_template], sort_keys=True)

    def render_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool, **variables: Any
    ) -> str:
        if self.chat_template is None:
            return super().render_chat(messages, add_generation_prompt)
        with (
            _failing("the chat template refuses the conversation", TextError),
            render_limits(),
        ):
            text = self._backend.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **variables,
            )
        if len(text) > MAX_TEXT:
            raise TextError(
                "the chat template writes too much",
                expected=f"at most {MAX_TEXT} characters",
                found=len(text),
            )
        return str(text)


class _SentencePieceTokenizer(Tokenizer):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise DataError(
                "this file needs the sentencepiece package",
                where=path,
                fix="Run: pip install sentencepiece",
            ) from error
        self._backend = SentencePieceProcessor()
        with _failing("not a sentencepiece model", DataError, where=path):
            self._backend.LoadFromFile(str(path))
        self.vocab_size = self._backend.vocab_size()
        eos_id, pad_id = self._backend.eos_id(), self._backend.pad_id()  # -1: there is none
        self.eos_id = _require_eos(None if eos_id < 0 else eos_id, path)
        self.pad_id = self.eos_id if pad_id < 0 else pad_id
        bos_id = self._backend.bos_id()
        self.bos_id = None if bos_id < 0 else bos_id
        self.special_ids = frozenset(filter(self._backend.IsControl, range(self.vocab_size)))

    def encode(self, text: str) -> list[int]:
        with _failing("the tokenizer cannot encode the text", TextError):
            return list(self._backend.encode(text, out_type=int))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode([i for i in ids if i < self.vocab_size]))


@contextmanager
def _failing(what: str, kind: type[DataError], **facts: Any) -> Iterator[None]:
    """Raise any error of the block as a ``kind``.

    Neither the libraries nor a chat template promise a type, and a Rust panic is no Exception.
    """
    try:
        yield
    except (DataError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = str(error) or type(error).__name__
        raise kind(f"{what}: {reason[:500]}", **facts) from error


def _require_eos(eos_id: int | None, path: Path) -> int:
    if eos_id is None:
        raise DataError(
            "the tokenizer has no EOS token",
            where=path,
            fix="Name one: eos_token in tokenizer_config.json",
        )
    return eos_id
