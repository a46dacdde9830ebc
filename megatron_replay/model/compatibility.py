"""Checks that corpus, store and model fit each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_replay.data.corpus import Corpus
from megatron_replay.data.tokenizer import tokenizer_digests
from megatron_replay.errors import ConfigError, DataError, StoreError, few
from megatron_replay.files import differing
from megatron_replay.model.config import ModelConfig
from megatron_replay.store import CandidateReader


def require_vocabulary(
    corpus: Corpus, model: ModelConfig, files: Path, *, flag: str = "--load"
) -> None:
    """Raise unless the corpus has tokens of the model's tokenizer, and the model a row for each.

    A tokenizer may have more tokens than the model has rows, as long as the corpus uses none of
    them; a model mostly has more rows than its tokenizer has tokens.

    Args:
        files: the directory of the model's config.json and tokenizer.
        flag: the flag that names the model.

    Raises:
        ConfigError: a token has no row.
        DataError: a file of the tokenizer differs.
    """
    largest = corpus.description.max_token_id
    if largest >= model.vocab_size:
        raise ConfigError(
            "the corpus has a token that the model has no row for",
            where="--data-path",
            expected=f"tokens below {model.vocab_size}",
            found=largest,
            fix=f"Run tools/preprocess_data.py with the tokenizer of {flag}; tokens added to that "
            "one need a model whose embedding was resized",
        )
    ours, theirs = corpus.description.tokenizer_files, tokenizer_digests(files)
    if len(ours) == 1:  # a sentencepiece model alone; a directory may also hold other files
        theirs = {name: digest for name, digest in theirs.items() if name in ours} or theirs
    names = differing(ours, theirs)
    if ours and theirs and names:
        raise DataError(
            f"the corpus was made with another tokenizer than {flag} has, by {few(names)}",
            where=files,
            expected=f"the files of {corpus.description.tokenizer_path}",
            fix=f"Run tools/preprocess_data.py with the tokenizer of {flag}, or copy the corpus's "
            f"tokenizer into {flag}, from where the trained model gets it",
        )


def require_context(lengths: npt.NDArray[np.int32], model: ModelConfig) -> None:
    """Raise ConfigError when a document is longer than the model's context.

    A micro-batch may be longer: rotary positions count from a document's first token.
    """
    longest = int(lengths.max()) - 1
    if longest > model.max_position_embeddings:
        raise ConfigError(
            f"document {int(lengths.argmax())} is longer than the model's context",
            where="--data-path",
            expected=f"at most {model.max_position_embeddings} positions",
            found=longest,
            fix="Set --seq-length to that and choose --long-documents drop or truncate",
        )


def require_store(
    reader: CandidateReader, corpus: Corpus, model: ModelConfig, *, logits: bool = False
) -> None:
    """Raise StoreError unless the store is of this corpus, tokenizer and vocabulary.

    ``logits``: whether the store must have logits.
    """
    reader.require(
        corpus_fingerprint=corpus.fingerprint,
        tokenizer_fingerprint=corpus.tokenizer_fingerprint,
        vocab_size=model.vocab_size,
    )
    if logits and reader.description.logits == "none":
        raise StoreError(
            "the store has no logits, which --kl-weight needs",
            where=reader.directory,
            fix="Rerun Stage 0 with --store-logits fp16, or omit --kl-weight",
        )
