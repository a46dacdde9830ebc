"""What a run sees of itself, and tells the user: log, probes, steadiness, distance, warnings.

Every rank has a ``Watch``, since probes and distance take all of them; only the writer logs and
speaks. A run that goes on refills its watch from the lines it has logged, so that its numbers and
warnings are those of a run that never stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_replay.checkpoint.load import LoadedModel
from megatron_replay.config import Stage1Config
from megatron_replay.data.corpus import Corpus
from megatron_replay.errors import CheckpointError
from megatron_replay.parallel import Parallel
from megatron_replay.store import CandidateReader
from megatron_replay.training.distance import Distance
from megatron_replay.training.metrics import MetricsLog
from megatron_replay.training.probe import GeneralText, Probe, Reading, require_same_tokenizer
from megatron_replay.training.stability import AngleWatch, StabilityMonitor


class Watch:
    """The observers of a run, behind ``begin``, ``step`` and ``close``.

    Args:
        model, wrapped: this rank's part, plain and as it is trained.
        reader: the candidate store, if the run has one.
        lengths: usable tokens of each document of ``corpus``.
        iteration: where the run stands, 0 at its start.
        train_iters: where it ends.

    Raises:
        ConfigError: the general text is of another tokenizer, or its base is not known.
    """

    def __init__(
        self,
        config: Stage1Config,
        groups: Parallel,
        *,
        model: LoadedModel,
        wrapped: torch.nn.Module,
        optimizer: MegatronOptimizer,
        corpus: Corpus,
        reader: CandidateReader | None,
        lengths: npt.NDArray[np.int32],
        iteration: int,
        train_iters: int,
    ) -> None:
        self._config, self._groups, self._wrapped = config, groups, wrapped
        self._train_iters = train_iters
        directory = Path(config.training.save)
        self._log: MetricsLog | None = None
        if groups.writer:
            self._log = MetricsLog(directory, resume_iteration=iteration)
        self._stability = StabilityMonitor(warmup_iters=config.optimizer.lr_warmup_iters)
        self._angles = AngleWatch()
        self._seconds = self._waited = 0.0  # of the steps logged; waited: for data
        for line in self._log.kept if self._log else []:
            self._notice(line)  # what it says has been said
        self._probe = _build_probe(config, groups, corpus, reader, lengths)
        self._drifting = False  # mass: said when it starts, and at the end
        self._general = _build_general(config, groups, corpus, model)
        if self._general is not None and iteration > 0:
            general, log = self._general, self._log
            groups.agreed(lambda: general.resume(log.kept, directory) if log else None)
        self._distance = Distance(config.model.load, directory, model, optimizer, groups)
        self._summary: list[str] = []

    def begin(self, iteration: int) -> None:
        """Before the first step of a new run: measure what it starts from."""
        if iteration == 0:
            self._measure(0)

    def step(self, iteration: int, values: dict[str, Any]) -> None:
        """After a step: log ``values``, speak of what they show, measure what is due."""
        if self._log is not None and iteration % self._config.training.log_interval == 0:
            messages = self._notice({"iteration": iteration, **values})
            if self._stability.spiking:
                values = {**values, "spike_above": self._stability.spiking}
            self._log.write(iteration, values)
            for message in messages:
                _warn(iteration, message)
        self._measure(iteration)

    def close(self) -> None:
        """Flush the logs; of a run that has just ended, print the summary."""
        if self._log is not None:
            self._log.close()
            if self._summary:
                print(" ".join(self._summary), flush=True)

    def _notice(self, line: Mapping[str, Any]) -> list[str]:
        """Feed a logged line to whatever watches steps; what there is to say about it."""
        if "loss" not in line or not line["positions"]:  # a step without a label has no loss
            return []
        self._seconds += line["seconds"]
        self._waited += line.get("data_wait_seconds", 0.0)
        spikes = self._stability.observe(line["iteration"], line["loss"], line["grad_norm"])
        return spikes + self._angles.observe(line.get("update") or {})

    def _measure(self, iteration: int) -> None:
        last = iteration == self._train_iters

        def is_due(interval: int) -> bool:
            return last or (interval > 0 and iteration % interval == 0)

        readings = dict[str, Any]()
        if is_due(self._config.probe.probe_interval):
            readings |= self._read_probes(iteration)
        if iteration > 0 and is_due(self._config.probe.probe_interval):
            readings["stability"] = self._stability.values()
        if iteration > 0 and last:
            readings |= self._read_distance(iteration)
        if readings and self._log is not None:
            self._log.write(iteration, readings)
        if last:
            self._summary = self._summarize(iteration, readings)

    def _read_probes(self, iteration: int) -> dict[str, Any]:
        readings: dict[str, Any] = {}
        if self._probe is not None and (reading := self._probe.read(self._wrapped)) is not None:
            readings["probe"] = reading.values()
            self._warn_of_drift(iteration, reading)
        if self._general is not None and (values := self._general.read(self._wrapped)) is not None:
            readings["general"] = values
        return readings

    def _warn_of_drift(self, iteration: int, reading: Reading) -> None:
        last = iteration == self._train_iters
        if self._log is not None and reading.drifts and (last or not self._drifting):
            self._drifting = True
            _warn(iteration, reading.warning())

    def _read_distance(self, iteration: int) -> dict[str, Any]:
        """A measurement that fails costs its number, not the run: the weights are not saved yet."""
        try:
            return {"relative_l2": self._distance.read()}
        except CheckpointError as error:
            if self._log is not None:
                _warn(iteration, f"relative L2 is not measured: {error}")
            return {}

    def _summarize(self, iteration: int, readings: Mapping[str, Any]) -> list[str]:
        parts = [f"{iteration} iterations: {self._stability.summary()}"]
        if self._seconds:
            share = self._waited / self._seconds
            parts.append(f"Steps waited for data for {100 * share:.2g} % of their time.")
        if "relative_l2" in readings:
            parts.append(f"The weights moved by {100 * readings['relative_l2']:.3g} %.")
        if "general" in readings:
            general = readings["general"]
            parts.append(
                f"Perplexity of general text {general['perplexity']:.2f} "
                f"({general['delta_ppl']:+.2f})."
            )
        return parts


def _build_probe(
    config: Stage1Config,
    groups: Parallel,
    corpus: Corpus,
    reader: CandidateReader | None,
    lengths: npt.NDArray[np.int32],
) -> Probe | None:
    if reader is None or config.probe.probe_interval == 0:
        return None
    return Probe(
        corpus,
        reader,
        lengths,
        groups,
        num_documents=config.probe.probe_documents,
        seq_length=config.data.seq_length,
        micro_batch_size=config.data.micro_batch_size,
    )


def _build_general(
    config: Stage1Config, groups: Parallel, corpus: Corpus, model: LoadedModel
) -> GeneralText | None:
    if config.probe.general_data_path is None:
        return None
    text = Corpus(config.probe.general_data_path)
    require_same_tokenizer(text, corpus)
    longest = min(config.data.seq_length, model.shape.max_position_embeddings)
    general = GeneralText(
        text,
        groups,
        num_documents=config.probe.probe_documents,
        longest=longest,
        seq_length=config.data.seq_length,
        micro_batch_size=config.data.micro_batch_size,
    )
    if general.num_truncated and groups.rank == 0:
        print(
            f"--general-data-path: of {general.num_truncated} longer documents of the sample the "
            f"first {longest} positions are scored",
            file=sys.stderr,
        )
    return general


def _warn(iteration: int, message: str) -> None:
    print(f"warning: iteration {iteration}: {message}", file=sys.stderr)
