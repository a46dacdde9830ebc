"""Where things lie in a directory of training checkpoints; nothing here reads weights."""

from __future__ import annotations

from pathlib import Path

from megatron_replay.errors import CheckpointError
from megatron_replay.files import atomic_file

#: Megatron's file with the number of the newest complete iteration.
LATEST = "latest_checkpointed_iteration.txt"


def latest_iteration(directory: Path) -> int | None:
    """The newest complete iteration in ``directory``, or None when there is none.

    Raises:
        CheckpointError: the marker names an iteration that is not there.
    """
    marker = directory / LATEST
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
