"""The batches of a run: which documents make up each, and a thread that makes them ahead of the
step.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from megatron_replay.config import Stage1Config
from megatron_replay.data.corpus import Corpus
from megatron_replay.data.forest import stems
from megatron_replay.data.packing import Pack, document_order, plan_packs
from megatron_replay.errors import ConfigError

T = TypeVar("T")


@dataclass(eq=False)
class GlobalBatches:
    """The documents of ``epochs`` passes, each in its own order, cut into global batches.

    Global batch k holds the documents of packs ``k * global_batch_size`` up to
    ``(k + 1) * global_batch_size`` of the epochs laid end to end: a pure function of (seed, epochs
    before, k). Packs decide what a step learns from, not how it is computed: neither the number of
    ranks nor shared prefixes change it.

    Attributes:
        lengths: int32 [D], tokens used of each document (``fit_documents``).
        seq_length: positions of a pack.
        epochs: passes over the documents; None: without an end.
        pack_documents: False gives each document a pack of its own.
        stem_D, group: as in ``document_order``.
    """

    lengths: npt.NDArray[np.int32]
    _: KW_ONLY
    seq_length: int
    global_batch_size: int
    seed: int
    epochs: int | None
    pack_documents: bool = True
    stem_D: npt.NDArray[np.int64] | None = None
    group: int = 1

    def __post_init__(self) -> None:
        assert (self.lengths > 0).any(), "fit_documents refuses what leaves nothing"
        self._planned: tuple[int, list[Pack]] = (-1, [])
        # The number of packs before each epoch known so far: epochs differ in theirs.
        self._first_pack = [0]

    @property
    def num_batches(self) -> int:
        """Global batches in all epochs, of which there must be a number."""
        assert self.epochs is not None
        while len(self._first_pack) <= self.epochs:
            self._count_epoch()
        return -(-self._first_pack[-1] // self.global_batch_size)

    def documents(self, k: int) -> Pack:
        """The documents of global batch ``k``, in their order: int64.

        A document that ends one epoch and begins the next occurs twice.
        """
        if k < 0 or (self.epochs is not None and k >= self.num_batches):
            raise IndexError(f"global batch {k} of {self.num_batches}")
        first = k * self.global_batch_size
        return np.concatenate([self._pack(i) for i in range(first, first + self.global_batch_size)])

    def _pack(self, i: int) -> Pack:
        """Pack ``i`` of all epochs laid end to end; an empty one after the last."""
        while i >= self._first_pack[-1]:
            if self.epochs is not None and len(self._first_pack) > self.epochs:
                return np.empty(0, dtype=np.int64)
            self._count_epoch()
        epoch = bisect_right(self._first_pack, i) - 1
        return self._plan(epoch)[i - self._first_pack[epoch]]

    def _count_epoch(self) -> None:
        self._first_pack.append(self._first_pack[-1] + len(self._plan(len(self._first_pack) - 1)))

    def _plan(self, epoch: int) -> list[Pack]:
        """The packs of ``epoch``; only the last one requested is kept."""
        if self._planned[0] != epoch:
            order = document_order(
                len(self.lengths),
                seed=self.seed,
                epoch=epoch,
                stem_D=self.stem_D,
                group=self.group,
            )
            packs = plan_packs(self.lengths, order, self.seq_length, together=self.pack_documents)
            self._planned = (epoch, packs)
        return self._planned[1]


def global_batches(
    config: Stage1Config, corpus: Corpus, lengths: npt.NDArray[np.int32]
) -> GlobalBatches:
    """The batches of a whole run: of --train-epochs, or without an end under --train-iters."""
    training = config.training
    group, stem_D = training.group_prefixes, None
    if group > 1:
        stem_D = stems(corpus, lengths)
        if len(np.unique(stem_D)) == len(stem_D):
            raise ConfigError(
                "no two documents begin alike enough: groups would change nothing",
                where="--group-prefixes",
                found=group,
                fix="Leave it out",
            )
    return GlobalBatches(
        lengths,
        seq_length=config.data.seq_length,
        global_batch_size=training.global_batch_size,
        seed=training.seed,
        epochs=None if training.train_iters is not None else training.train_epochs or 1,
        pack_documents=training.pack_documents,
        stem_D=stem_D,
        group=group,
    )


def require_iterations(config: Stage1Config, train_iters: int) -> None:
    """Raise ConfigError unless the run continues after its warm-up."""
    warmup = config.optimizer.lr_warmup_iters
    if warmup >= train_iters:
        raise ConfigError(
            "the warm-up is as long as the run",
            where="--lr-warmup-iters",
            expected=f"below the run's {train_iters} iterations",
            found=warmup,
            fix="Shorten it, or lower --global-batch-size or --seq-length for more iterations",
        )


class Loader(Generic[T]):
    """``make(step)`` of each of ``steps``, in order, at most ``depth`` of them made ahead.

    ``next(loader)`` waits for the next one and raises the error of its ``make``, so an error comes
    up at the step it belongs to. Batches made ahead and never used are dropped, errors included.
    Use it as a context manager: leaving the block ends the thread.

    Memory: at most ``depth`` batches besides the one in use. Of a global batch of T computed rows,
    N of them selected with C candidates in all, a data-parallel rank holds its share of
    21 T + 40 N + 4 C bytes, 7.1 MB for 65,536 rows of which one in five has a set of 100; and what
    attention needs: a byte for each pair of a row and a key under a mask, 8 for each gathered key.

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

    def __enter__(self) -> Loader[T]:
        return self

    def __exit__(self, *error: object) -> None:
        """End the thread: wait for the ``make`` it is in, drop what was made."""
        self._thread.shutdown(cancel_futures=True)
        self._ahead.clear()

    def _make_another(self) -> None:
        step = next(self._steps, None)
        if step is not None:
            self._ahead.append(self._thread.submit(self._make, step))
