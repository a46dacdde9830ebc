"""Tasks of the lm-evaluation-harness: from local YAML files, on local data, without a network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class LmEvalTasks:
    """Which tasks.

    Attributes:
        general: tasks of general abilities.
        domain: tasks of the domain.
        include_path: directory of their YAML files.
    """

    general: tuple[str, ...]
    domain: tuple[str, ...]
    include_path: Path


def task_files(include_path: Path) -> list[Path]:
    """Every file of the directory."""
    return sorted(path for path in include_path.rglob("*") if path.is_file())


def run_tasks(
    model: PreTrainedModel,
    tokenizer: Path,
    tasks: LmEvalTasks | None,
    *,
    batch_size: int,
    progress: bool,
) -> dict[str, Any]:
    """Run."""
    if tasks is None:
        return {}
    raise NotImplementedError
