"""Training checkpoints: megatron-core's resharding format, made atomic.

A checkpoint directory holds::

    latest_checkpointed_iteration.txt   the newest complete iteration, Megatron's convention
    iter_0000100/                       megatron-core's torch_dist files, train_state.json, and
                                        checksums.json over all of them
    hf/                                 config.json and tokenizer of the model, for export

An iteration is written under a temporary name and renamed once all ranks' files are on disk, so a
directory named ``iter_...`` is always complete. torch_dist's metadata is a pickle: load only
checkpoints that you trust, and exchange models as Hugging Face directories.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import secrets
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_replay.checkpoint.directories import (
    LATEST,
    STATE,
    clear_remains,
    iteration_directory,
    remove_iteration,
    require_intact,
    write_checksums,
)
from megatron_replay.checkpoint.model_files import require_model_files
from megatron_replay.errors import CheckpointError, OutputError, ReplayError, TrainingError, few
from megatron_replay.files import (
    atomic_file,
    fsync_path,
    make_directory,
    output_error,
    read_json,
    reported,
    write_json,
)
from megatron_replay.model.gpt import ReplayGPTModel
from megatron_replay.parallel import Parallel
from megatron_replay.platform.checkpoint_writer import Written, checkpointing

#: Key in the identity of a conversion without rounding: ``base_fingerprint`` of its source.
CONVERTED_FROM = "converted from"


@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run; the order of the data is a pure function of it.

    Attributes:
        iteration: optimizer steps taken, skipped ones included.
        consumed_tokens: positions computed so far.
        skipped_steps: steps skipped because a loss or gradient was not finite.
        identity: the settings that decide which documents an iteration sees, and what is stored;
            for a converted model, which is not a run, ``CONVERTED_FROM`` or nothing.
        model_files: the SHA-256 of each file in hf/, by name.
    """

    iteration: int
    consumed_tokens: int
    skipped_steps: int
    identity: dict[str, Any]
    model_files: dict[str, str]

    def after_step(self, *, tokens: int, skipped: bool) -> TrainState:
        """The state after one more step, on a global batch of ``tokens`` positions."""
        return dataclasses.replace(
            self,
            iteration=self.iteration + 1,
            consumed_tokens=self.consumed_tokens + tokens,
            skipped_steps=self.skipped_steps + skipped,
        )

    def __post_init__(self) -> None:
        """Check the types, which a damaged file may violate.

        Raises:
            ValueError: a value is of another type, or negative.
        """
        numbers = (self.iteration, self.consumed_tokens, self.skipped_steps)
        named = (self.identity, self.model_files)
        is_sound = (
            all(type(number) is int and number >= 0 for number in numbers)
            and all(type(mapping) is dict for mapping in named)
            and all(type(digest) is str for digest in self.model_files.values())
        )
        if not is_sound:
            raise ValueError("a value of another type")


def save_checkpoint(
    directory: Path,
    state: TrainState,
    model: ReplayGPTModel,
    optimizer: MegatronOptimizer,
    parallel: Parallel,
) -> Path:
    """Write one checkpoint, unless it is the newest; collective over the world.

    An iteration of the same number that the marker does not name is replaced: the run was killed
    before it was named, or set back. The caller holds the directory's ``locks.DirectoryLock``.

    Raises:
        TrainingError: a weight is not finite on some rank; nothing is published then.
        OutputError: some rank cannot write; nothing is published then.
    """
    final = iteration_directory(directory, state.iteration)
    # Each save has a name of its own, so it never includes files of a killed one.
    name = f".{final.name}.{secrets.token_hex(4)}.incomplete"
    is_saved, name = parallel.broadcast((_is_newest(directory, final), name))
    if is_saved:
        return final
    fix = "Nothing was saved, and earlier checkpoints are unchanged. Lower --lr, or check the data"
    fix += " of the last steps"
    parallel.agreed(lambda: require_finite(model, TrainingError, fix=fix))
    staged = directory / name
    parallel.on_rank_zero(lambda: clear_remains(directory))
    parallel.on_rank_zero(lambda: make_directory(staged))
    content = _sharded_state(model, optimizer, parallel, is_loading=False)
    parts = parallel.agreed(lambda: _write(content, staged, parallel))
    written = {name: sums for part in parts for name, sums in part.items()}
    parallel.on_rank_zero(lambda: _publish(directory, staged, final, state, written))
    return final


def require_finite(
    model: torch.nn.Module, error: type[ReplayError], *, where: Path | None = None, fix: str
) -> None:
    """Raise ``error`` unless all weights and fp32 masters of this rank are finite."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[name] = parameter.detach()
        if (master := getattr(parameter, "main_param", None)) is not None:
            tensors[f"{name} (fp32 master)"] = master.detach()
    # One read for all tensors: each read waits for the device.
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()]).tolist()
    if bad := [name for name, is_finite in zip(tensors, finite, strict=True) if not is_finite]:
        raise error(f"the weights are not finite: {few(bad)}", where=where, fix=fix)


def read_state(directory: Path, iteration: int) -> TrainState:
    """The state of a checkpoint, checked against the model files in hf/.

    Raises:
        CheckpointError: it is missing or damaged, or hf/ belongs to another model.
    """
    path = iteration_directory(directory, iteration) / STATE
    require_intact(path.parent, name=STATE)
    content = read_json(path, CheckpointError, fix=_OTHER_ITERATION)
    try:
        state = TrainState(**content)
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"damaged, or of another version: {error}", where=path, fix=_OTHER_ITERATION
        ) from error
    require_model_files(directory, state.model_files)
    return state


def load_checkpoint(
    directory: Path,
    iteration: int,
    model: ReplayGPTModel,
    optimizer: MegatronOptimizer | None,
    parallel: Parallel,
) -> None:
    """Load weights, and the optimizer's state when ``optimizer`` is given, into any layout.

    Collective over the world. Call ``read_state`` first, which checks the model files.

    Raises:
        CheckpointError: files are missing or damaged, or belong to another model.
    """
    path = iteration_directory(directory, iteration)
    parallel.agreed(lambda: require_intact(path, rank=parallel.rank, of=parallel.world_size))
    content = _sharded_state(model, optimizer, parallel, is_loading=True)
    try:
        with checkpointing():
            loaded = dist_checkpointing.load(content, str(path))
        model.load_state_dict(loaded["model"])
        if optimizer is not None:
            optimizer.load_state_dict(loaded["optimizer"])
    except (Exception, CheckpointException) as error:
        raise CheckpointError(
            f"the checkpoint does not fit this model and optimizer: {type(error).__name__}: "
            f"{_reason(error)}",
            where=path,
            fix="Its files are intact: use the settings it was made with (optimizer, --bf16, "
            "--use-distributed-optimizer, the model of --load)",
        ) from error


_OTHER_ITERATION = (
    f"Leave it where it is; to resume from another iteration, write its number into {LATEST}"
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


def _is_newest(directory: Path, final: Path) -> bool:
    """Whether the marker names ``final``, and it is there."""
    try:
        named = iteration_directory(directory, int((directory / LATEST).read_text()))
    except (OSError, ValueError):
        return False
    return named == final and final.is_dir()


def _write(content: dict[str, Any], staged: Path, parallel: Parallel) -> Written:
    """Write this rank's files. CheckpointException holds all ranks' errors; it is no Exception."""
    try:
        with checkpointing(stall_seconds=parallel.timeout.total_seconds()) as written:
            dist_checkpointing.save(content, str(staged))
        return written
    except (Exception, CheckpointException) as error:
        reason = _reason(error)
        if "Errno 28" in reason:
            full = OSError(errno.ENOSPC, "No space left on device")
            raise output_error(staged, full) from error
        raise OutputError(
            f"saving failed, nothing was published: {reason}",
            where=staged,
            fix="Fix the cause (often a full disk or a quota), then rerun the same command",
        ) from error


def _publish(
    directory: Path, staged: Path, final: Path, state: TrainState, written: Written
) -> None:
    write_json(staged / STATE, dataclasses.asdict(state))
    write_checksums(staged, written)
    with reported(final):
        for path in staged.iterdir():  # megatron-core does not sync what rank 0 writes alone
            if path.name not in written:
                fsync_path(path)
        fsync_path(staged)
        if final.exists():
            remove_iteration(directory, state.iteration)
        os.replace(staged, final)
        fsync_path(directory)
    with atomic_file(directory / LATEST, "w") as handle:
        handle.write(f"{state.iteration}\n")


def _reason(error: BaseException) -> str:
    """The line with the cause, among the tracebacks of all ranks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if "Errno" in line] or lines[-1:]
    if causes and "inline_container" in causes[0]:  # torch's zip writer, short of space
        return "a file could not be written whole; is the disk full?"
    text = causes[0] if causes else type(error).__name__
    return text if len(text) <= 200 else f"{text[:150]}... ({len(text)} characters)"
