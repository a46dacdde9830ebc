"""A run's directory: whose it is, its ``resolved_config.yaml``, what a resumed run changed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from megatron_replay import flags
from megatron_replay.checkpoint.directories import LATEST, iteration_directory, latest_iteration
from megatron_replay.checkpoint.model_files import FOLDER
from megatron_replay.checkpoint.retention import STATE, iterations
from megatron_replay.config import Stage1Config, flag_name
from megatron_replay.errors import CheckpointError, OutputError
from megatron_replay.files import atomic_file, make_directory, read_text, require_apart
from megatron_replay.locks import DirectoryLock, is_ours
from megatron_replay.store.manifest import DESCRIPTION_FILE

FILE = "resolved_config.yaml"
#: What a run writes into its directory: files of these names that are not a run's are kept.
_OURS = (FILE, LATEST, FOLDER, "metrics.jsonl", "skipped_batches.jsonl")
#: Files that mark a model or a store: a run is not mixed with one.
_OTHERS = ("config.json", DESCRIPTION_FILE)
_PURPOSE = "this run"
#: The sections whose changes are reported.
_SECTIONS = ("model", "data", "loss", "optimizer", "training")
#: These settings do not change the weights.
_WITHOUT_EFFECT = ("save", "save_interval", "exit_interval", "log_interval", "allow_other_store")


def claim(config: Stage1Config) -> DirectoryLock:
    """Lock --save until this process ends.

    Raises:
        ConfigError: it is also an input.
        OutputError: another run is writing it, or it holds files that no run wrote.
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
                "the directory holds files that no run of Stage 1 wrote here",
                where=directory,
                expected="an empty directory, or one that --save named before",
                found=", ".join(held[:4]),
                fix="Give another --save; a converted checkpoint is given as --load",
            )
    return DirectoryLock(make_directory(directory), purpose=_PURPOSE)


def _is_run(directory: Path) -> bool:
    """Whether a run wrote it: its first file is there, with its lock or with a checkpoint.

    A copy may lack the lock. The lock alone proves nothing: a run that was refused leaves it too.
    """
    if not (directory / FILE).is_file():
        return False
    number = latest_iteration(directory)
    saved = number is not None and (iteration_directory(directory, number) / STATE).exists()
    return saved or is_ours(directory, _PURPOSE)


def changes(directory: Path, config: Stage1Config) -> list[str]:
    """``--lr 0.0002 -> 0.009`` of every setting that the run in ``directory`` had otherwise.

    Raises:
        CheckpointError: its file is damaged.
    """
    path = directory / FILE
    if not path.exists():
        return []
    before = _read(path)
    now = dataclasses.asdict(config)
    return [
        f"{flag_name(name)} {before[section][name]} -> {value}"
        for section in _SECTIONS
        for name, value in now[section].items()
        if name not in _WITHOUT_EFFECT
        and name in before.get(section, {})
        and before[section][name] != value
    ]


def _read(path: Path) -> dict[str, dict[str, Any]]:
    fix = "Remove it: it only serves to report changed settings, and is written again"
    text = read_text(path, CheckpointError, fix=fix)
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CheckpointError(f"damaged: {error}", where=path, fix=fix) from error
    sections = content.values() if isinstance(content, dict) else [None]
    if not all(isinstance(section, dict) for section in sections):
        raise CheckpointError("damaged: no mapping of sections", where=path, fix=fix)
    return dict(content)


def record(directory: Path, config: Stage1Config) -> None:
    """Write the settings of the next steps; after the lock, this is the first file of a run."""
    with atomic_file(directory / FILE, "w") as handle:
        handle.write(flags.to_yaml(config))
