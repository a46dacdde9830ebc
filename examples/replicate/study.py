"""The directory of a study, and the jobs that fill it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from examples.replicate import bases, parts, plan
from examples.replicate.make_data import MANIFEST, make_data
from examples.replicate.plan import Run, Store
from megatron_replay.errors import DataError
from megatron_replay.evaluation.rows import Row, append_row, base_row, read_rows
from megatron_replay.evaluation.suite import read_evaluation
from megatron_replay.files import sha256_of_files, write_json


@dataclass(frozen=True)
class Job:
    """A part that needs others: done when ``product`` is there."""

    name: str
    product: Path
    action: Callable[[], None]
    needs: Sequence[Path] = field(default=())


class Study:
    """The directory of a study, and the jobs that fill it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "data"
        self.rows_path = folder / "rows.jsonl"

    def prepare(self) -> None:
        """Write the data, and the corpora that are made of them.

        Raises:
            DataError: this directory's models were made from other data.
        """
        make_data(self.data, seed=0)
        made_from = {"data": sha256_of_files([self.data / MANIFEST])}
        settled = self.folder / "study.json"
        if not settled.exists():
            write_json(settled, made_from)
        elif json.loads(settled.read_text()) != made_from:
            raise DataError(
                "the models here were made from other data", where=self.folder,
                fix="Name another directory with --output",
            )  # fmt: skip
        parts.make_corpora(self.data)

    def jobs(self, runs: Sequence[Run]) -> list[Job]:
        """Everything ``runs`` need, each part before what needs it."""
        jobs: dict[Path, Job] = {}
        for run in runs:
            store = run.store
            for job in (self._base(store.base, store.size), self._store(store)):
                jobs.setdefault(job.product, job)
            jobs[self.row_path(run)] = self._run(run)
        return list(jobs.values())

    def row_path(self, run: Run) -> Path:
        """Where a finished run leaves its row."""
        return self.folder / "runs" / run.name / parts.ROW

    def base_path(self, base: str, size: str) -> Path:
        """A base model's directory."""
        return self.folder / "bases" / f"{base}-{size}"

    def _base(self, base: str, size: str) -> Job:
        folder = self.base_path(base, size)
        return Job(
            f"base {base} {size}",
            parts.base_evaluation(folder, "all"),
            lambda: parts.make_base(folder, bases.SIZES[size], base, self.data),
        )

    def _store(self, store: Store) -> Job:
        base = self.base_path(store.base, store.size)
        folder = self.folder / "stores" / store.name
        return Job(
            f"Stage 0 {store.name}",
            folder / "manifest.json",
            lambda: parts.make_store(folder, store, base, self.data),
            needs=[parts.base_evaluation(base, "all")],
        )

    def _run(self, run: Run) -> Job:
        base = self.base_path(run.store.base, run.store.size)
        store = self.folder / "stores" / run.store.name
        needs = [parts.base_evaluation(base, "all"), store / "manifest.json"]
        reference = None
        if run.lr is None:
            reference = self._matching(run)
            needs += reference
        return Job(
            run.name,
            self.row_path(run),
            lambda: parts.make_run(
                self.row_path(run).parent, run, base, store, self.data, reference
            ),
            needs=needs,
        )

    def _matching(self, run: Run) -> tuple[Path, Path]:
        moving, target = plan.matching(run)
        return self.row_path(moving), self.row_path(target)

    def collect(self, runs: Sequence[Run]) -> int:
        """Append to rows.jsonl what is not in it; returns the number of runs that have a row.

        A run that was done again is appended again: of its rows the tables take the last.
        """
        rows = read_rows(self.rows_path) if self._has_rows() else []
        known = {_identity(row): row for row in rows}
        settings = {(run.store.setting, run.store.size): run.store for run in runs}
        found = [self._base_row(store) for store in settings.values()]
        done = [path for run in runs if (path := self.row_path(run)).exists()]
        for row in (*found, *(read_rows(path)[0] for path in done)):
            if row is not None and known.get(_identity(row)) != row:
                append_row(self.rows_path, row)
        return len(done)

    def _has_rows(self) -> bool:
        return self.rows_path.exists() and self.rows_path.stat().st_size > 0

    def _base_row(self, store: Store) -> Row | None:
        base = self.base_path(store.base, store.size)
        path = parts.base_evaluation(base, store.domain)
        if not path.exists():
            return None
        evaluation = read_evaluation(path)
        return base_row(
            evaluation["models"][0],
            tables=("methods", "remedies", "sweep") if store.domain == "all" else ("sweep",),
            base=store.setting,
            size=store.size,
            command=evaluation["command"],
        )


def _identity(row: Row) -> tuple[object, ...]:
    """What tells a row from others."""
    return row.method, row.tables, row.variant, row.base, row.size, row.seed, row.config_hash
