"""How far weights have moved: relative L2 = √Σ‖θ − θ₀‖² / √Σ‖θ₀‖², each parameter counted once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from megatron_replay.checkpoint.hf import HFReader
from megatron_replay.errors import CheckpointError, few
from megatron_replay.files import read_json

#: Elements converted to float64 at once: they stay in the cache. 1.4 ns a weight on a CPU core,
#: where blocks of 2^22 cost 10.
BLOCK = 1 << 16


def squared_sums(theta: Tensor, theta_0: Tensor) -> tuple[float, float]:
    """Return Σ(θ − θ₀)² and Σθ₀² of two tensors of one size, in float64, on the host."""
    distance = norm = 0.0
    blocks = (tensor.flatten().split(BLOCK) for tensor in (theta, theta_0))
    for new, old in zip(*blocks, strict=True):
        before = old.cpu().double()
        moved = new.cpu().double().sub_(before)
        distance += torch.dot(moved, moved).item()
        norm += torch.dot(before, before).item()
    return distance, norm


def relative_distance(sums: Iterable[tuple[float, float]], base: object) -> float:
    """Return relative L2 from the `squared_sums` of all parameters.

    Raises:
        CheckpointError: every weight of ``base`` is zero.
    """
    sums = list(sums)
    distance, norm = math.fsum(d for d, _ in sums), math.fsum(n for _, n in sums)
    if norm == 0.0:
        raise CheckpointError("every weight is zero", where=base)
    return math.sqrt(distance / norm)


def relative_l2(model: Path, base: Path) -> float:
    """Return relative L2 between two Hugging Face directories; reads one tensor of each at a time.

    Raises:
        CheckpointError: the two do not hold the same tensors in the same shapes.
    """
    (ours, names), (theirs, base_names) = _parameters(model), _parameters(base)
    if different := sorted(names ^ base_names):
        raise CheckpointError(
            "the tensors differ from the base's",
            where=model,
            expected=f"those of {base}",
            found=f"only one of the two has {few(different)}",
        )
    for name in sorted(names):
        expected, found = theirs.stored[name].shape, ours.stored[name].shape
        if expected != found:
            raise CheckpointError(
                f"{name} has another shape than the base's",
                where=model,
                expected=expected,
                found=found,
            )
    sums = (squared_sums(ours.tensor(name), theirs.tensor(name)) for name in sorted(names))
    return relative_distance(sums, base)


def _parameters(directory: Path) -> tuple[HFReader, set[str]]:
    """The tensors of a directory, and their names without that of a tied head."""
    reader = HFReader(directory)
    config = read_json(directory / "config.json", CheckpointError)
    return reader, reader.parameters(tied=bool(config.get("tie_word_embeddings")))
