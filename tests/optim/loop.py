"""Three small parameters, gradients for them, and the loop that steps an optimizer over both."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

SHAPES = [(3, 4), (5,), (2, 3)]


def parameters(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in SHAPES
    ]


def gradients(steps: int, seed: int = 1) -> list[list[Tensor]]:
    """Gradients whose angle to the momentum wanders over acute, obtuse and clipped ones."""
    generator = torch.Generator().manual_seed(seed)
    drift = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    rows = []
    for step in range(steps):
        pull = math.cos(0.7 * step) + 0.3
        rows.append(
            [
                pull * d + 0.8 * torch.randn(d.shape, generator=generator, dtype=torch.float64)
                for d in drift
            ]
        )
    return rows


def take_steps(
    optimizer: torch.optim.Optimizer, params: list[Any], rows: list[list[Tensor]]
) -> None:
    for row in rows:
        for param, grad in zip(params, row, strict=True):
            param.grad = grad.to(param.dtype).clone()
        optimizer.step()


def flat(tensors: list[Tensor]) -> np.ndarray:
    return torch.cat([t.detach().double().flatten() for t in tensors]).numpy()


def states(optimizer: torch.optim.Optimizer, key: str) -> list[Tensor]:
    return [optimizer.state[p][key] for group in optimizer.param_groups for p in group["params"]]


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    for key, entry in expected["state"].items():
        assert found["state"][key].keys() == entry.keys()
        for name, value in entry.items():
            assert torch.equal(found["state"][key][name], value), (key, name)
