"""Which files a report may replace: those of an earlier report, and no others."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_replay.errors import DataError, OutputError
from megatron_replay.files import read_text, require_apart


def printable(text: str) -> str:
    """``text`` with bytes of file names that are not UTF-8 as escapes such as ``\\udce9``."""
    return text.encode("utf-8", "backslashreplace").decode()


def require_replaceable(
    directory: Path,
    names: Sequence[str],
    signs: Mapping[str, tuple[str, ...]],
    inputs: Sequence[tuple[str, Path]],
) -> None:
    """Check that writing ``names`` replaces no input, and only files of an earlier report.

    Args:
        signs: texts that files of an earlier report contain, by the file's name; one such file in
            the directory is enough.
        inputs: (flag, path) of each input.

    Raises:
        ConfigError: an output is an input.
        OutputError: a file is there that is not from an earlier report.
    """
    for name in names:
        require_apart(directory / name, inputs, flag="--output-dir")
    there = [name for name in names if os.path.lexists(directory / name)]
    if there and not any(_holds(directory / name, texts) for name, texts in signs.items()):
        raise OutputError(
            "these files are not from an earlier report of ours, so they are not replaced",
            where=directory,
            expected=f"{' or '.join(signs)} of an earlier report beside them",
            found=", ".join(there[:5]),
            fix="Give another --output-dir, or move them away",
        )


def _holds(path: Path, texts: tuple[str, ...]) -> bool:
    try:
        content = read_text(path, DataError)
    except DataError:
        return False
    return all(text in content for text in texts)
