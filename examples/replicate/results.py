"""``rows.csv``: one line for the base on each domain, each finished run, and each blend of a run.

A benchmark's cell holds the hits of all its questions: one bit each behind a leading 1, in
hexadecimal. So every interval can be computed from the file. Other cells are empty where nothing
was measured.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from examples.replicate.plan import Run
from megatron_replay.errors import DataError
from megatron_replay.evaluation.results import BASE, KINDS, read_evaluation
from megatron_replay.files import atomic_file, read_text
from megatron_replay.run_log import summarize_run

#: The rows of a finished run, in its directory.
ROWS = "rows.csv"
Hits = npt.NDArray[np.bool_]


class Row(NamedTuple):
    """One measured model.

    Attributes:
        name: the run's name in plan.py, or the blend's.
        lr, seed: of the run; 0 for a base.
        weights: the first digits of the SHA-256 of the weights.
        outside: per cent of the probability outside the candidate sets, by step.
        seconds, stage0_seconds: of training, and of Stage 0 where the loss needs it.
        hits: of the domain's questions.
        general: hits of each general benchmark.
    """

    name: str
    method: str
    domain: str
    lr: float
    seed: int
    weights: str
    perplexity: float
    relative_l2_percent: float
    outside: dict[int, float]
    loss_std: float | None
    gradient_norm_cv: float | None
    steps: int | None
    seconds: float | None
    stage0_seconds: float | None
    hits: Hits
    general: dict[str, Hits]


def base_evaluation(base: Path, domain: str) -> Path:
    """Where the scores of the base on one domain are; ``base`` is its directory."""
    return base / f"evaluation-{domain}.json"


def base_row(evaluation: Path) -> Row:
    """The row of the base on one domain, from its `base_evaluation`."""
    domain = evaluation.stem.removeprefix("evaluation-")
    entry = read_evaluation(evaluation)["models"][0]
    return row_of_model(entry, name=f"{BASE} {domain}", method=BASE, domain=domain)


def row_of_model(entry: Mapping[str, Any], **made_with: Any) -> Row:
    """The row of a model without a run: ``entry`` is its part of the evaluation's JSON."""
    found = {
        name: (bool(result.get("general")), np.array([hit == "1" for hit in result["hits"]]))
        for kind in KINDS
        for name, result in entry.get(kind, {}).items()
    }
    (hits,) = (hits for is_general, hits in found.values() if not is_general)
    values: dict[str, Any] = {
        "lr": 0.0, "seed": 0, "outside": {}, "loss_std": None, "gradient_norm_cv": None,
        "steps": None, "seconds": None, "stage0_seconds": None,
    } | made_with  # fmt: skip
    return Row(
        weights=entry["sha256"][:12],
        perplexity=entry["general"]["perplexity"],
        relative_l2_percent=entry["relative_l2_percent"],
        hits=hits,
        general={name: hits for name, (is_general, hits) in found.items() if is_general},
        **values,
    )


def row_of_run(
    folder: Path, entry: Mapping[str, Any], run: Run, *, stage0_seconds: float | None
) -> Row:
    """The row of the model that Stage 1 trained in ``folder``.

    Raises:
        DataError: the run's metrics or configuration cannot be read.
    """
    summary = summarize_run(folder)
    outside = {line["iteration"]: line["probe"].get("outside_mass") for line in summary.probes}
    return row_of_model(
        entry,
        name=run.name,
        method=run.method,
        domain=run.store.domain,
        lr=run.lr,
        seed=run.seed,
        outside={step: 100 * mass for step, mass in outside.items() if mass is not None},
        loss_std=summary.loss_std,
        gradient_norm_cv=summary.gradient_norm_cv,
        steps=summary.iterations,
        seconds=summary.seconds,
        stage0_seconds=stage0_seconds,
    )


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write all ``rows`` at once; replaces the file whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    rows = list(rows)
    benchmarks = sorted({name for row in rows for name in row.general})
    plain = Row._fields[:-1]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*plain, *(f"general/{name}" for name in benchmarks)])
    for row in rows:
        hits = (row.general.get(name) for name in benchmarks)
        writer.writerow([*(_written(getattr(row, name)) for name in plain), *map(_written, hits)])
    with atomic_file(path, "w") as handle:
        handle.write(text.getvalue())


def _written(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{int(''.join(['1', *('01'[int(hit)] for hit in value)]), 2):x}"
    if isinstance(value, dict):
        return " ".join(f"{step}:{_written(one)}" for step, one in value.items())
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file.

    Raises:
        DataError: it cannot be read, is not a file of rows, or a cell does not fit its column.
    """
    reader = csv.DictReader(io.StringIO(read_text(path, DataError)))
    missing = [name for name in Row._fields[:-1] if name not in (reader.fieldnames or [])]
    if missing:
        raise DataError("not rows of the study", where=path, expected=f"a column {missing[0]!r}")
    rows = []
    for number, cells in enumerate(reader, start=2):
        try:
            rows.append(_read(cells))
        except (ValueError, TypeError) as error:
            raise DataError(f"damaged: {error}", where=f"{path}:{number}") from error
    return rows


def _read(cells: Mapping[str, str]) -> Row:
    def optional(name: str) -> float | None:
        return float(cells[name]) if cells[name] else None

    pairs = (pair.split(":") for pair in cells["outside"].split())
    return Row(
        name=cells["name"],
        method=cells["method"],
        domain=cells["domain"],
        lr=float(cells["lr"]),
        seed=int(cells["seed"]),
        weights=cells["weights"],
        perplexity=float(cells["perplexity"]),
        relative_l2_percent=float(cells["relative_l2_percent"]),
        outside={int(step): float(mass) for step, mass in pairs},
        loss_std=optional("loss_std"),
        gradient_norm_cv=optional("gradient_norm_cv"),
        steps=int(cells["steps"]) if cells["steps"] else None,
        seconds=optional("seconds"),
        stage0_seconds=optional("stage0_seconds"),
        hits=_hits(cells["hits"]),
        general={
            name.removeprefix("general/"): _hits(cell)
            for name, cell in cells.items()
            if name.startswith("general/") and cell
        },
    )


def _hits(cell: str) -> Hits:
    return np.array([bit == "1" for bit in f"{int(cell, 16):b}"[1:]])
