"""Writing a frozen corpus, document by document; ``corpus.py`` describes the files."""

from __future__ import annotations

import array
import os
from contextlib import ExitStack
from dataclasses import asdict
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_replay.data.corpus import (
    CORPUS_VERSION,
    MASK_HEADER,
    MASK_MAGIC,
    ContentFingerprint,
    CorpusDescription,
    corpus_file,
    idx_bytes,
)
from megatron_replay.data.document import Document
from megatron_replay.data.tokenizer import Tokenizer
from megatron_replay.errors import DataError
from megatron_replay.files import atomic_file, make_directory, write_json


class CorpusWriter:
    """Write documents to ``PREFIX.*`` as they come; memory: four bytes a document.

    Nothing appears under the prefix until the block ends, and nothing at all if it raises. An older
    corpus under the same prefix loses its PREFIX.json first, so no moment shows a mixture of two.

    Raises:
        DataError: a document that cannot be in a corpus, or no document at all.
        OutputError: the files cannot be written.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        tokenizer: Tokenizer,
        *,
        row_format: str,
        source: dict[str, Any],
    ) -> None:
        self._prefix, self._tokenizer = prefix, tokenizer
        self._row_format, self._source = row_format, source
        self._lengths = array.array("i")
        self._num_loss_tokens = 0
        self._fingerprint = ContentFingerprint()
        self._files = ExitStack()

    def __enter__(self) -> CorpusWriter:
        make_directory(corpus_file(self._prefix, "json").parent)
        with ExitStack() as opened:
            self._tokens = opened.enter_context(atomic_file(corpus_file(self._prefix, "bin")))
            self._loss_mask = opened.enter_context(
                atomic_file(corpus_file(self._prefix, "loss_mask"))
            )
            self._loss_mask.write(bytes(MASK_HEADER.size))  # the count is known at the end
            self._files = opened.pop_all()
        return self

    def add(self, document: Document) -> None:
        """Append one document."""
        tokens = document.tokens.astype("<i4")
        if len(tokens) < 2:
            raise DataError("a document needs two tokens: one to see, one to predict")
        if tokens.min() < 0 or tokens.max() >= self._tokenizer.vocab_size:
            raise DataError(
                "a token lies outside the vocabulary",
                expected=f"0 to {self._tokenizer.vocab_size - 1}",
                found=f"{tokens.min()} to {tokens.max()}",
            )
        loss_mask = document.loss_mask.astype(np.uint8)
        assert loss_mask.shape == tokens.shape, (loss_mask.shape, tokens.shape)
        for stream, digest, data in (
            (self._tokens, self._fingerprint.tokens, tokens.tobytes()),
            (self._loss_mask, self._fingerprint.loss_mask, loss_mask.tobytes()),
        ):
            stream.write(data)
            digest.update(data)
        self._lengths.append(len(tokens))
        self._num_loss_tokens += int(np.count_nonzero(loss_mask[1:]))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._files.__exit__(kind, error, trace)  # removes the temporary files
            return
        with self._files:  # what is raised below removes them too
            lengths_D = np.array(self._lengths, dtype=np.int32)
            if not len(lengths_D):
                raise DataError("no document to write", where=self._prefix)
            num_tokens = int(lengths_D.sum(dtype=np.int64))
            self._loss_mask.seek(0)
            self._loss_mask.write(MASK_HEADER.pack(MASK_MAGIC, CORPUS_VERSION, num_tokens))
            corpus_file(self._prefix, "json").unlink(missing_ok=True)
        with atomic_file(corpus_file(self._prefix, "idx")) as handle:
            handle.write(idx_bytes(lengths_D))
        description = self._description(lengths_D, num_tokens)
        write_json(corpus_file(self._prefix, "json"), asdict(description))

    def _description(self, lengths_D: npt.NDArray[np.int32], num_tokens: int) -> CorpusDescription:
        return CorpusDescription(
            version=CORPUS_VERSION,
            num_documents=len(lengths_D),
            num_tokens=num_tokens,
            num_loss_tokens=self._num_loss_tokens,
            vocab_size=self._tokenizer.vocab_size,
            tokenizer_path=str(self._tokenizer.path),
            tokenizer_fingerprint=self._tokenizer.fingerprint,
            eos_id=self._tokenizer.eos_id,
            pad_id=self._tokenizer.pad_id,
            format=self._row_format,
            source=self._source,
            fingerprint=self._fingerprint.hexdigest(lengths_D),
        )
