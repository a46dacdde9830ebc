"""Training checkpoints: megatron-core's resharding format, made atomic.

A checkpoint directory holds::

    latest_checkpointed_iteration.txt   the newest complete iteration, Megatron's convention
    iter_0000100/                       megatron-core's torch_dist files, and train_state.json
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
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_replay.errors import CheckpointError, ConfigError, OutputError, ReplayError
from megatron_replay.files import atomic_file, fsync_directory, output_error, write_json
from megatron_replay.model.gpt import ReplayGPTModel
from megatron_replay.parallel import Parallel
from megatron_replay.platform.megatron_core import checkpointing

_LATEST = "latest_checkpointed_iteration.txt"


@dataclasses.dataclass(frozen=True)
class TrainState:
    """Where training stands. The order of data is a pure function of it, so this is all.

    Attributes:
        iteration: optimizer steps taken, skipped ones included.
        consumed_tokens: positions computed so far.
        skipped_steps: steps left out because a gradient was not finite.
        identity: the settings that decide which documents an iteration sees.
    """

    iteration: int
    consumed_tokens: int
    skipped_steps: int
    identity: dict[str, Any]

    def require_identity(self, identity: dict[str, Any], directory: Path) -> None:
        """Raise ConfigError, naming the setting, unless a run is resumed with its own data."""
        for name, value in identity.items():
            if self.identity.get(name) != value:
                raise ConfigError(
                    f"this directory holds a run with another {name}",
                    where=directory,
                    expected=self.identity.get(name),
                    found=value,
                    fix="Give the value it was started with, or another --save",
                )


def latest_iteration(directory: Path) -> int | None:
    """The newest complete iteration in ``directory``, or None when there is none.

    Raises:
        CheckpointError: the marker names an iteration that is not there.
    """
    marker = directory / _LATEST
    if not marker.exists():
        return None
    text = marker.read_text().strip()
    if not text.isdigit():
        raise CheckpointError("not an iteration", where=marker, expected="a number", found=text)
    path = iteration_directory(directory, int(text))
    if not path.is_dir():
        complete = sorted(p.name for p in directory.glob("iter_*"))
        raise CheckpointError(
            "the newest checkpoint is missing",
            where=path,
            found=", ".join(complete) or "none",
            fix=f"Restore it, or write the number of an existing one into {marker}",
        )
    return int(text)


def iteration_directory(directory: Path, iteration: int) -> Path:
    """``directory/iter_0000100``."""
    return directory / f"iter_{iteration:07d}"


def save_checkpoint(
    directory: Path,
    state: TrainState,
    model: ReplayGPTModel,
    optimizer: MegatronOptimizer,
    parallel: Parallel,
) -> Path:
    """Write one checkpoint; collective over the world. An older one of the same number is kept.

    Raises:
        OutputError: it cannot be written, on any rank; nothing is published then.
    """
    final = iteration_directory(directory, state.iteration)
    if final.exists():
        return final
    staged = directory / f".{final.name}.incomplete"
    _on_rank_zero(lambda: _start_staging(directory, staged), parallel)
    content = {**_sharded_state(model, optimizer, parallel, is_loading=False)}
    error: BaseException | None = None
    try:
        with checkpointing():
            dist_checkpointing.save(content, str(staged))
    except (Exception, CheckpointException) as exception:  # the second is a BaseException
        error = exception
    _agree(error, staged, parallel)
    _on_rank_zero(lambda: _publish(directory, staged, final, state), parallel)
    return final


def load_checkpoint(
    directory: Path,
    iteration: int,
    model: ReplayGPTModel,
    optimizer: MegatronOptimizer | None,
    parallel: Parallel,
) -> TrainState:
    """Load weights, and the optimizer's state when ``optimizer`` is given, into any layout.

    Raises:
        CheckpointError: files are missing, damaged, or of another model.
    """
    path = iteration_directory(directory, iteration)
    content = _sharded_state(model, optimizer, parallel, is_loading=True)
    try:
        state = TrainState(**json.loads((path / "train_state.json").read_text()))
        with checkpointing():
            loaded = dist_checkpointing.load(content, str(path))
        model.load_state_dict(loaded["model"])
        if optimizer is not None:
            optimizer.load_state_dict(loaded["optimizer"])
    except (Exception, CheckpointException) as error:
        raise CheckpointError(
            f"cannot load the checkpoint: {type(error).__name__}: {_reason(error)}",
            where=path,
            fix=f"Remove it and write the number of another iteration into {_LATEST}",
        ) from error
    return state


def model_files_directory(directory: Path) -> Path:
    """Where config.json and tokenizer lie in a checkpoint directory."""
    return directory / "hf"


def keep_model_files(source: Path, directory: Path) -> None:
    """Copy config.json and tokenizer beside the checkpoints, so that they can be exported."""
    target = model_files_directory(directory)
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in (".json", ".model", ".txt", ".jinja"):
            if file.name.endswith(".index.json") or (target / file.name).exists():
                continue
            with atomic_file(target / file.name) as handle:
                handle.write(file.read_bytes())


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


def _start_staging(directory: Path, staged: Path) -> None:
    for leftover in directory.glob(".iter_*.incomplete"):
        shutil.rmtree(leftover)
    staged.mkdir(parents=True)


def _publish(directory: Path, staged: Path, final: Path, state: TrainState) -> None:
    write_json(staged / "train_state.json", dataclasses.asdict(state))
    fsync_directory(staged)
    os.replace(staged, final)
    fsync_directory(directory)
    with atomic_file(directory / _LATEST, "w") as handle:
        handle.write(f"{state.iteration}\n")


def _on_rank_zero(work: Any, parallel: Parallel) -> None:
    """Do ``work`` on rank 0 and learn everywhere whether it succeeded."""
    error: BaseException | None = None
    if parallel.rank == 0:
        try:
            work()
        except (OSError, ReplayError) as exception:
            error = exception
    _agree(error, Path("checkpoint"), parallel)


def _agree(error: BaseException | None, path: Path, parallel: Parallel) -> None:
    """Raise on every rank when any rank has an error; a rank's own error is the one it raises."""
    messages: list[str | None] = [None] * parallel.world_size
    dist.all_gather_object(messages, None if error is None else _reason(error))
    first = next((message for message in messages if message), None)
    if first is None:
        return
    if isinstance(error, ReplayError):
        raise error
    if isinstance(error, OSError):
        raise output_error(path, error)
    if "Errno 28" in first:
        raise output_error(path, OSError(errno.ENOSPC, "No space left on device"))
    raise OutputError(
        f"saving failed, nothing was published: {first}",
        where=path,
        fix="Mend the cause (a full disk or a limit, often) and run the same command again",
    )


def _reason(error: BaseException) -> str:
    """The line that tells why; dist_checkpointing wraps the tracebacks of all ranks in one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Errno" in line] or lines[-1:]
    return telling[0] if telling else type(error).__name__
