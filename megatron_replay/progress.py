"""Prints the progress of long work: a bar with rate and ETA, or a line every ten seconds."""

from __future__ import annotations

import sys
import time
from typing import IO

from tqdm import tqdm

#: Seconds between lines where the output is not a terminal.
_LINE_SECONDS = 10.0


class Progress:
    """Counts units of work and shows how many are done.

    Args:
        description: what is being done.
        total: units in all.
        unit: name of a unit, in the plural ("documents").
        initial: units that an earlier run has done; the rate leaves them out.
        enabled: False on all ranks but one, which print nothing.
    """

    def __init__(
        self,
        description: str,
        total: int,
        unit: str,
        *,
        initial: int = 0,
        enabled: bool = True,
        stream: IO[str] | None = None,
    ) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done, self._initial = initial, initial
        self._stream = sys.stderr if stream is None else stream
        self._enabled = enabled
        self._start = self._last_line = time.monotonic()
        self._bar = None
        if enabled and self._stream.isatty():
            self._bar = tqdm(
                total=total, initial=initial, desc=description, unit=f" {unit}",
                file=self._stream, dynamic_ncols=True,
            )  # fmt: skip

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count ``units`` more, and print ``note`` (such as a loss) with them."""
        self.done += units
        if not self._enabled:
            return
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(units)
        elif time.monotonic() - self._last_line >= _LINE_SECONDS or self.done == self.total:
            self._last_line = time.monotonic()
            print(self.line(note), file=self._stream, flush=True)

    def line(self, note: str = "") -> str:
        """The plain line: done/total, percentage, rate, time so far, time to go."""
        clock = tqdm.format_interval
        elapsed = max(time.monotonic() - self._start, 1e-9)
        rate = (self.done - self._initial) / elapsed
        left = max(self.total - self.done, 0)
        eta = clock(left / rate) if rate > 0 else "?" if left else clock(0)
        share = 100 * self.done / self.total if self.total else 100.0
        text = (
            f"{self.description}: {self.done}/{self.total} {self.unit} ({share:.0f} %), "
            f"{rate:.{1 if rate >= 1 else 3}f}/s, elapsed {clock(elapsed)}, ETA {eta}"
        )
        return f"{text}, {note}" if note else text

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._bar is not None:
            self._bar.close()
