"""The readings that a run takes at intervals: two samples of text, and the weights' distance.

``Probe`` measures whether probability moves to tokens outside the candidate sets. The restricted
loss does not push those down, so it can fall while generation breaks. ``GeneralText`` measures
forgetting, and ``Distance`` how far the weights have moved.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_replay.checkpoint.directories import latest_iteration
from megatron_replay.checkpoint.load import LoadedModel, weight_reader
from megatron_replay.checkpoint.weight_distance import relative_distance, squared_sums
from megatron_replay.config import DataConfig, Stage1Config
from megatron_replay.data.corpus import Corpus, pick_documents
from megatron_replay.data.packing import PackedBatch, micro_batches_of, pack_batch
from megatron_replay.data.replay import full_targets, join_candidates
from megatron_replay.errors import CheckpointError, ConfigError, DataError, ReplayError
from megatron_replay.forward import MicroBatch, forward_only
from megatron_replay.model import heads
from megatron_replay.model.config import ModelConfig
from megatron_replay.optim.build import counts_once
from megatron_replay.parallel import Parallel
from megatron_replay.training.batches import TrainingData

#: Mass outside the sets causes a warning above this factor of, and this much over, the base's.
_DRIFT_FACTOR, _DRIFT_MASS = 2.0, 0.02


class Probe:
    """Mass outside the candidate sets, on a sample of the training corpus.

    Raises:
        DataError: the store records no position of the sample.
    """

    def __init__(self, config: Stage1Config, parallel: Parallel, data: TrainingData) -> None:
        reader, device = data.reader, parallel.device
        assert reader is not None
        sample = pick_documents(data.lengths, config.probe.probe_documents)
        self._work: list[MicroBatch] = []
        base_mass, count = 0.0, 0
        vocab_size = reader.description.vocab_size
        shard = parallel.vocabulary_shard(vocab_size)
        for batch in _micro_batches(
            data.corpus, sample, data.lengths, config.data, parallel.tp_size
        ):
            targets = join_candidates(batch, reader, vocab_size=vocab_size, scope="position")
            base_mass += (targets.tail_logit_N - targets.lse_N).exp().double().sum().item()
            count += len(targets.rows_N)
            sets = targets.sets.shard(shard.start, len(shard))
            sets = sets.moved(lambda tensor: tensor.to(device))
            head = heads.probe(targets.rows_N.to(device), sets, parallel)
            self._work.append(MicroBatch(batch.to(device), head))
        if not count:
            raise DataError(
                "the store records no position of the probe's sample",
                where=reader.directory,
                found=f"{len(sample)} documents",
                fix="Raise --probe-documents, or set --probe-interval 0",
            )
        self._base_outside_mass = base_mass / count

    def read(self, model: torch.nn.Module) -> dict[str, float] | None:
        """Means over the recorded positions of the sample; None before the last pipeline stage.

        Collective over PP. ``base_outside_mass`` is over the same positions as the others.
        """
        outputs = forward_only(model, self._work)
        if not outputs:
            return None
        outside, restricted, full, count = torch.stack(outputs).cpu().double().sum(0).tolist()
        return {
            "outside_mass": outside / count,
            "restricted_loss": restricted / count,
            "full_loss": full / count,
            "base_outside_mass": self._base_outside_mass,
        }


def drift_warning(reading: Mapping[str, float]) -> str:
    """The warning for a probe's reading; "" for none."""
    outside, base = reading["outside_mass"], reading["base_outside_mass"]
    if outside <= max(_DRIFT_FACTOR * base, base + _DRIFT_MASS):
        return ""
    return (
        f"{100 * outside:.1f} % of the probability is outside the candidate sets "
        f"({100 * base:.1f} % in the base model): the restricted loss "
        f"{reading['restricted_loss']:.3f} hides a full-softmax loss of "
        f"{reading['full_loss']:.3f}. "
        "Generation may be broken: compare with --loss full (docs/evidence.md)"
    )


class GeneralText:
    """ΔPPL = exp(CE) - exp(CE_base) on a sample of general text; CE is the mean over its labels.

    CE_base is the run's own reading before its first step. A resumed run takes it from its log.

    Args:
        prefix: the general text's.
        corpus: the training corpus.
        shape: the model's; only a document's positions inside its context are scored.

    Raises:
        ConfigError: the two corpora are of different tokenizers.
        DataError: no token of the sample is a label.
    """

    def __init__(
        self,
        config: Stage1Config,
        parallel: Parallel,
        prefix: str,
        corpus: Corpus,
        shape: ModelConfig,
    ) -> None:
        text = Corpus(prefix)
        _require_same_tokenizer(text, corpus)
        longest = min(config.data.seq_length, shape.max_position_embeddings)
        lengths = np.minimum(text.lengths, longest + 1)
        sample = pick_documents(lengths, config.probe.probe_documents)
        num_truncated = int((text.lengths[sample] > lengths[sample]).sum())
        if num_truncated and parallel.rank == 0:
            print(
                f"--general-data-path: only the first {longest} positions are scored of "
                f"{num_truncated} longer documents in the sample",
                file=sys.stderr,
            )
        content = f"{text.fingerprint} {sample.tolist()} {longest}"
        self._fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]
        self._base: float | None = None
        self._num_labels = 0
        self._work: list[MicroBatch] = []
        for batch in _micro_batches(text, sample, lengths, config.data, parallel.tp_size):
            rows_N, labels_N = (tensor.to(parallel.device) for tensor in full_targets(batch))
            self._num_labels += len(rows_N)
            head = heads.full_loss(rows_N, labels_N, parallel, vocab_size=shape.vocab_size)
            self._work.append(MicroBatch(batch.to(parallel.device), head))
        if not self._num_labels:
            raise DataError("no token of the sample carries loss", where=text.prefix)

    def read(self, model: torch.nn.Module) -> dict[str, float | str] | None:
        """Values for the log; None before the last pipeline stage. Collective over PP."""
        outputs = forward_only(model, self._work)
        if not outputs:
            return None
        total = torch.cat(outputs).cpu().double().sum()
        perplexity = (total / self._num_labels).exp().item()
        self._base = perplexity if self._base is None else self._base
        delta = perplexity - self._base
        return {"perplexity": perplexity, "delta_ppl": delta, "sample": self._fingerprint}

    def resume(self, lines: Sequence[Mapping[str, Any]], where: object) -> None:
        """Take the base from the log's line of iteration 0.

        Raises:
            ConfigError: the line is missing, or is of another sample.
        """
        first = next((line for line in lines if "general" in line), None)
        reading = {} if first is None or first["iteration"] > 0 else first["general"]
        self._base = reading.get("perplexity")
        if self._base is None or reading["sample"] != self._fingerprint:
            raise ConfigError(
                "the run has no perplexity of this sample of general text before its first step",
                where=where,
                expected=f"a line of iteration 0 with the sample {self._fingerprint}",
                found=reading.get("sample", "none"),
                fix="Omit --general-data-path, use it and --probe-documents as the run was started "
                "with, or start a new run",
            )


def _require_same_tokenizer(general: Corpus, corpus: Corpus) -> None:
    """Raise ConfigError unless both corpora were made with one tokenizer."""
    found, expected = (
        f"{c.vocab_size} tokens, fingerprint {c.tokenizer_fingerprint}" for c in (general, corpus)
    )
    if found != expected:
        raise ConfigError(
            "the general text was made with another tokenizer than --data-path",
            where="--general-data-path",
            expected=expected,
            found=found,
            fix="Run tools/preprocess_data.py with the tokenizer of --load",
        )


def _micro_batches(
    corpus: Corpus,
    documents: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int32],
    data: DataConfig,
    multiple: int,
) -> list[PackedBatch]:
    """``documents`` in micro-batches."""
    parts = micro_batches_of(corpus, documents, lengths, data)
    return [pack_batch(corpus, part, lengths, multiple=multiple) for part in parts]


class Distance:
    """Relative L2 of the weights: √Σ‖θ - θ₀‖² / ‖θ₀‖, in which each weight counts once.

    θ are the fp32 masters; θ₀ are the weights of ``load``, as they were loaded, in the model's
    precision. Each rank reads them again, one parameter at a time and without communication, so no
    second copy of the model is held.

    Args:
        load: the run's --load, a Hugging Face directory or a training checkpoint.
        directory: the run's --save.
    """

    def __init__(
        self,
        load: str,
        directory: Path,
        model: LoadedModel,
        optimizer: MegatronOptimizer,
        parallel: Parallel,
    ) -> None:
        self._load, self._directory = Path(load), directory
        self._model, self._optimizer, self._parallel = model, optimizer, parallel
        # Before training: another run may save to --load while this one trains.
        self._iteration = parallel.broadcast(latest_iteration(self._load))

    def read(self) -> float:
        """Relative L2, the same number on every rank. One all-gather of objects over the world.

        Raises:
            CheckpointError: --load no longer has θ₀, or a rank cannot read it.
        """
        if self._load.resolve() == self._directory.resolve():
            raise CheckpointError(
                "the run was resumed from its own directory, which no longer has its first weights",
                where=self._load,
                fix="Use the --load it was started with",
            )
        sums = self._parallel.agreed(self._sums)
        return relative_distance((pair for pairs in sums for pair in pairs), self._load)

    def _sums(self) -> list[tuple[float, float]]:
        """(Σ‖θ - θ₀‖², Σ‖θ₀‖²) for each of this rank's masters."""
        try:
            read = weight_reader(self._load, self._iteration, self._model, self._parallel)
            return [
                squared_sums(master.detach(), read(name).flatten()[part])
                for name, master, part in self._masters()
            ]
        except ReplayError:
            raise
        except Exception as error:  # whatever a damaged file raises: the other ranks are waiting
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"cannot read again: {reason}", where=self._load) from error

    def _masters(self) -> Iterator[tuple[str, Tensor, slice]]:
        """Name, fp32 master, and its part of the flattened parameter.

        Each weight of the model occurs once over all ranks. Under the distributed optimizer each
        replica holds a part of the masters; otherwise the replicas divide the parameters.
        """
        parallel = self._parallel
        for number, (name, parameter) in enumerate(self._model.module.named_parameters()):
            if not counts_once(parameter, tp_group=parallel.tp_group):
                continue
            if getattr(parameter, "main_param_sharded", False):
                if parameter.main_param is not None:
                    part = self._optimizer._get_model_param_range_map(parameter)["param"]
                    yield name, parameter.main_param, slice(part.start, part.end)
            elif number % parallel.dp_size == parallel.dp_rank:
                yield name, getattr(parameter, "main_param", parameter), slice(None)
