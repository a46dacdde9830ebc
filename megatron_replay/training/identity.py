"""What a resumed run must share with the run before it, so that its batches stay the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_replay.checkpoint import model_files
from megatron_replay.checkpoint.model_files import differing_files
from megatron_replay.checkpoint.training import TrainState
from megatron_replay.config import Stage1Config
from megatron_replay.data.corpus import Corpus
from megatron_replay.errors import ConfigError, few
from megatron_replay.files import differing
from megatron_replay.optim.build import state_kind
from megatron_replay.store import CandidateReader, StoreDescription

BASE, STORE = "--load", "--store"


def identity(
    config: Stage1Config, corpus: Corpus, reader: CandidateReader | None, base: str
) -> dict[str, Any]:
    """What a resumed run must agree on, by the flag that sets it.

    Args:
        base: ``base_fingerprint`` of --load; empty if that is the run's own directory.
    """
    agreed: dict[str, Any] = {
        "--loss": config.loss.loss,
        "--data-path": corpus.fingerprint,
        "--seq-length": config.data.seq_length,
        "--long-documents": config.data.long_documents,
        "--pack-documents": config.data.pack_documents,
        "--global-batch-size": config.training.global_batch_size,
        "--seed": config.training.seed,
        "--optimizer": state_kind(config.optimizer),
        "--use-distributed-optimizer": config.optimizer.use_distributed_optimizer,
        "--bf16": config.model.bf16,
    }
    if base:
        agreed[BASE] = base
    if config.loss.loss == "restricted":
        assert reader is not None
        recorded = _recorded(reader.description)
        agreed[STORE] = hashlib.sha256(recorded).hexdigest()[:16]
    return agreed


def _recorded(description: StoreDescription) -> bytes:
    """What decides the ids and positions in a store, whatever its format."""
    made_of = [
        description.corpus_fingerprint,
        description.checkpoint_fingerprint,
        description.selection,
    ]
    return json.dumps(made_of, sort_keys=True).encode()


def require_same(
    state: TrainState, agreed: dict[str, Any], model_files: dict[str, str], directory: Path
) -> None:
    """Raise ConfigError, naming the flag, unless a run is resumed with what it was started with.

    Args:
        agreed: ``identity`` of the run as it is started now.
        model_files: of its --load, SHA-256 by name.
    """
    for name, value in agreed.items():
        before = state.identity.get(name, value)
        if before == value:
            continue
        if name == BASE:
            raise _other_base(differing_files(before, value), directory)
        raise ConfigError(
            f"this directory holds a run with another {name}",
            where=directory,
            expected=before,
            found=value,
            fix="Give the value it was started with, or another --save",
        )
    names = differing(state.model_files, model_files)
    if names:
        raise _other_base(few(names), directory)


def _other_base(names: str, directory: Path) -> ConfigError:
    return ConfigError(
        f"this directory holds a run from another --load: {names} is not what it was",
        where=directory,
        fix="Give the --load it was started with, or another --save",
    )


def require_store_of_base(reader: CandidateReader, base: str) -> None:
    """Raise StoreError unless Stage 0 ran on exactly these weights.

    Args:
        base: ``base_fingerprint`` of --load.
    """
    model_files.require_store_of_base(
        reader,
        base,
        flag=BASE,
        fix="Give the --load that Stage 0 had, rerun Stage 0 with this one, or choose "
        "--allow-other-store to train on the candidates of another model",
    )
