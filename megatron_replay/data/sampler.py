"""Which packs make up global batch k, and which of them a data-parallel rank computes."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
import numpy.typing as npt

from megatron_replay.config import Stage1Config
from megatron_replay.data.packing import Pack, document_order, plan_packs
from megatron_replay.errors import ConfigError


class GlobalBatches:
    """The packs of ``epochs`` passes, each in its own order, cut into global batches.

    Global batch k holds packs ``k * global_batch_size`` up to ``(k + 1) * global_batch_size`` of
    the epochs laid end to end: a pure function of (seed, epochs before, k), the same for any number
    of ranks. Empty packs fill up the last one.

    Sample i of a global batch belongs to micro-batch ``i // micro_batch_size`` of the whole, and
    these go to the ranks in turn, as in Megatron's pretraining sampler: rank r computes r,
    r + dp_size, … So changing ``dp_size`` changes who computes a micro-batch, never what is in it.

    Args:
        lengths: int32 [D], tokens used of each document (``fit_documents``).
        seq_length: positions of a pack.
        epochs: passes over the documents; None: without an end, so no batch is padded.
        pack_documents: False gives each document a pack of its own.

    Raises:
        ConfigError: ``global_batch_size`` is no multiple of ``micro_batch_size * dp_size``.
    """

    def __init__(
        self,
        lengths: npt.NDArray[np.int32],
        *,
        seq_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        epochs: int | None,
        pack_documents: bool = True,
        dp_rank: int,
        dp_size: int,
    ) -> None:
        if global_batch_size <= 0 or global_batch_size % (micro_batch_size * dp_size):
            raise ConfigError(
                "the global batch cannot be shared out evenly",
                where="--global-batch-size",
                expected=f"a multiple of {micro_batch_size * dp_size} "
                f"(--micro-batch-size {micro_batch_size} x {dp_size} data-parallel ranks)",
                found=global_batch_size,
            )
        assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
        self._lengths, self._seq_length, self._seed = lengths, seq_length, seed
        self._global_batch_size, self._micro_batch_size = global_batch_size, micro_batch_size
        self._pack_documents = pack_documents
        self._epochs, self._dp_rank, self._dp_size = epochs, dp_rank, dp_size
        assert (lengths > 0).any(), "fit_documents refuses what leaves nothing"
        self._planned: tuple[int, list[Pack]] = (-1, [])
        # The number of packs before each epoch known so far: epochs differ in theirs.
        self._first_pack = [0]

    @property
    def num_batches(self) -> int:
        """Global batches in all epochs, of which there must be a number."""
        assert self._epochs is not None
        while len(self._first_pack) <= self._epochs:
            self._count_epoch()
        return -(-self._first_pack[-1] // self._global_batch_size)

    def global_batch(self, k: int) -> list[Pack]:
        """All ``global_batch_size`` packs of global batch ``k``, empty ones included."""
        if k < 0 or (self._epochs is not None and k >= self.num_batches):
            raise IndexError(f"global batch {k} of {self.num_batches}")
        first = k * self._global_batch_size
        return [self._pack(i) for i in range(first, first + self._global_batch_size)]

    def micro_batches(self, k: int) -> list[list[Pack]]:
        """This rank's micro-batches of global batch ``k``, in the order to compute them."""
        packs, size = self.global_batch(k), self._micro_batch_size
        micro_batches = [packs[i : i + size] for i in range(0, len(packs), size)]
        return micro_batches[self._dp_rank :: self._dp_size]

    def _count_epoch(self) -> None:
        self._first_pack.append(self._first_pack[-1] + len(self._plan(len(self._first_pack) - 1)))

    def _plan(self, epoch: int) -> list[Pack]:
        """The packs of ``epoch``; only the last one requested is kept."""
        if self._planned[0] != epoch:
            order = document_order(len(self._lengths), seed=self._seed, epoch=epoch)
            self._planned = (
                epoch,
                plan_packs(self._lengths, order, self._seq_length, together=self._pack_documents),
            )
        return self._planned[1]

    def _pack(self, i: int) -> Pack:
        """Pack ``i`` of all epochs laid end to end; an empty one behind the last."""
        while i >= self._first_pack[-1]:
            if self._epochs is not None and len(self._first_pack) > self._epochs:
                return np.empty(0, dtype=np.int64)
            self._count_epoch()
        epoch = bisect_right(self._first_pack, i) - 1
        return self._plan(epoch)[i - self._first_pack[epoch]]


def global_batches(
    config: Stage1Config, lengths: npt.NDArray[np.int32], *, dp_rank: int, dp_size: int
) -> GlobalBatches:
    """The batches of a whole run: of --train-epochs, or without an end under --train-iters."""
    training = config.training
    return GlobalBatches(
        lengths,
        seq_length=config.data.seq_length,
        global_batch_size=training.global_batch_size,
        micro_batch_size=config.data.micro_batch_size,
        seed=training.seed,
        epochs=None if training.train_iters is not None else training.train_epochs or 1,
        pack_documents=config.data.pack_documents,
        dp_rank=dp_rank,
        dp_size=dp_size,
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
