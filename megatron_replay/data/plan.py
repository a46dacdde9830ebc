"""What a run of Stage 1 reads, before a token is read: usable documents, batches, iterations.

Training and ``--dry-run`` ask here, so a prediction is of what the run does.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from megatron_replay.config import Stage1Config
from megatron_replay.data.corpus import Corpus
from megatron_replay.data.packing import FittedDocuments, fit_documents, without_unread
from megatron_replay.data.sampler import GlobalBatches
from megatron_replay.errors import ConfigError, DataError
from megatron_replay.store import CandidateReader


def usable_documents(
    config: Stage1Config, corpus: Corpus, reader: CandidateReader | None
) -> tuple[FittedDocuments, npt.NDArray[np.int32]]:
    """What ``--long-documents`` leaves of each document, and what is computed of it: int32 [D].

    Under the restricted loss the second ends with a document's last recorded position.

    Args:
        reader: the candidate store; None where there is none yet, whose end is not known then.

    Raises:
        DataError: nothing is left to learn.
    """
    fitted = fit_documents(
        corpus.lengths, config.data.seq_length, config.data.long_documents, corpus.first_labels
    )
    if config.loss.loss != "restricted" or reader is None:
        return fitted, fitted.lengths
    recorded = reader.stops() > 0
    stops = _stops_within(fitted.lengths, reader)
    if not stops.any():
        raise DataError(
            "the store records no position of what is trained on: nothing is left to learn",
            where=reader.directory,
            found=f"{int(recorded.sum())} of {len(stops)} documents have a recorded position, and "
            f"none before --seq-length {config.data.seq_length}",
            fix="Raise --seq-length to that of Stage 0, or rerun Stage 0 with this run's",
        )
    num_unlabelled = int((recorded & (fitted.lengths > 0) & (stops == 0)).sum())
    return replace(fitted, num_unlabelled=num_unlabelled), without_unread(fitted.lengths, stops)


def _stops_within(lengths: npt.NDArray[np.int32], reader: CandidateReader) -> npt.NDArray[np.int32]:
    """Last recorded position that predicts one of the tokens used, plus one; 0 where none does.

    Reads the records of those documents only of which less is used than Stage 0 recorded.
    """
    stops = reader.stops()
    stops[lengths == 0] = 0
    for document in np.flatnonzero((stops >= lengths) & (stops > 0)).tolist():
        positions = reader[document].positions
        left = positions[positions + 1 < lengths[document]]
        stops[document] = left[-1] + 1 if len(left) else 0
    return stops


def global_batches(
    config: Stage1Config, lengths: npt.NDArray[np.int32], *, dp_rank: int, dp_size: int
) -> GlobalBatches:
    """The batches of the whole run: of --train-epochs, or without an end under --train-iters."""
    training = config.training
    return GlobalBatches(
        lengths,
        seq_length=config.data.seq_length,
        global_batch_size=training.global_batch_size,
        micro_batch_size=config.data.micro_batch_size,
        seed=training.seed,
        epochs=None if training.train_iters is not None else training.train_epochs or 1,
        pack_documents=config.data.pack_documents,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )


def require_iterations(config: Stage1Config, train_iters: int) -> None:
    """Raise ConfigError unless the run goes on after its warm-up."""
    warmup = config.optimizer.lr_warmup_iters
    if warmup >= train_iters:
        raise ConfigError(
            "the warm-up is as long as the run",
            where="--lr-warmup-iters",
            expected=f"below the run's {train_iters} iterations",
            found=warmup,
            fix="Shorten it, or lower --global-batch-size or --seq-length for more iterations",
        )
