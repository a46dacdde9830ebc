"""The figure of a candidate store: set sizes, what they cover, which labels they miss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter

from megatron_replay.errors import StoreError
from megatron_replay.evaluation.figure import COLOURS, FONT, save, tidy
from megatron_replay.store.tally import Distribution, Tally

_COLOUR, _MARK, _BINS = COLOURS[6], COLOURS[2], 50


def draw_store(counted: Tally, summary: dict[str, Any], path: Path) -> None:
    """Write the figure as PNG, 1800 x 600 pixels: |S|, tail mass, probability of the label.

    Raises:
        StoreError: the store has no position.
    """
    if not counted.positions:
        raise StoreError("no position to draw", where=path)
    figure = Figure(figsize=(18, 6), dpi=100, layout=ConstrainedLayoutEngine(wspace=0.06))
    sizes, tails, labels = figure.subplots(1, 3)
    _draw_sizes(sizes, counted, summary)
    _draw_tails(tails, counted, summary)
    _draw_labels(labels, counted, summary)
    for axes in (sizes, tails, labels):
        tidy(axes, axes.get_title())
        axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
        axes.grid(axis="y", alpha=0.25)
    sizes.set_ylabel("share of positions", fontsize=FONT)
    save(figure, path)


def _draw_sizes(axes: Axes, counted: Tally, summary: dict[str, Any]) -> None:
    size, cap = summary["set_size"], summary["cap"]
    width = -(-size["max"] // _BINS)
    _bars(axes, counted.set_sizes(), np.arange(0.5, size["max"] + width + 0.5, width))
    title = f"mean {size['mean']:.1f}, median {size['median']}"
    if cap is not None:
        axes.axvline(cap["max_candidates"], color=_MARK, linestyle="--", linewidth=2)
        title += f"; limited to {cap['max_candidates']}: {cap['share_at_or_above']:.1%}"
    axes.set_xlabel("candidates of a position, |S|")
    axes.set_title(title)


def _draw_tails(axes: Axes, counted: Tally, summary: dict[str, Any]) -> None:
    tail = summary["tail_mass"]
    _bars(axes, counted.tail_mass(), np.linspace(0, max(tail["max"], 1e-3), _BINS + 1))
    coverage = summary["description"]["selection"].get("coverage")
    title = f"mean coverage {summary['coverage']['mean']:.3f}"
    if isinstance(coverage, float):
        axes.axvline(1 - coverage, color=_MARK, linestyle="--", linewidth=2)
        title += f"; requested: {coverage:g}"
    axes.set_xlabel("base model's probability outside S")
    axes.set_title(title)


def _draw_labels(axes: Axes, counted: Tally, summary: dict[str, Any]) -> None:
    logprobs = counted.label_logprob()
    labels = Distribution(logprobs.values / np.log(10), logprobs.counts)
    _bars(axes, labels, np.linspace(min(labels.values[0], -1.0), 0, _BINS + 1))
    share = summary["share_label_appended"]
    axes.set_xlabel("base model's log$_{10}$ probability of the label")
    missed = "" if share is None else f"; labels appended: {share:.1%}"
    axes.set_title(f"mean {labels.mean():.2f}{missed}")


def _bars(axes: Axes, distribution: Distribution, edges: Any) -> None:
    """Shares of positions between ``edges``; the last bar counts what is beyond it, too."""
    values = np.clip(distribution.values.astype(np.float64), edges[0], edges[-1])
    counts, _ = np.histogram(values, edges, weights=distribution.counts)
    axes.stairs(100 * counts / distribution.counts.sum(), edges, fill=True, color=_COLOUR)
    axes.set_xlim(edges[0], edges[-1])
