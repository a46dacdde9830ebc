"""Writes a frozen corpus, document by document; ``corpus.py`` describes the files."""

from __future__ import annotations

import array
import hashlib
import os
import zlib
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megatron_replay.data.corpus import (
    CORPUS_VERSION,
    MASK_HEADER,
    MASK_MAGIC,
    MAX_INT32,
    CorpusDescription,
    Document,
    checksum,
    content_fingerprint,
    corpus_file,
    document_crc,
    index_parts,
)
from megatron_replay.data.tokenizer import Tokenizer
from megatron_replay.errors import DataError, OutputError
from megatron_replay.files import (
    atomic_file,
    make_directory,
    open_regular,
    read_json,
    temporary_path,
    write_json,
)

_SUFFIXES = ("bin", "idx", "loss_mask", "json")


def written_files(prefix: str | os.PathLike[str]) -> list[Path]:
    """Every file that a corpus under ``prefix`` is written to, with its temporary names."""
    files = [corpus_file(prefix, suffix) for suffix in _SUFFIXES]
    return files + [temporary_path(file) for file in files]


def require_ours(prefix: str | os.PathLike[str]) -> None:
    """Raise OutputError where a corpus under ``prefix`` would replace a file of another kind.

    PREFIX.json and PREFIX.loss_mask are recognised by their content. PREFIX.bin and PREFIX.idx look
    like those of any Megatron data set: one of the other two must vouch for them.
    """
    is_ours = {
        "json": _is_description(corpus_file(prefix, "json")),
        "loss_mask": _is_loss_mask(corpus_file(prefix, "loss_mask")),
    }
    for suffix in _SUFFIXES:
        file = corpus_file(prefix, suffix)
        if os.path.lexists(file) and not is_ours.get(suffix, any(is_ours.values())):
            raise OutputError(
                "a file is here that is not part of a corpus of megatron_replay",
                where=file,
                fix="Nothing was written: choose another --output-prefix, or move the file away",
            )


def _is_description(path: Path) -> bool:
    try:
        content = read_json(path, DataError)
    except DataError:
        return False
    return {"version", "num_documents", "tokenizer_fingerprint", "fingerprint"} <= content.keys()


def _is_loss_mask(path: Path) -> bool:
    try:
        with open_regular(path, DataError) as handle:
            return handle.read(len(MASK_MAGIC)) == MASK_MAGIC
    except (DataError, OSError):
        return False


class CorpusWriter:
    """Write documents to ``PREFIX.*`` as they come; memory: twelve bytes a document.

    Nothing appears under the prefix until the block ends, and nothing at all if it raises. An older
    corpus under the same prefix loses its PREFIX.json first, so no moment shows a mixture of two.

    Raises:
        DataError: a document that cannot be in a corpus, or no document at all.
        OutputError: the files cannot be written, would replace one that is not a corpus's, or were
            written by another process meanwhile.
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
        self._lengths, self._first_labels = array.array("i"), array.array("i")
        self._crcs = array.array("I")
        self._num_loss_tokens = self._max_token_id = 0
        self._tokens_sha256, self._loss_mask_sha256 = hashlib.sha256(), hashlib.sha256()

    def __enter__(self) -> CorpusWriter:
        require_ours(self._prefix)
        self._replaces = self._present()
        make_directory(corpus_file(self._prefix, "json").parent)
        with ExitStack() as opened:
            self._tokens, self._loss_mask = (
                opened.enter_context(atomic_file(corpus_file(self._prefix, suffix)))
                for suffix in ("bin", "loss_mask")
            )
            self._loss_mask.write(bytes(MASK_HEADER.size))  # the count is known at the end
            self._files = opened.pop_all()
        return self

    def add(self, document: Document) -> None:
        """Append one document."""
        self._require_writable(document)
        tokens, loss_mask = document.tokens.astype("<i4"), document.loss_mask.astype(np.uint8)
        assert loss_mask.shape == tokens.shape, (loss_mask.shape, tokens.shape)
        self._tokens.write(tokens.data)
        self._tokens_sha256.update(tokens.data)
        self._loss_mask.write(loss_mask.data)
        self._loss_mask_sha256.update(loss_mask.data)
        num_loss_tokens = int(np.count_nonzero(loss_mask[1:]))
        first = int(np.argmax(loss_mask[1:])) + 1 if num_loss_tokens else len(tokens)
        self._lengths.append(len(tokens))
        self._first_labels.append(first)
        self._crcs.append(document_crc(tokens, loss_mask))
        self._num_loss_tokens += num_loss_tokens
        self._max_token_id = max(self._max_token_id, int(tokens.max()))

    def _require_writable(self, document: Document) -> None:
        if len(document) < 2:
            raise DataError("a document needs two tokens: one to see, one to predict")
        if max(len(document), len(self._lengths) + 1) > MAX_INT32:
            raise DataError(
                "more than a corpus can hold",
                expected=f"at most {MAX_INT32} documents, of at most {MAX_INT32} tokens",
                found=f"document {len(self._lengths)}, of {len(document)} tokens",
            )
        smallest, largest = int(document.tokens.min()), int(document.tokens.max())
        if smallest < 0 or largest >= self._tokenizer.vocab_size:
            raise DataError(
                "a token is outside the vocabulary",
                expected=f"0 to {self._tokenizer.vocab_size - 1}",
                found=f"{smallest} to {largest}",
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._files.__exit__(kind, error, trace)  # removes the temporary files
            return
        with self._files:  # an error inside removes them too
            if not self._lengths:
                raise DataError("no document to write", where=self._prefix)
            lengths_D = np.array(self._lengths, dtype=np.int32)
            num_tokens = int(lengths_D.sum(dtype=np.int64))
            header = MASK_HEADER.pack(MASK_MAGIC, CORPUS_VERSION, num_tokens)
            trailer = np.array(self._crcs, "<u4").tobytes()
            trailer += np.array(self._first_labels, "<i4").tobytes()
            self._loss_mask.write(trailer + zlib.crc32(header + trailer).to_bytes(4, "little"))
            self._loss_mask.seek(0)
            self._loss_mask.write(header)
            if self._present() != self._replaces:
                raise OutputError(
                    "another process has written a corpus under this prefix meanwhile",
                    where=self._prefix,
                    fix="Nothing of this one was written: choose another --output-prefix",
                )
            corpus_file(self._prefix, "json").unlink(missing_ok=True)
        with atomic_file(corpus_file(self._prefix, "idx")) as handle:
            handle.writelines(index_parts(lengths_D))
        tokenizer = self._tokenizer
        about = CorpusDescription(
            version=CORPUS_VERSION,
            num_documents=len(lengths_D),
            num_tokens=num_tokens,
            num_loss_tokens=self._num_loss_tokens,
            vocab_size=tokenizer.vocab_size,
            max_token_id=self._max_token_id,
            tokenizer_path=str(tokenizer.path),
            tokenizer_fingerprint=tokenizer.fingerprint,
            tokenizer_files=tokenizer.files,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            format=self._row_format,
            source=self._source,
            fingerprint=content_fingerprint(
                self._tokens_sha256.digest(), self._loss_mask_sha256.digest(), lengths_D
            ),
        )
        content = asdict(about)
        write_json(corpus_file(self._prefix, "json"), {**content, "checksum": checksum(content)})

    def _present(self) -> list[tuple[int, int] | None]:
        """Inode and time of each file under the prefix: another process's writing changes them."""
        files = [corpus_file(self._prefix, suffix) for suffix in _SUFFIXES]
        found = [file.stat() if file.exists() else None for file in files]
        return [stat and (stat.st_ino, stat.st_mtime_ns) for stat in found]
