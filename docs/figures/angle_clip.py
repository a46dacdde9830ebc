"""Draw docs/figures/angle_clip.png: when MoClip's clip fires, and what it does to the step.

    .venv/bin/python docs/figures/angle_clip.py

Above: what --obtuse line and zero leave of a gradient at an angle phi to the momentum. Below:
MoClip and AdamW on gradients of one signal under fresh noise, by the ratio of the two; see
docs/method.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes

from megatron_replay.optim import AdamW, MoClip
from megatron_replay.optim.moclip import OBTUSE, rotation_coefficients
from megatron_replay.optim.rule import UpdateRule

#: Degrees, the paper's; beta1 and beta2 as Stage 1's.
MAX_ANGLE, BETAS = 45.0, (0.9, 0.95)
COLORS = dict(zip(OBTUSE, ("C0", "C1"), strict=True))
STYLES = dict(zip(OBTUSE, ("-", "--"), strict=True))


def turned(degrees: np.ndarray, obtuse: str) -> tuple[np.ndarray, np.ndarray]:
    """(length of g' over that of g, degrees between g' and m; NaN where g' = 0) for each phi."""
    phi = torch.tensor(np.radians(degrees))
    ones = torch.ones_like(phi)
    a, b = rotation_coefficients(phi.cos(), ones, ones, max_angle=MAX_ANGLE, obtuse=obtuse)
    along, across = a * phi.cos() + b, a * phi.sin()
    length = torch.hypot(along, across).numpy()
    angle = np.degrees(np.arctan2(across.numpy(), along.numpy()))
    return length, np.where(length > 1e-9, angle, np.nan)


def settled(
    make: Callable[..., UpdateRule], snr: float, *, size: int, steps: int
) -> dict[str, float]:
    """Means over the last half of ``steps`` on g = signal + noise, |signal|^2 = snr |noise|^2."""
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(size, generator=generator) * math.sqrt(snr)
    param = torch.nn.Parameter(torch.zeros(size))
    rule = make([param], lr=1e-3, betas=BETAS)
    reports = []
    for _ in range(steps):
        param.grad = signal + torch.randn(size, generator=generator)
        rule.step()
        reports.append(rule.report())
    half = reports[steps // 2 :]
    return {key: float(np.mean([r[key] for r in half])) for key in half[0]}


def expected_angle(snr: np.ndarray) -> np.ndarray:
    """phi between a fresh gradient and AdamW's momentum: an average of 19 gradients' noise."""
    left = (1 - BETAS[0]) / (1 + BETAS[0])
    return np.degrees(np.arccos(snr / np.sqrt((snr + 1) * (snr + left))))


def draw(path: Path, *, points: int, size: int, steps: int) -> None:
    """Compute and write the figure."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.5), layout="constrained")
    _draw_rotation(axes[0, 0], axes[0, 1])
    snr = np.logspace(-2.5, 1.5, points)
    _draw_noise(axes[1, 0], axes[1, 1], snr, size=size, steps=steps)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_rotation(lengths: Axes, angles: Axes) -> None:
    degrees = np.linspace(0.1, 179.9, 1200)
    for obtuse in OBTUSE:
        length, angle = turned(degrees, obtuse)
        style = {"color": COLORS[obtuse], "linestyle": STYLES[obtuse], "linewidth": 2}
        lengths.plot(degrees, length, label=obtuse, **style)
        angles.plot(degrees, angle, label=obtuse, **style)
    angles.axhline(MAX_ANGLE, color="0.6", linewidth=1)
    for axis, title, label in (
        (lengths, "What is left of the gradient", "|g'| / |g|"),
        (angles, "Where it points", "angle of g' to the momentum (degrees)"),
    ):
        axis.set(title=title, xlabel="angle of g to the momentum (degrees)", ylabel=label)
        axis.set_xticks(range(0, 181, 45))
        axis.axvline(MAX_ANGLE, color="0.6", linewidth=1)
    angles.set_yticks(range(0, 181, 45))
    angles.legend(title="--obtuse", loc="upper left")


def _draw_noise(angles: Axes, steps_taken: Axes, snr: np.ndarray, *, size: int, steps: int) -> None:
    rules: Sequence[tuple[str, Callable[..., UpdateRule], str, str]] = [
        ("AdamW", AdamW, "0.3", "s"),
        ("MoClip, line", MoClip, COLORS["line"], "o"),
    ]
    for name, make, color, marker in rules:
        seen = [settled(make, ratio, size=size, steps=steps) for ratio in snr]
        style = {"color": color, "marker": marker, "markersize": 4, "label": name}
        steps_taken.plot(snr, [s["update_rms_over_lr"] for s in seen], **style)
        if "degrees" in seen[0]:
            angles.plot(snr, [s["degrees"] for s in seen], **style)
    fine = np.logspace(-2.5, 1.5, 200)
    angles.plot(fine, expected_angle(fine), color="0.3", linestyle="--", label="AdamW's momentum")
    angles.axhspan(MAX_ANGLE, 95, color="C0", alpha=0.1)
    angles.text(0.004, 47, "the clip fires", color="C0")
    angles.set(ylim=(0, 95), title="When it fires", ylabel="angle of g to the momentum (degrees)")
    steps_taken.set(title="How far a step goes", ylabel="root mean square of the step / lr")
    steps_taken.set_yscale("log")
    for axis in (angles, steps_taken):
        axis.set(xscale="log", xlabel="signal / noise of a gradient, |s|² / |n|²")
        axis.legend()
        axis.grid(alpha=0.3)


def main() -> None:
    """Parse the flags and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    default = Path(__file__).with_suffix(".png")
    parser.add_argument("--output", type=Path, default=default, help="file to write")
    parser.add_argument("--points", type=int, default=17, help="ratios of signal to noise")
    parser.add_argument("--size", type=int, default=20_000, help="elements of the gradient")
    parser.add_argument("--steps", type=int, default=400, help="steps at each ratio")
    given = parser.parse_args()
    draw(given.output, points=given.points, size=given.size, steps=given.steps)


if __name__ == "__main__":
    main()
