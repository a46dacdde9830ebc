"""How far training has moved the weights: relative L2 = √Σ‖θ - θ₀‖² / ‖θ₀‖.

θ are the fp32 masters, θ₀ what the run started from: the weights of ``--load``, in the model's
precision, as they were loaded. They are read again from the disk (``starting_weights.py``), one
parameter at a time, so no second copy of the model is ever held. Each weight counts once.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_replay.checkpoint.load import LoadedModel
from megatron_replay.checkpoint.training import latest_iteration
from megatron_replay.errors import CheckpointError, ReplayError
from megatron_replay.optim.model_placement import counts_once
from megatron_replay.parallel import Parallel
from megatron_replay.training.starting_weights import starting_weights

#: Elements converted to float64 at once: they stay in the cache. 1.4 ns a weight on a CPU core,
#: where blocks of 2^22 cost 10.
_BLOCK = 1 << 16

#: A parameter's name, fp32 values, and the part of the flattened parameter they are; None: all.
Master = tuple[str, Tensor, slice | None]


def masters(model: LoadedModel, optimizer: MegatronOptimizer, parallel: Parallel) -> list[Master]:
    """The weights this rank answers for: over all ranks, each weight of the model once.

    Where replicas hold the same weights, they share the work. Under the distributed optimizer each
    has a flat part of its own of the fp32 masters; a model in fp32 is whole on every replica.
    """
    found: list[Master] = []
    for number, (name, parameter) in enumerate(model.module.named_parameters()):
        if not counts_once(parameter, tp_group=parallel.tp_group):
            continue
        if getattr(parameter, "main_param_sharded", False):
            if parameter.main_param is not None:
                part = optimizer._get_model_param_range_map(parameter)["param"]
                found.append((name, parameter.main_param, slice(part.start, part.end)))
        elif number % parallel.dp_size == parallel.dp_rank:
            found.append((name, getattr(parameter, "main_param", parameter), None))
    return found


class Distance:
    """Measures relative L2 against ``load``, a Hugging Face directory or a training checkpoint.

    Args:
        load: where the run's first weights lie.
        directory: where the run saves.
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
        # Now, with the model just loaded: what --load names may move on while this run trains.
        self._iteration = parallel.broadcast(latest_iteration(self._load))

    def read(self) -> float:
        """Relative L2, the same number on every rank. One all-gather of objects over the world.

        Memory: one parameter of θ₀, on the host.

        Raises:
            CheckpointError: θ₀ cannot be read, on any rank, or is not known.
        """
        if self._load.resolve() == self._directory.resolve():
            raise CheckpointError(
                "the run goes on from its own directory: its first weights are not known",
                where=self._load,
                fix="Give the --load it was started with",
            )
        sums = self._parallel.agreed(self._sums)
        distance, norm = (math.fsum(column) for column in zip(*sums, strict=True))
        if norm == 0.0:
            raise CheckpointError("every weight is zero", where=self._load)
        return math.sqrt(distance / norm)

    def _sums(self) -> tuple[float, float]:
        """(Σ‖θ - θ₀‖², Σ‖θ₀‖²) over this rank's masters, in float64."""
        found = masters(self._model, self._optimizer, self._parallel)
        names = [name for name, _, _ in found]
        distance = norm = 0.0
        try:
            starts = starting_weights(
                self._load, self._iteration, self._model, names, self._parallel
            )
            for (_, weight, part), start in zip(found, starts, strict=True):
                whole = start.flatten()
                for theta, theta_0 in zip(
                    weight.detach().flatten().split(_BLOCK),
                    (whole if part is None else whole[part]).split(_BLOCK),
                    strict=True,
                ):
                    before = theta_0.double()
                    moved = theta.cpu().double().sub_(before)
                    distance += torch.dot(moved, moved).item()
                    norm += torch.dot(before, before).item()
        except ReplayError:
            raise
        except Exception as error:  # whatever a damaged file raises: the other ranks are waiting
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"cannot read again: {reason}", where=self._load) from error
        return distance, norm
