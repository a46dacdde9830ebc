"""Every rule over a few small parameters, gradients for them, and the loop over both."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_replay.optim import TAM, AdaMuon, AdamW, MoClip, MoFO, MuonClip
from megatron_replay.optim.rule import UpdateRule
from tests.optim import reference_rules

BETAS = {"betas": (reference_rules.BETA1, reference_rules.BETA2)}
#: As ``reference_rules.RULES`` builds them; attention is only clipped where the model is known.
BUILD: dict[str, Callable[..., UpdateRule]] = {
    "adamw": AdamW,
    "moclip": MoClip,
    "moclip zero": functools.partial(MoClip, obtuse="zero", max_angle=60.0),
    "moclip tensor": functools.partial(MoClip, angle_scope="tensor"),
    "mofo": MoFO,
    "tam": TAM,
    "adamuon": AdaMuon,
    "muonclip": MuonClip,
}
#: Whole matrices, one that Muon leaves alone, and a vector.
SHAPES = {
    "model.layers.0.mlp.up_proj.weight": (6, 4),
    "model.layers.0.mlp.down_proj.weight": (3, 8),
    "model.embed_tokens.weight": (10, 4),
    "model.norm.weight": (5,),
}
Rows = list[dict[str, np.ndarray]]


def values(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}


def parameters(dtype: torch.dtype = torch.float64) -> list[Any]:
    return [torch.nn.Parameter(torch.tensor(value, dtype=dtype)) for value in values(0).values()]


def gradients(steps: int) -> Rows:
    """Now with the momentum, now against it."""
    drift = values(100)
    return [
        {n: math.cos(0.9 * k) * drift[n] + 0.6 * noise for n, noise in values(k).items()}
        for k in range(1, steps + 1)
    ]


def build(
    rule: str, dtype: torch.dtype = torch.float64, **changes: Any
) -> tuple[UpdateRule, list[Any]]:
    """The rule over ``parameters``, with Megatron's exclusions from decay."""
    params = parameters(dtype)
    groups = [
        {"params": [p], "weight_decay": 0.1 if p.dim() > 1 else 0.0, "orthogonalize": "layers" in n}
        for n, p in zip(SHAPES, params, strict=True)
    ]
    return BUILD[rule](groups, **{"lr": 0.02, **BETAS, **changes}), params


def take_steps(optimizer: torch.optim.Optimizer, params: list[Any], rows: Rows) -> None:
    for row in rows:
        for param, grad in zip(params, row.values(), strict=True):
            param.grad = torch.tensor(grad, dtype=param.dtype)
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
