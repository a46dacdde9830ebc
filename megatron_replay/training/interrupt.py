"""Stop between two steps when asked to: SIGTERM from a scheduler, Ctrl-C from a person."""

from __future__ import annotations

import signal
from types import FrameType

from torch.distributed import Store  # type: ignore[attr-defined]

_KEY = "stop after iteration"


class StopRequest:
    """Remembers that a signal came; the loop asks between steps, so work is saved, not torn.

    torchrun passes SIGTERM on to its workers and kills them 30 s later; Ctrl-C reaches them
    directly and through torchrun, so a second signal must not interrupt the saving.

    Args:
        store: of the run, in which a rank that was asked to stop tells the others.
    """

    def __init__(self, store: Store) -> None:
        self.received: str | None = None
        self._store = store
        self._last: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def after(self, iteration: int) -> bool:
        """Whether the run ends with step ``iteration``: the same answer on every rank.

        The first rank that was asked names the next step as the last. All see that in time: none
        ends a step in which that rank has not taken part, and it names the step before. One
        question to the store a step, without a collective or a wait for the device.
        """
        if self._last is None:
            if self.received is not None:
                self._store.compare_set(_KEY, "", str(iteration + 1))
            if self._store.check([_KEY]):
                self._last = int(self._store.get(_KEY))
        return self._last is not None and iteration >= self._last

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number).name
