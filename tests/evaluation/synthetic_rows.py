"""Rows of runs that never were, with the numbers that a test asks for."""

from __future__ import annotations

from typing import Any

from megatron_replay.evaluation.rows import Row

RUN: dict[str, Any] = {
    "iterations": 100,
    "seconds": 50.0,
    "loss_std": 0.1,
    "loss_variance": 0.01,
    "gradient_norm_cv": 0.2,
    "loss_spikes": 1,
    "gradient_spikes": 0,
    "outside_mass": 0.05,
}


def row(method: str, **more: Any) -> Row:
    """A row of one run."""
    given: dict[str, Any] = {
        "tables": ("methods",),
        "seed": 0,
        "lr": 2e-4,
        "optimizer": "adamw",
        "loss": "full",
        "config_hash": f"{method}{more.get('lr')}".encode().hex().ljust(64, "0"),
        "command": f"train {method}",
        "evaluation": {},
        "run": RUN,
    }
    return Row(method=method, **(given | more))


def entry(
    shop: float, quiz: float, cloze: float, change: float, distance: float, **more: Any
) -> dict[str, Any]:
    """The evaluation of a model: two tasks of the domain, one general benchmark; shares of one."""
    return {
        "sql": {"shop": {"accuracy": shop, "standard_error": 0.02, "questions": 100}},
        "choices": {
            "quiz": {"accuracy": quiz, "standard_error": 0.02, "general": False},
            "cloze": {"accuracy": cloze, "standard_error": 0.02, "general": True},
        },
        "general": {"perplexity": 20 + change, "delta_perplexity": change},
        "relative_l2_percent": distance,
        "retention_percent": 100 * cloze / 0.8,
        "candidates": {"outside_mass": 0.07},
        **more,
    }
