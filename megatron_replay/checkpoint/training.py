"""Training checkpoints: megatron-core's resharding format, made atomic.

A checkpoint directory holds::

    latest_checkpointed_iteration.txt   the newest complete iteration, Megatron's convention
    iter_0000100/                       megatron-core's torch_dist files, and train_state.json
    best_checkpoint.json                under --keep-best: which one, and its value (retention.py)
    hf/                                 config.json and tokenizer of the model, for export

An iteration is written under a temporary name and renamed when every rank's files are on disk, so
a name ``iter_...`` always is a whole checkpoint. torch_dist's metadata is a pickle: load only
checkpoints you trust. What strangers exchange are Hugging Face directories and candidate stores.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_replay.checkpoint.directories import (
    LATEST,
    iteration_directory,
    keep_model_files,
    latest_iteration,
    model_files_directory,
)
from megatron_replay.checkpoint.retention import clear_remains, remove_iteration
from megatron_replay.checkpoint.vocabulary import (
    change_places,
    deinterleave,
    interleave,
    vocabulary_places,
)
from megatron_replay.errors import CheckpointError, ConfigError, OutputError
from megatron_replay.files import atomic_file, fsync_directory, output_error, write_json
from megatron_replay.model.gpt import ReplayGPTModel
from megatron_replay.parallel import Parallel
from megatron_replay.platform.megatron_core import checkpointing

__all__ = [
    "TrainState",
    "iteration_directory",
    "keep_model_files",
    "latest_iteration",
    "load_checkpoint",
    "model_files_directory",
    "save_checkpoint",
]


_NO_FIXES: Mapping[str, str] = {}


@dataclasses.dataclass(frozen=True)
class TrainState:
    """Where training stands. The order of data is a pure function of it, so this is all.

    Attributes:
        iteration: optimizer steps taken, skipped ones included.
        consumed_tokens: positions computed so far.
        skipped_steps: steps left out because a loss or gradient was not finite.
        identity: the settings that decide which documents an iteration sees, and what is stored.
        scores: by what --keep-best may judge it: the values known when it was saved.
    """

    iteration: int
    consumed_tokens: int
    skipped_steps: int
    identity: dict[str, Any]
    scores: dict[str, float] = dataclasses.field(default_factory=dict)

    def require_identity(
        self, identity: dict[str, Any], directory: Path, fixes: Mapping[str, str] = _NO_FIXES
    ) -> None:
        """Raise ConfigError, naming the setting, unless a run is resumed with its own data.

        What the checkpoint does not tell (it is older, or had no store) is not compared. ``fixes``
        says what to do about a name where it is not to give the value it had.
        """
        for name, value in identity.items():
            if self.identity.get(name, value) != value:
                raise ConfigError(
                    f"this directory holds a run with another {name}",
                    where=directory,
                    expected=self.identity[name],
                    found=value,
                    fix=fixes.get(name, "Give the value it was started with, or another --save"),
                )


def save_checkpoint(
    directory: Path,
    state: TrainState,
    model: ReplayGPTModel,
    optimizer: MegatronOptimizer,
    parallel: Parallel,
) -> Path:
    """Write one checkpoint, unless it is the newest; collective over the world.

    One of the same number that the marker does not name is replaced: the run was killed before it
    was named, or set back.

    Raises:
        OutputError: it cannot be written, on any rank; nothing is published then.
    """
    final = iteration_directory(directory, state.iteration)
    # Each save has a name of its own: a killed rank's writers, which are processes, may still
    # write under that of theirs.
    name = f".{final.name}.{secrets.token_hex(4)}.incomplete"
    is_saved, name = parallel.broadcast((_is_newest(directory, final), name))
    if is_saved:
        return final
    staged = directory / name
    parallel.on_rank_zero(lambda: _start_staging(directory, staged))
    content = _sharded_state(model, optimizer, parallel, is_loading=False)
    if parallel.interleaved_vocabulary:
        _to_contiguous_shards(content, parallel)
    parallel.agreed(lambda: _write(content, staged))
    parallel.on_rank_zero(lambda: _publish(directory, staged, final, state))
    return final


def load_checkpoint(
    directory: Path,
    iteration: int,
    model: ReplayGPTModel,
    optimizer: MegatronOptimizer | None,
    parallel: Parallel,
    *,
    identity: dict[str, Any] | None = None,
    fixes: Mapping[str, str] = _NO_FIXES,
) -> TrainState:
    """Load weights, and the optimizer's state when ``optimizer`` is given, into any layout.

    Raises:
        CheckpointError: files are missing, damaged, or of another model.
        ConfigError: it is a run's of another ``identity``; found out before anything is loaded.
    """
    path = iteration_directory(directory, iteration)
    try:
        state = TrainState(**json.loads((path / "train_state.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise _unloadable(path, error) from error
    if identity is not None:
        state.require_identity(identity, directory, fixes)
    content = _sharded_state(model, optimizer, parallel, is_loading=True)
    places = vocabulary_places(content)
    try:
        with checkpointing():
            loaded = dist_checkpointing.load(content, str(path))
        if parallel.interleaved_vocabulary:
            change_places(loaded, places, lambda rows: interleave(rows, parallel.tp_group))
        model.load_state_dict(loaded["model"])
        if optimizer is not None:
            optimizer.load_state_dict(loaded["optimizer"])
    except (Exception, CheckpointException) as error:
        raise _unloadable(path, error) from error
    return state


def _unloadable(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"cannot load the checkpoint: {type(error).__name__}: {_reason(error)}",
        where=path,
        fix=f"Remove it and write the number of another iteration into {LATEST}",
    )


def _sharded_state(
    model: ReplayGPTModel,
    optimizer: MegatronOptimizer | None,
    parallel: Parallel,
    *,
    is_loading: bool,
) -> dict[str, Any]:
    metadata = {
        "dp_cp_group": parallel.dp_group,
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
    }
    weights = model.sharded_state_dict(metadata=metadata)
    content: dict[str, Any] = {"model": weights}
    if optimizer is not None:
        content["optimizer"] = optimizer.sharded_state_dict(
            weights, is_loading=is_loading, metadata=metadata
        )
    return content


def _to_contiguous_shards(content: dict[str, Any], parallel: Parallel) -> None:
    """As the files have them; a copy of the vocabulary's rows of weights and state, until saved."""

    def contiguous(tensor: ShardedTensor) -> ShardedTensor:
        rows = deinterleave(tensor.data.detach(), parallel.tp_group)
        return dataclasses.replace(tensor, data=rows)

    change_places(content, vocabulary_places(content), contiguous)


def _is_newest(directory: Path, final: Path) -> bool:
    """Whether the marker names ``final``, and it is there."""
    try:
        named = iteration_directory(directory, int((directory / LATEST).read_text()))
    except (OSError, ValueError):
        return False
    return named == final and final.is_dir()


def _start_staging(directory: Path, staged: Path) -> None:
    try:
        clear_remains(directory)
        staged.mkdir(parents=True)
    except OSError as error:
        raise output_error(staged, error) from error


def _write(content: dict[str, Any], staged: Path) -> None:
    """This rank's files. CheckpointException is no Exception, and holds the errors of all ranks."""
    try:
        with checkpointing():
            dist_checkpointing.save(content, str(staged))
    except (Exception, CheckpointException) as error:
        reason = _reason(error)
        if "Errno 28" in reason:
            full = OSError(errno.ENOSPC, "No space left on device")
            raise output_error(staged, full) from error
        raise OutputError(
            f"saving failed, nothing was published: {reason}",
            where=staged,
            fix="Mend the cause (a full disk or a limit, often) and run the same command again",
        ) from error


def _publish(directory: Path, staged: Path, final: Path, state: TrainState) -> None:
    try:
        write_json(staged / "train_state.json", dataclasses.asdict(state))
        fsync_directory(staged)
        if final.exists():
            remove_iteration(directory, state.iteration)
        os.replace(staged, final)
        fsync_directory(directory)
        with atomic_file(directory / LATEST, "w") as handle:
            handle.write(f"{state.iteration}\n")
    except OSError as error:
        raise output_error(final, error) from error


def _reason(error: BaseException) -> str:
    """The line that tells why; dist_checkpointing wraps the tracebacks of all ranks in one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Errno" in line] or lines[-1:]
    if telling and "inline_container" in telling[0]:  # torch's zip writer, short of space
        return "a file could not be written whole; is the disk full?"
    return telling[0] if telling else type(error).__name__
