"""What a run that goes on must agree on, and refresh: the one thing that it may change when told.

Refreshed, it goes on with the candidates of its own checkpoint, made by Stage 0 meanwhile.

Batches must stay those of the run: which documents an iteration sees may not depend on which store
it has. Under --drop-unread-tokens the lengths to pack do, by each document's last recorded
position. Strategies that draw by (seed, document) record the same positions for any model; "bucket"
does not.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_replay.config import Stage1Config
from megatron_replay.data.corpus import Corpus
from megatron_replay.errors import ConfigError
from megatron_replay.optim.build import state_kind
from megatron_replay.store import CandidateReader, StoreDescription

#: Names in a run's identity.
STORE, POSITIONS = "store", "last recorded positions"
#: What to do where they are others.
FIXES = {
    STORE: "Give the store it had, or --refresh-store to go on with this one",
    POSITIONS: "Make the store with a --position-strategy that does not look at the model (random, "
    "last-token, all), or start the run with --no-drop-unread-tokens",
}


def identity(
    config: Stage1Config,
    corpus: Corpus,
    reader: CandidateReader | None,
    lengths: npt.NDArray[np.int32],
) -> dict[str, Any]:
    """What a resumed run must agree on: which documents an iteration sees, what is stored."""
    restricted = config.loss.loss == "restricted"
    drops_unread = restricted and config.training.drop_unread_tokens
    agreed = {
        "corpus_fingerprint": corpus.fingerprint,
        "seq_length": config.data.seq_length,
        "long_documents": config.data.long_documents,
        "pack_documents": config.data.pack_documents,
        "drop_unread_tokens": drops_unread,
        "global_batch_size": config.training.global_batch_size,
        "seed": config.training.seed,
        "optimizer_state": state_kind(config.optimizer),
        "use_distributed_optimizer": config.optimizer.use_distributed_optimizer,
    }
    if restricted:
        assert reader is not None
        agreed[STORE] = _digest(_recorded(reader.description))
    if drops_unread:
        agreed[POSITIONS] = _digest(lengths.astype("<i4").tobytes())
    return agreed


def _recorded(description: StoreDescription) -> bytes:
    """What decides ids and positions, however they are written."""
    made_of = [
        description.corpus_fingerprint,
        description.checkpoint_fingerprint,
        description.selection,
    ]
    return json.dumps(made_of, sort_keys=True).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def resumable(agreed: dict[str, Any], *, allowed: bool) -> dict[str, Any]:
    """What a checkpoint must agree on; ``allowed``: the store may be another."""
    return {name: value for name, value in agreed.items() if name != STORE or not allowed}


def require_checkpoint(iteration: int | None, directory: Path) -> None:
    """Raise ConfigError where there is no run whose store could be another: a wrong --save."""
    if iteration is None:
        raise ConfigError(
            "there is no run that could go on with another store",
            where="--refresh-store",
            expected="a checkpoint in --save",
            found=f"none in {directory}",
            fix="Leave it out when a run starts",
        )


def is_refreshed(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether the steps before were taken with another store."""
    return STORE in before and STORE in now and bool(before[STORE] != now[STORE])
