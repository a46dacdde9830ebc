"""Makes batches in a thread, ahead of the step that uses them: in the same order, a few at most.

Memory: at most ``depth`` batches besides the one in use. Of a global batch of T positions, N of
them selected with C candidates in all, a data-parallel rank holds its share of 25 T + 40 N + 4 C
bytes: 7.4 MB for 16 packs of 4,096 positions of which one in five has a set of 100.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` on ``device``, by a copy from pinned memory that the host does not wait for.

    The copy is queued where the kernels of a step are, so they find it done.
    """
    if device.type == "cpu":
        return tensor.to(device)
    # A thread starts on the first device; pinning without this would open a context there.
    torch.get_device_module(device).set_device(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Loader(Generic[T]):
    """``make(step)`` of each of ``steps``, in order, at most ``depth`` of them made ahead.

    ``next(loader)`` waits for the next one and raises the error of its ``make``, so an error comes
    up at the step it belongs to. Batches made ahead and never used are dropped, errors included.
    Use it as a context manager: leaving the block ends the thread.

    Args:
        make: runs in the loader's thread, one call at a time.
        steps: the arguments of ``make``.
        depth: 1 or more.

    Attributes:
        waited: seconds that the last ``next`` took.
    """

    def __init__(self, make: Callable[[int], T], steps: Iterable[int], *, depth: int) -> None:
        assert depth > 0, depth
        self.waited = 0.0
        self._make, self._steps = make, iter(steps)
        self._making = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead: deque[Future[T]] = deque()
        for _ in range(depth):
            self._make_another()

    def __iter__(self) -> Loader[T]:
        return self

    def __next__(self) -> T:
        start = time.perf_counter()
        if not self._ahead:
            raise StopIteration
        made = self._ahead[0].result()  # an error stays first: it is raised again
        self._ahead.popleft()
        self._make_another()
        self.waited = time.perf_counter() - start
        return made

    def still(self) -> threading.Lock:
        """No ``make`` runs while this lock is held: for forks, which copy locks as they are."""
        return self._making

    def close(self) -> None:
        """End the thread: wait for the ``make`` it is in, drop what was made."""
        self._thread.shutdown(cancel_futures=True)
        self._ahead.clear()

    def __enter__(self) -> Loader[T]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _make_another(self) -> None:
        step = next(self._steps, None)
        if step is not None:
            self._ahead.append(self._thread.submit(self._make_one, step))

    def _make_one(self, step: int) -> T:
        with self._making:
            return self._make(step)
