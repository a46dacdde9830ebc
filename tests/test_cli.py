"""How a tool ends when the reader of its output has exited."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megatron_replay.errors import EXIT_INTERRUPTED


@pytest.mark.parametrize(
    ("work", "code", "error"),
    [
        ("'done'", 0, ""),
        ("print(1, flush=True) or 'done'", EXIT_INTERRUPTED, "interrupted: nothing was written\n"),
    ],
)
def test_a_closed_pipe_interrupts_the_work_and_not_its_last_line(work, code, error) -> None:
    program = f"from megatron_replay import cli; raise SystemExit(cli.exit_code_of(lambda: {work}))"
    reader, writer = os.pipe()
    os.close(reader)
    found = subprocess.run(
        [sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert (found.returncode, found.stderr) == (code, error)
