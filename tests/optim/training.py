"""A small set of parameters and gradients to train MoClip on, the same for every test."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SHAPES = ((4, 3), (5,), (2, 2, 2))


def random_like(shapes: tuple[tuple[int, ...], ...], seed: int, drift: float = 0.3) -> list[Tensor]:
    """Normal noise around a common drift: angles to both sides of 45 and of 90 degrees."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64) + drift for shape in shapes
    ]


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(value.to(dtype)) for value in random_like(SHAPES, seed=0)]


def take_step(
    optimizer: torch.optim.Optimizer, params: list[nn.Parameter], seed: int, scale: float = 1.0
) -> None:
    for param, grad in zip(params, random_like(SHAPES, seed), strict=True):
        param.grad = (scale * grad).to(param.dtype)
    optimizer.step()
