"""``resolved_config.yaml``: what a run's steps were taken with, and what a resumed run changed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from megatron_replay import flags
from megatron_replay.config import Stage1Config, flag_name
from megatron_replay.files import atomic_file

FILE = "resolved_config.yaml"
#: The rest may differ from one start to the next without other weights coming of it.
_SECTIONS = ("model", "data", "loss", "optimizer", "training")
_WITHOUT_EFFECT = (
    "save",
    "save_interval",
    "exit_interval",
    "log_interval",
    "tensorboard_dir",
    "refresh_store",  # which other store it had, --store tells
)


def changes(directory: Path, config: Stage1Config) -> list[str]:
    """``--lr 0.0002 -> 0.009`` of every setting that the run in ``directory`` had otherwise."""
    path = directory / FILE
    if not path.exists():
        return []
    before: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    now = dataclasses.asdict(config)
    return [
        f"{flag_name(name)} {before[section][name]} -> {value}"
        for section in _SECTIONS
        for name, value in now[section].items()
        if name not in _WITHOUT_EFFECT
        and name in before.get(section, {})
        and before[section][name] != value
    ]


def record(directory: Path, config: Stage1Config) -> None:
    """Write what the steps to come are taken with."""
    with atomic_file(directory / FILE, "w") as handle:
        handle.write(flags.to_yaml(config))
