"""``rows.csv``: one line for each base model and each finished run of the study.

A line has what the model was made with (`MADE_WITH`), what its evaluation measured (`MEASURED`, and
one column of scores in per cent for each ``domain/TASK`` and ``general/TASK``), and what its run
logged (`LOGGED`). A cell is empty where nothing was measured.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_replay.errors import DataError
from megatron_replay.evaluation.results import scores, value_at
from megatron_replay.files import atomic_file, read_text
from megatron_replay.run_log import summarize_run

#: ``name`` is the run's name in plan.py; ``tables`` lists, separated by spaces, where it is shown;
#: ``base`` and ``size`` are never mixed in one line of a table; ``variant`` is what an ablation
#: changes; ``weights`` begins the SHA-256 of the tuned model.
MADE_WITH = (
    "name", "method", "tables", "variant", "base", "size", "seed", "lr", "weights",
)  # fmt: skip
#: Column -> its place in an evaluation's JSON.
MEASURED = {
    "perplexity": "general.perplexity",
    "relative_l2_percent": "relative_l2_percent",
}
#: ``outside_percent``: the probability outside the candidate sets, from the run's last probe.
LOGGED = (
    "outside_percent", "loss_std", "gradient_norm_cv", "loss_spikes", "gradient_spikes", "steps",
    "seconds", "stage0_seconds",
)  # fmt: skip
Row = dict[str, Any]


def row_of_model(entry: Mapping[str, Any], **made_with: Any) -> Row:
    """The row of a model without a run: ``entry`` is its part of the evaluation's JSON."""
    row: Row = {**made_with, "weights": entry["sha256"][:12]}
    row |= {column: value_at(entry, path) for column, path in MEASURED.items()}
    row |= {f"domain/{name}": score for name, score in scores(entry, general=False).items()}
    return row | {f"general/{name}": score for name, score in scores(entry, general=True).items()}


def row_of_run(
    run: Path, entry: Mapping[str, Any], *, stage0_seconds: float | None, **made_with: Any
) -> Row:
    """The row of the model that Stage 1 trained in the directory ``run``.

    Raises:
        DataError: the run's metrics or configuration cannot be read.
    """
    summary = summarize_run(run)
    mass = summary.probes[-1]["probe"].get("outside_mass") if summary.probes else None
    return row_of_model(entry, **made_with) | {
        "outside_percent": None if mass is None else 100 * mass,
        "loss_std": summary.loss_std,
        "gradient_norm_cv": summary.gradient_norm_cv,
        "loss_spikes": summary.loss_spikes,
        "gradient_spikes": summary.gradient_spikes,
        "steps": summary.iterations,
        "seconds": summary.seconds,
        "stage0_seconds": stage0_seconds,
    }


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write all ``rows`` at once, numbers with seven digits; replaces the file whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    rows = list(rows)
    scores = sorted({name for row in rows for name in row if "/" in name})
    text = io.StringIO()
    header = [*MADE_WITH, *scores, *MEASURED, *LOGGED]
    writer = csv.DictWriter(text, header, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _written(value) for name, value in row.items()} for row in rows)
    with atomic_file(path, "w") as handle:
        handle.write(text.getvalue())


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, every value as text.

    Raises:
        DataError: it cannot be read, or is not a file of rows.
    """
    reader = csv.DictReader(io.StringIO(read_text(path, DataError)))
    missing = [name for name in (*MADE_WITH, *MEASURED) if name not in (reader.fieldnames or [])]
    if missing:
        raise DataError("not rows of the study", where=path, expected=f"a column {missing[0]!r}")
    return list(reader)


def _written(value: Any) -> Any:
    return f"{value:.7g}" if isinstance(value, float) else value
