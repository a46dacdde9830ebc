"""Which iterations stay under --keep-last; tests/checkpoint/test_kill.py kills the removal."""

from __future__ import annotations

import os

import pytest

from megatron_replay.checkpoint.directories import (
    LATEST,
    iteration_directory,
    iterations,
    keep_only,
)
from megatron_replay.errors import OutputError

NUMBERS = [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize(
    ("newest", "last", "kept"),
    [
        (12, 0, NUMBERS), (12, 1, [12]), (12, 3, [8, 10, 12]), (12, 9, NUMBERS),
        (6, 1, [6, 8, 10, 12]),  # a run set back: what is newer is neither counted nor removed
        (None, 1, NUMBERS),  # nothing saved yet
    ],
)  # fmt: skip
def test_what_is_kept(tmp_path, monkeypatch, newest, last, kept):
    (tmp_path / "iter_x").mkdir()
    for number in NUMBERS:
        iteration_directory(tmp_path, number).mkdir()
    if newest is not None:
        (tmp_path / LATEST).write_text(f"{newest}\n")
    keep_only(tmp_path, last=last)
    assert iterations(tmp_path) == kept

    def fail(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", fail)
    if kept == NUMBERS and newest:
        with pytest.raises(OutputError, match="iter_0000002: cannot write: Permission denied"):
            keep_only(tmp_path, last=1)
