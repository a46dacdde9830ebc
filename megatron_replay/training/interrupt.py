"""Stop between two steps when asked to: SIGTERM from a scheduler, Ctrl-C from a person."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Remembers that a signal came; the loop asks between steps, so work is saved, not torn.

    torchrun passes SIGTERM on to its workers and kills them 30 s later; Ctrl-C reaches them
    directly and through torchrun, so a second signal must not interrupt the saving.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number).name
