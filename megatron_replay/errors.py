"""The errors a user can cause or meet: one line with what, where, expected, found, what to do.

Every command line catches ``ReplayError``, prints that line to stderr and exits with the class's
``exit_code``. The codes are part of the interface: scripts may branch on them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


class ReplayError(Exception):
    """Base of all errors shown to users without a traceback.

    The message reads ``WHERE: WHAT (expected E; found F). FIX``; parts left out are not shown.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: object | None = None,
        expected: object | None = None,
        found: object | None = None,
        fix: str | None = None,
    ) -> None:
        facts = [
            f"{name} {value}"
            for name, value in (("expected", expected), ("found", found))
            if value is not None
        ]
        # A path is shown as it is, blanks included: people copy it.
        message = what if where is None else str(where).replace("\n", "\\n") + f": {what}"
        if facts:
            message += f" ({'; '.join(facts)})"
        if fix:
            message += f". {fix}"
        super().__init__(re.sub(r"\s*[\r\n]\s*", " ", message.strip()))


class ConfigError(ReplayError):
    """A flag, a YAML key, or a combination of options that cannot work."""

    exit_code = 2


class DataError(ReplayError):
    """A row, document, corpus or tokenizer that is damaged or does not fit."""

    exit_code = 3


class CheckpointError(ReplayError):
    """A checkpoint or Hugging Face directory that is missing, damaged or of another shape."""

    exit_code = 4


class StoreError(ReplayError):
    """A candidate store that is damaged, unfinished, or made for something else."""

    exit_code = 5


class OutputError(ReplayError):
    """Output that cannot be written: no permission, no space, or already in use."""

    exit_code = 6


class TrainingError(ReplayError):
    """Training that cannot continue: too many non-finite steps, or a rank that died."""

    exit_code = 7


#: Exit code of a run that saved its work and stopped on SIGTERM or Ctrl-C.
EXIT_INTERRUPTED = 130


def few(names: Sequence[str]) -> str:
    """``a, b, c and 2 more``: the first three names, and the number of the others."""
    rest = len(names) - 3
    return ", ".join(names[:3]) + (f" and {rest} more" if rest > 0 else "")
