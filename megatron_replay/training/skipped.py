"""Steps that were left out because a loss or gradient was not finite: counted, told, recorded."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_replay.checkpoint.training import iteration_directory, latest_iteration
from megatron_replay.data.packing import Pack
from megatron_replay.errors import TrainingError
from megatron_replay.files import output_error
from megatron_replay.parallel import Parallel
from megatron_replay.training.metrics import keep_lines_until

#: One line a skipped step: its batch, and whose loss it was.
FILE = "skipped_batches.jsonl"
#: A run ends with the next one: its data or its learning rate needs a look.
MAX_SKIPPED_STEPS = 10


class SkippedBatches:
    """Records what a skipped step was to learn from; every rank has one, the writer writes.

    A run that resumes at iteration k drops the lines after k: those steps are taken again.

    Args:
        directory: of the run.
        lengths: usable tokens of each document.
        resume_iteration: where the run stands.
    """

    def __init__(
        self,
        directory: Path,
        groups: Parallel,
        lengths: npt.NDArray[np.int32],
        *,
        resume_iteration: int,
    ) -> None:
        self._directory, self._groups, self._lengths = directory, groups, lengths
        if groups.writer:
            keep_lines_until(directory / FILE, resume_iteration)

    def add(
        self,
        iteration: int,
        count: int,
        own_sums: torch.Tensor | None,
        packs: Sequence[Pack],
        micro_batch_size: int,
    ) -> None:
        """Tell of one; collective over the world, an all-gather of objects.

        Args:
            iteration: the step's number.
            count: skipped steps, this one included.
            own_sums: ``StepResult.own_sums``.
            packs: the step's global batch.

        Raises:
            TrainingError: there are too many; it names the newest checkpoint.
            OutputError: the disk is full.
        """
        found = self._groups.agreed(lambda: self._own_loss(own_sums))
        losses = [loss for loss in found if loss is not None]
        bad = [str(loss["rank"]) for loss in losses if loss["loss"] is None]
        if self._groups.writer:
            what = f"the loss of rank {', '.join(bad)}" if bad else "the gradient"
            print(
                f"iteration {iteration}: {what} is not finite, step skipped ({count} so far); "
                f"its batch is in {self._directory / FILE}",
                file=sys.stderr,
            )
        record = {
            "iteration": iteration,
            "not_finite": "loss" if bad else "gradient",
            "losses": losses,
            "packs": self._describe(packs, micro_batch_size),
        }
        self._groups.agreed(lambda: self._write(record) if self._groups.writer else None)
        if count > MAX_SKIPPED_STEPS:
            last = latest_iteration(self._directory)
            raise TrainingError(
                f"{count} steps were skipped for losses or gradients that were not finite",
                expected=f"at most {MAX_SKIPPED_STEPS}",
                fix=f"Look at the batches in {FILE}, or lower --lr; the last good checkpoint is "
                + ("none" if last is None else str(iteration_directory(self._directory, last))),
            )

    def _own_loss(self, own_sums: torch.Tensor | None) -> dict[str, Any] | None:
        """This rank's mean loss, None in the place of NaN; None before the last stage."""
        if own_sums is None:
            return None
        total, positions = own_sums.tolist()
        mean = total / positions if positions else 0.0
        return {
            "rank": self._groups.rank,
            "dp_rank": self._groups.dp_rank,
            "loss": mean if math.isfinite(mean) else None,
        }

    def _describe(self, packs: Sequence[Pack], micro_batch_size: int) -> list[dict[str, Any]]:
        """Who computed each pack, and where its documents lie in it: [first, behind the last]."""
        described = []
        for number, pack in enumerate(packs):
            stops = np.cumsum(self._lengths[pack].astype(np.int64) - 1).tolist()
            starts = [0, *stops][: len(stops)]  # none of an empty pack, which fills up a batch
            places = zip(pack.tolist(), starts, stops, strict=True)
            described.append(
                {
                    "dp_rank": number // micro_batch_size % self._groups.dp_size,
                    "documents": [
                        {"document": document, "positions": [first, stop]}
                        for document, first, stop in places
                    ],
                }
            )
        return described

    def _write(self, record: dict[str, Any]) -> None:
        path = self._directory / FILE
        try:
            with open(path, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(record) + "\n")
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise output_error(path, error) from error
