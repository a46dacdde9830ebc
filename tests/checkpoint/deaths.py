"""Processes that are killed at a chosen change of the file system."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Callable, Iterable
from typing import Any

from tests import processes


def is_killed_at(step: int, calls: Iterable[str], work: Callable[[], object]) -> bool:
    """Run ``work`` in a fork, with a SIGKILL in place of the ``step``-th call of any of ``calls``.

    Returns whether there were as many. ``calls``: functions, as "os.fsync".
    """
    code = processes.wait(processes.fork(_run, step, list(calls), work))
    assert code in (0, -signal.SIGKILL)
    return code != 0


def _run(step: int, calls: list[str], work: Callable[[], object]) -> None:
    taken = 0

    def mortal(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal taken
            taken += 1
            if taken == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return counted

    for call in calls:
        module, _, name = call.rpartition(".")
        owner = importlib.import_module(module)
        setattr(owner, name, mortal(getattr(owner, name)))
    work()
