"""Stops between two steps on SIGTERM (from a scheduler) or Ctrl-C."""

from __future__ import annotations

import signal
from types import FrameType

from torch.distributed import Store  # type: ignore[attr-defined]

_KEY = "stop after iteration"


class StopRequest:
    """Records a signal. The loop checks it between steps, so that it can save first.

    torchrun passes SIGTERM on to its workers and kills them 30 s later; Ctrl-C reaches them
    directly and through torchrun, so a second signal must not interrupt the saving.

    Args:
        store: the run's; a rank that got a signal writes the last step into it for all ranks.
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
        """Whether the run ends with step ``iteration``; the same on every rank.

        The first rank that gets a signal makes the next step the last one. Every rank reads that in
        time: it is written before that rank takes part in the step, which no rank can complete
        without it. Costs one request to the store per step, no collective, and no wait for the
        device.
        """
        if self._last is None:
            if self.received is not None:
                self._store.compare_set(_KEY, "", str(iteration + 1))
            if self._store.check([_KEY]):
                self._last = int(self._store.get(_KEY))
        return self._last is not None and iteration >= self._last

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number).name
