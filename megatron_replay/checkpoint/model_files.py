"""The files next to the weights (config.json, tokenizer, licence), and their fingerprints.

A directory of checkpoints keeps these files in ``hf/``, for export. Each checkpoint records their
SHA-256 in its train_state.json and is not loaded with others: weights under another ``rope_theta``
are another model, and nothing in their shapes shows it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_replay.errors import CheckpointError, StoreError, few
from megatron_replay.files import (
    atomic_file,
    differing,
    fsync_path,
    open_regular,
    reported,
    sha256_of_files,
)
from megatron_replay.store import CandidateReader

FOLDER = "hf"
_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".tiktoken")
#: What a tuned model must be passed on with, whatever the suffix.
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
#: A larger file is data that happens to be in the model's directory.
_MOST_BYTES = 1 << 30


def side_files(source: Path) -> list[str]:
    """Names of the files of a Hugging Face directory except weights and their index.

    Raises:
        CheckpointError: the directory cannot be read.
    """
    try:
        found = [
            path
            for path in source.iterdir()
            if path.suffix in _SUFFIXES or path.name.upper().startswith(_LICENCES)
        ]
    except OSError as error:
        raise CheckpointError(f"cannot read: {error.strerror}", where=source) from error
    found += source.glob("additional_chat_templates/*.jinja")
    return sorted(
        path.relative_to(source).as_posix()
        for path in found
        if not path.name.endswith(".index.json") and not path.is_dir()
    )


def copy_side_file(path: Path, target: Path) -> None:
    """Copy one file; creates its folder.

    Raises:
        CheckpointError: it cannot be read, or is too large.
        OutputError: it cannot be written.
    """
    with open_regular(path, CheckpointError) as handle:
        size = os.fstat(handle.fileno()).st_size
        if size > _MOST_BYTES:
            raise CheckpointError(
                "too large for a tokenizer or configuration file",
                where=path,
                expected=f"at most {_MOST_BYTES} bytes",
                found=f"{size} bytes",
                fix="Move it out of the model's directory",
            )
        content = handle.read()
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as handle:
        handle.write(content)


def fingerprints(source: Path) -> dict[str, str]:
    """The SHA-256 of each of ``side_files``, by name."""
    return {
        name: sha256_of_files([source / name], error=CheckpointError) for name in side_files(source)
    }


def keep_model_files(source: Path, directory: Path) -> None:
    """Make ``directory``/hf hold the side files of ``source``, and no others.

    No checkpoint may depend on other files there: those are of an attempt that saved none, killed
    perhaps between two files.

    Raises:
        CheckpointError: a file cannot be read.
        OutputError: a file cannot be written.
    """
    target = directory / FOLDER
    with reported(target):
        target.mkdir(parents=True, exist_ok=True)
        wanted, held = fingerprints(source), fingerprints(target)
        for name in differing(wanted, held):
            if name in wanted:
                copy_side_file(source / name, target / name)
            else:
                (target / name).unlink()
        fsync_path(directory)


def require_model_files(directory: Path, expected: Mapping[str, str]) -> None:
    """Raise CheckpointError unless ``directory``/hf holds the files of the checkpoint."""
    found = fingerprints(directory / FOLDER)
    names = differing(expected, found)
    if names:
        name = names[0]
        raise CheckpointError(
            f"not the {name} that the checkpoint was made with"
            + (f"; {len(names) - 1} more files differ" if len(names) > 1 else ""),
            where=directory / FOLDER / name,
            expected=f"SHA-256 {expected[name][:16]}" if name in expected else "no such file",
            found=f"SHA-256 {found[name][:16]}" if name in found else "no such file",
            fix="Restore the model's own file: with another, the same weights are another model",
        )


def digests_of(paths: Sequence[Path]) -> str:
    """The SHA-256 of each file, a JSON object by name; reads files in parallel.

    Raises:
        CheckpointError: a file cannot be read.
    """
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda path: sha256_of_files([path], error=CheckpointError), paths)
        found = {path.name: digest for path, digest in zip(paths, digests, strict=True)}
    return json.dumps(found, sort_keys=True)


def differing_files(one: str, other: str) -> str:
    """The files in which two ``base_fingerprint`` differ, for a message."""
    try:
        return few(differing(json.loads(one), json.loads(other)))
    except (ValueError, TypeError):  # of another version
        return "its fingerprint"


def require_store_of_base(reader: CandidateReader, base: str, *, flag: str, fix: str) -> None:
    """Raise StoreError unless Stage 0 ran on these very weights.

    Args:
        base: ``base_fingerprint`` of what ``flag`` gives.
    """
    made_with = reader.description.checkpoint_fingerprint
    if made_with != base:
        raise StoreError(
            f"the store was made with another base model than {flag}, by "
            f"{differing_files(made_with, base)}",
            where=reader.directory,
            fix=fix,
        )
