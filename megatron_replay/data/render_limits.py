"""Limits on CPU time and memory while a chat template is rendered: templates are programs.

A template comes with a model and can loop for ever or build a string of any length. jinja2's
sandbox keeps it from files and processes, and bounds neither.
"""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

#: Seconds of CPU time for one rendering: a busy machine cannot use them up. A rendering of a
#: thousand messages takes some milliseconds.
SECONDS = 10.0
#: What a rendering may add to the process's address space. One text of ``MAX_TEXT`` is a fraction.
_MAX_BYTES = 2 << 30
#: Characters of one rendered conversation: some ten million tokens.
MAX_TEXT = 64 << 20


class RenderLimitError(Exception):
    """A rendering took more than it may; its text says what."""


@contextmanager
def render_limits() -> Iterator[None]:
    """Bound what runs inside the block; costs some 50 us.

    CPU time is bounded in the main thread only: Python runs signal handlers nowhere else.

    Raises:
        RenderLimitError: the block took more than ``SECONDS``, or asked for more than 2 GiB.
    """
    is_running, is_main = True, threading.current_thread() is threading.main_thread()

    def stop(number: int, frame: FrameType | None) -> None:
        if is_running:
            raise RenderLimitError(f"it took more than {SECONDS:g} s of CPU time")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _address_space() + _MAX_BYTES
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    previous = signal.signal(signal.SIGPROF, stop) if is_main else None
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        if is_main:
            # It rings again each second: an exception that is raised in a destructor is lost.
            signal.setitimer(signal.ITIMER_PROF, SECONDS, 1.0)
        try:
            yield
        except MemoryError:
            raise RenderLimitError(f"it asked for more than {_MAX_BYTES >> 30} GiB") from None
        finally:
            is_running = False
    finally:
        is_running = False  # should it have rung in the line above
        if is_main:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, previous or signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int:
    with open("/proc/self/statm", "rb") as handle:
        return int(handle.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
