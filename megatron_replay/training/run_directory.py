"""Protects a run's directory, and checks what a resumed run may change."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from megatron_replay import flags
from megatron_replay.checkpoint.directories import (
    LATEST,
    STATE,
    iteration_directory,
    iterations,
    latest_iteration,
)
from megatron_replay.checkpoint.model_files import FOLDER, differing_files
from megatron_replay.checkpoint.training import TrainState
from megatron_replay.config import Stage1Config, flag_name
from megatron_replay.data.corpus import Corpus
from megatron_replay.errors import CheckpointError, ConfigError, OutputError, few
from megatron_replay.files import (
    atomic_file,
    differing,
    make_directory,
    read_text,
    require_apart,
)
from megatron_replay.locks import DirectoryLock, is_ours
from megatron_replay.optim.build import state_kind
from megatron_replay.run_log import CONFIG, METRICS
from megatron_replay.store import CandidateReader
from megatron_replay.store.manifest import DESCRIPTION_FILE

#: What a run writes into its directory; a directory where another program wrote one is refused.
_OURS = (CONFIG, LATEST, FOLDER, METRICS, "skipped_batches.jsonl")
#: Files of a model or a store; a run is not written into its directory.
_OTHERS = ("config.json", DESCRIPTION_FILE)
_PURPOSE = "this run"
#: Keys of a run's identity.
BASE, STORE = "--load", "--store"
#: The sections whose changes are reported.
_SECTIONS = ("model", "data", "loss", "optimizer", "training")
#: These settings do not change the weights.
_WITHOUT_EFFECT = ("save", "save_interval", "exit_interval", "log_interval", "allow_other_store")


def claim(config: Stage1Config) -> DirectoryLock:
    """Lock --save until this process ends.

    Raises:
        ConfigError: it is also an input.
        OutputError: another run is writing it, or it has files that no run wrote.
    """
    directory, load = Path(config.training.save), Path(config.model.load)
    inputs = [] if latest_iteration(load) is not None else [("--load", load)]
    if config.loss.store is not None:
        inputs.append(("--store", Path(config.loss.store)))
    require_apart(directory, inputs, flag="--save")
    if directory.is_dir() and not _is_run(directory):
        held = [name for name in (*_OURS, *_OTHERS) if (directory / name).exists()]
        held += [f"iter_{number:07d}" for number in iterations(directory)]
        if held:
            raise OutputError(
                "the directory has files that no run of Stage 1 wrote",
                where=directory,
                expected="an empty directory, or one of an earlier --save",
                found=", ".join(held[:4]),
                fix="Choose another --save; a converted checkpoint belongs to --load",
            )
    return DirectoryLock(make_directory(directory), purpose=_PURPOSE)


def require_space(directory: Path, size: int) -> None:
    """Raise OutputError unless the disk has ``size`` bytes free, those of one checkpoint.

    A run may save nothing before its end: on a disk that is full then, all of it is lost.
    """
    free = shutil.disk_usage(directory).free
    if free < size:
        raise OutputError(
            "too little disk space for a checkpoint",
            where=directory,
            expected=f"{size / 2**30:.2f} GiB free",
            found=f"{free / 2**30:.2f} GiB",
            fix="Nothing was trained. Free some space, or choose another --save",
        )


def _is_run(directory: Path) -> bool:
    """Whether a run wrote it: a run's first file is there, and its lock or a checkpoint.

    A copy may lack the lock. The lock alone is no proof, since a refused run leaves it too.
    """
    if not (directory / CONFIG).is_file():
        return False
    number = latest_iteration(directory)
    saved = number is not None and (iteration_directory(directory, number) / STATE).exists()
    return saved or is_ours(directory, _PURPOSE)


def changes(directory: Path, config: Stage1Config) -> list[str]:
    """``--lr 0.0002 -> 0.009`` for each setting that differs from the run in ``directory``.

    Raises:
        CheckpointError: its file is damaged.
    """
    path = directory / CONFIG
    if not path.exists():
        return []
    fix = "Remove it: it only serves to report changed settings, and the run rewrites it"
    try:
        before = yaml.safe_load(read_text(path, CheckpointError, fix=fix))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CheckpointError(f"damaged: {error}", where=path, fix=fix) from error
    sections = before.values() if isinstance(before, dict) else [None]
    if not all(isinstance(section, dict) for section in sections):
        raise CheckpointError("damaged: not a mapping of sections", where=path, fix=fix)
    now = dataclasses.asdict(config)
    return [
        f"{flag_name(name)} {before[section][name]} -> {value}"
        for section in _SECTIONS
        for name, value in now[section].items()
        if name not in _WITHOUT_EFFECT and before.get(section, {}).get(name, value) != value
    ]


def record(directory: Path, config: Stage1Config) -> None:
    """Write the settings of the next steps; after the lock, this is the first file of a run."""
    with atomic_file(directory / CONFIG, "w") as handle:
        handle.write(flags.to_yaml(config))


def identity(
    config: Stage1Config, corpus: Corpus, reader: CandidateReader | None, base: str
) -> dict[str, Any]:
    """The values that a resumed run must keep, by flag.

    Args:
        base: ``base_fingerprint`` of --load; empty if that is the run's own directory.
    """
    agreed: dict[str, Any] = {
        "--loss": config.loss.loss,
        "--data-path": corpus.fingerprint,
        "--seq-length": config.data.seq_length,
        "--long-documents": config.data.long_documents,
        "--pack-documents": config.training.pack_documents,
        "--group-prefixes": config.training.group_prefixes,
        "--global-batch-size": config.training.global_batch_size,
        "--seed": config.training.seed,
        "--optimizer": state_kind(config.optimizer),
        "--use-distributed-optimizer": config.optimizer.use_distributed_optimizer,
        "--bf16": config.model.bf16,
    }
    if base:
        agreed[BASE] = base
    if config.loss.trains_on_store:
        assert reader is not None
        store = reader.description
        # What determines the ids and positions in a store of any format.
        made_of = [store.corpus_fingerprint, store.checkpoint_fingerprint, store.selection]
        content = json.dumps(made_of, sort_keys=True).encode()
        agreed[STORE] = hashlib.sha256(content).hexdigest()[:16]
    return agreed


def require_same(
    state: TrainState, agreed: dict[str, Any], model_files: dict[str, str], directory: Path
) -> None:
    """Raise ConfigError with the flag's name unless a run resumes with what it was started with.

    Args:
        agreed: ``identity`` of the run as it is started now.
        model_files: SHA-256 of the files of its --load, by name.
    """
    changed = few(differing(state.model_files, model_files))
    for name, value in agreed.items():
        before = state.identity.get(name, value)
        if before != value and name == BASE:
            changed = differing_files(before, value)
        elif before != value:
            raise ConfigError(
                f"this directory has a run with another {name}",
                where=directory,
                expected=before,
                found=value,
                fix="Use the value it was started with, or choose another --save",
            )
    if changed:
        raise ConfigError(
            f"this directory has a run from another --load: {changed} has changed",
            where=directory,
            fix="Use the --load it was started with, or choose another --save",
        )
