"""Do the corpus, the store and the model speak of the same tokens?"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron_replay.config.stage1 import LossConfig
from megatron_replay.data.corpus import Corpus
from megatron_replay.errors import ConfigError, StoreError
from megatron_replay.model.config import ModelConfig
from megatron_replay.store import CandidateReader


def require_vocabulary(corpus: Corpus, model: ModelConfig) -> None:
    """Raise ConfigError when the corpus may hold ids beyond the model's embedding."""
    if corpus.vocab_size > model.vocab_size:
        raise ConfigError(
            "the corpus was made with a larger vocabulary than the model has",
            where="--data-path",
            expected=f"at most {model.vocab_size} tokens",
            found=f"a tokenizer of {corpus.vocab_size}",
            fix="Run tools/preprocess_data.py with the tokenizer of --load",
        )


def require_context(lengths: npt.NDArray[np.int32], model: ModelConfig) -> None:
    """Raise ConfigError when a document is longer than the model's context.

    A pack may be: attention stays inside a document, and rotary positions are relative.
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


def require_loss(loss: LossConfig, model: ModelConfig) -> None:
    """Raise ConfigError when ``--tail-samples`` asks for more ids than there are."""
    if loss.tail == "sampled" and loss.tail_samples > model.vocab_size:
        raise ConfigError(
            "more ids than the model's vocabulary has",
            where="--tail-samples",
            expected=f"at most {model.vocab_size}",
            found=loss.tail_samples,
        )


def open_store(
    path: str, corpus: Corpus, model: ModelConfig, *, logits: bool = False
) -> CandidateReader:
    """The store at ``path``, checked to be of this corpus, tokenizer and vocabulary.

    ``logits``: it must have them.

    Raises:
        StoreError: it is of something else, without logits, unfinished or damaged.
    """
    reader = CandidateReader(path)
    reader.require(
        corpus_fingerprint=corpus.fingerprint,
        tokenizer_fingerprint=corpus.tokenizer_fingerprint,
        vocab_size=model.vocab_size,
    )
    if logits and reader.description.logits == "none":
        raise StoreError(
            "the store has no logits, which --kl-weight is about",
            where=path,
            fix="Rerun Stage 0 with --store-logits fp16, or leave out --kl-weight",
        )
    return reader
