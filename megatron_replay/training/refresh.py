"""Refresh: a run goes on with the candidates of its own checkpoint, made by Stage 0 meanwhile.

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

from megatron_replay.errors import ConfigError
from megatron_replay.store import StoreDescription

#: Names in a run's identity.
STORE, POSITIONS = "store", "last recorded positions"
#: What to do where they are others.
FIXES = {
    STORE: "Give the store it had, or --refresh-store to go on with this one",
    POSITIONS: "Make the store with a --position-strategy that does not look at the model (random, "
    "last-token, all), or start the run with --no-drop-unread-tokens",
}


def store_identity(
    description: StoreDescription, lengths: npt.NDArray[np.int32], *, drop_unread_tokens: bool
) -> dict[str, str]:
    """What was recorded, however it is written; and the lengths of documents that come of it."""
    content = [
        description.corpus_fingerprint,
        description.checkpoint_fingerprint,
        description.selection,
    ]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    stops = hashlib.sha256(lengths.astype("<i4").tobytes()).hexdigest()
    return {STORE: digest[:16]} | ({POSITIONS: stops[:16]} if drop_unread_tokens else {})


def resumable(identity: dict[str, Any], *, allowed: bool) -> dict[str, Any]:
    """What a checkpoint must agree on; ``allowed``: the store may be another."""
    return {name: value for name, value in identity.items() if name != STORE or not allowed}


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


def is_refreshed(before: dict[str, Any], identity: dict[str, Any]) -> bool:
    """Whether the steps before were taken with another store."""
    return STORE in before and STORE in identity and bool(before[STORE] != identity[STORE])
