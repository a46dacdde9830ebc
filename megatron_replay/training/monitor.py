"""Watches a run: writes its log and readings, warns, records skipped steps, and sums up.

Every rank has a ``Monitor``, because probes and the distance are collective; only the writer rank
logs and prints. A resumed run refills it from ``metrics.jsonl``, so that its numbers and warnings
are those of a run that never stopped.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_replay.checkpoint.directories import iteration_directory, latest_iteration
from megatron_replay.checkpoint.training import TrainState
from megatron_replay.data.forest import Forest
from megatron_replay.errors import CheckpointError, TrainingError
from megatron_replay.files import output_error
from megatron_replay.training.batches import StepBatch
from megatron_replay.training.build import TrainingRun
from megatron_replay.training.metrics import (
    SPIKE_SIGMAS,
    SPIKE_WINDOW,
    MetricsLog,
    Stability,
    UpdateWarnings,
    keep_lines_until,
)
from megatron_replay.training.readings import Distance, GeneralText, Probe, drift_warning
from megatron_replay.training.step import StepResult

#: One line per skipped step: the documents of its batch, and the rank whose loss was not finite.
SKIPPED = "skipped_batches.jsonl"
#: One more skipped step ends the run, since its data or learning rate must be at fault.
MAX_SKIPPED_STEPS = 10


class Monitor:
    """Call ``start`` before the first step, ``after_step`` after each one, ``finish`` at the end.

    Raises:
        ConfigError: the general text is of another tokenizer, or its base reading is missing.
        DataError: a sample has no label or recorded position.
    """

    def __init__(self, run: TrainingRun) -> None:
        config, groups, data, model = run.config, run.groups, run.data, run.model
        iteration, directory = run.state.iteration, run.directory
        self._config, self._groups, self._data, self._wrapped = config, groups, data, run.wrapped
        self._directory = directory
        self._log: MetricsLog | None = None
        self._stability = Stability(warmup_iters=config.optimizer.lr_warmup_iters)
        self._updates = UpdateWarnings()
        self._seconds = self._waited = 0.0  # over logged steps; waited: for data
        self._tokens = self._computed_tokens = 0
        if groups.writer:
            keep_lines_until(directory / SKIPPED, iteration)
            self._log = MetricsLog(directory, resume_iteration=iteration)
            for line in self._log.kept:
                if "loss" in line:
                    self._notice(line)  # its warnings were printed before
        self._samples: dict[str, Probe | GeneralText] = {}
        if data.reader is not None and config.probe.probe_interval > 0:
            self._samples["probe"] = Probe(config, groups, data)
        if (prefix := config.probe.general_data_path) is not None:
            general = GeneralText(config, groups, prefix, data.corpus, model.shape)
            self._samples["general"] = general
            log = self._log if iteration > 0 else None
            groups.agreed(lambda: general.resume(log.kept, directory) if log else None)
        self._distance = Distance(config.model.load, directory, model, run.optimizer, groups)
        self._first_iteration, self._num_labels = iteration, 0  # labels: on the last stage
        self._is_drifting, self._summary = False, ""

    def start(self) -> None:
        """Measure the starting model, before the first step of a new run. Collective."""
        if self._first_iteration == 0:
            self._measure(0)

    def after_step(
        self,
        state: TrainState,
        result: StepResult,
        batch: StepBatch,
        *,
        lr: float,
        seconds: float,
        waited: float,
    ) -> None:
        """Record a skipped step, log, warn, and measure what is due. Collective over the world.

        Args:
            state: the run's, after the step.
            seconds, waited: the time of the step, and its wait for the batch.

        Raises:
            TrainingError: too many steps were skipped.
            OutputError: the disk is full.
        """
        iteration = state.iteration
        self._num_labels += result.positions
        if result.skipped:
            self._record_skipped(state, result.own_sums, batch.parts)
        if self._log is not None and iteration % self._config.training.log_interval == 0:
            line: dict[str, Any] = {
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "lr": lr,
                "positions": result.positions,
                "tokens": batch.tokens,
                "computed_tokens": batch.computed_tokens,
                "seconds": seconds,
                "data_wait_seconds": waited,
                "skipped_steps": state.skipped_steps,
                "update": result.update,
            }
            spikes, warnings = self._notice({"iteration": iteration, **line})
            self._log.write(iteration, line | ({"spike_above": spikes} if spikes else {}))
            for warning in warnings:
                self._warn(iteration, warning)
        self._measure(iteration)

    def nothing_learnt(self, state: TrainState, *, is_over: bool = False) -> str:
        """Why the run has nothing to save yet (most steps skipped, or no label); "" otherwise.

        Collective over the world.

        Raises:
            TrainingError: if ``is_over``, so that such a run does not end as a success.
        """
        steps, skipped = state.iteration, state.skipped_steps
        if 2 * skipped > steps:
            what = f"{skipped} of {steps} steps were skipped for a loss or gradient that was not "
            nothing = f"{what}finite: not saved"
            fix = f"Check the batches in {SKIPPED}, or lower --lr"
        elif not self._first_iteration and not any(self._groups.agreed(lambda: self._num_labels)):
            nothing = f"none of {steps} steps had a label: nothing was learned or saved"
            fix = (
                "Raise --seq-length to that of Stage 0, or check the corpus "
                "(tools/preprocess_data.py --show 3)"
            )
        else:
            return ""
        if is_over:
            raise TrainingError(nothing, where=self._directory, fix=fix)
        return nothing

    def finish(self) -> None:
        """Close the log; print the summary of a finished run."""
        if self._log is not None:
            self._log.close()
            if self._summary:
                print(self._summary, flush=True)

    def _notice(self, line: Mapping[str, Any]) -> tuple[dict[str, float], list[str]]:
        """Add a logged step; returns the limits exceeded where spikes begin, and new warnings."""
        if not line["positions"]:  # a step without a label has no loss
            return {}, []
        self._seconds += line["seconds"]
        self._waited += line.get("data_wait_seconds", 0.0)
        self._tokens += line.get("tokens", 0)
        self._computed_tokens += line.get("computed_tokens", 0)
        spikes = self._stability.add(line)
        value = {"loss": line["loss"], "gradient": line["grad_norm"]}
        title = {"loss": "loss", "gradient": "gradient norm"}
        warnings = [
            f"{title[name]} spikes to {value[name]:.4g}, above mean + {SPIKE_SIGMAS:g} sigma = "
            f"{limit:.4g} of the {SPIKE_WINDOW} logged steps before"
            for name, limit in spikes.items()
        ]
        return spikes, warnings + self._updates.add(line.get("update") or {})

    def _measure(self, iteration: int) -> None:
        """Take and log the readings due after ``iteration``. Collective."""
        interval, is_last = self._config.probe.probe_interval, iteration == self._data.train_iters
        readings: dict[str, Any] = {}
        if is_last or (interval and iteration % interval == 0):
            taken = {name: sample.read(self._wrapped) for name, sample in self._samples.items()}
            readings |= {name: values for name, values in taken.items() if values is not None}
            if iteration > 0:
                readings["stability"] = self._stability.values()
        if is_last and iteration > 0:
            try:
                readings["relative_l2"] = self._distance.read()
            except CheckpointError as error:  # the weights are not saved yet: only a warning
                self._warn(iteration, f"relative L2 was not measured: {error}")
        if self._log is None or not readings:
            return
        # Full softmax trains what is outside the sets as well: its mass there may rise unharmed.
        is_watched = "probe" in readings and self._config.loss.loss == "restricted"
        if is_watched and (warning := drift_warning(readings["probe"])):
            if is_last or not self._is_drifting:  # when it starts, and at the end
                self._warn(iteration, warning)
            self._is_drifting = True
        self._log.write(iteration, readings)
        if is_last:
            self._summary = self._summarize(iteration, readings)

    def _warn(self, iteration: int, message: str) -> None:
        if self._log is not None:
            print(f"warning: iteration {iteration}: {message}", file=sys.stderr)

    def _summarize(self, iteration: int, readings: Mapping[str, Any]) -> str:
        """The readings after the last step, as sentences."""
        summary = f"{iteration} iterations: {self._stability.summary()}"
        if self._seconds:
            share = self._waited / self._seconds
            summary += f" Steps waited for data for {100 * share:.2g} % of their time."
        if self._computed_tokens < self._tokens:
            share = self._computed_tokens / self._tokens
            summary += f" Shared prefixes: {100 * share:.1f} % of the tokens were computed."
        if "relative_l2" in readings:
            summary += (
                f" Relative L2 from the first weights: {100 * readings['relative_l2']:.3g} %."
            )
        if "general" in readings:
            perplexity, delta = (readings["general"][x] for x in ("perplexity", "delta_ppl"))
            summary += f" Perplexity of general text {perplexity:.2f} ({delta:+.2f})."
        return f"{summary} Saved; tools/convert_checkpoint.py exports it."

    def _record_skipped(
        self, state: TrainState, own_sums: torch.Tensor | None, parts: Sequence[Forest]
    ) -> None:
        """Report a skipped step and record its batch; one all-gather of objects over the world."""
        groups, path = self._groups, self._directory / SKIPPED
        losses = [x for x in groups.agreed(lambda: self._own_loss(own_sums)) if x is not None]
        bad = [str(loss["rank"]) for loss in losses if loss["loss"] is None]
        record = {
            "iteration": state.iteration,
            "not_finite": "loss" if bad else "gradient",
            "losses": losses,
            "micro_batches": [
                {"dp_rank": number % groups.dp_size, "documents": part.document_D.tolist()}
                for number, part in enumerate(parts)
            ],
        }
        groups.agreed(lambda: _append(path, record) if groups.writer else None)
        count = state.skipped_steps
        if groups.writer:
            what = f"the loss of rank {', '.join(bad)}" if bad else "the gradient"
            print(
                f"iteration {state.iteration}: {what} is not finite, step skipped ({count} so "
                f"far); its batch is in {path}",
                file=sys.stderr,
            )
        if count > MAX_SKIPPED_STEPS:
            last = latest_iteration(self._directory)
            raise TrainingError(
                f"{count} steps were skipped for losses or gradients that were not finite",
                expected=f"at most {MAX_SKIPPED_STEPS}",
                fix=f"Check the batches in {SKIPPED}, or lower --lr; the last good checkpoint is "
                + ("none" if last is None else str(iteration_directory(self._directory, last))),
            )

    def _own_loss(self, own_sums: torch.Tensor | None) -> dict[str, Any] | None:
        """This rank's mean loss, None in place of NaN; no entry before the last stage."""
        if own_sums is None:
            return None
        total, positions = own_sums.tolist()
        mean = total / positions if positions else 0.0
        loss = mean if math.isfinite(mean) else None
        return {"rank": self._groups.rank, "dp_rank": self._groups.dp_rank, "loss": loss}


def _append(path: Path, record: dict[str, Any]) -> None:
    try:
        with open(path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(record) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise output_error(path, error) from error
