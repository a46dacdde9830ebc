"""The directory of a study, and the jobs that fill it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.replicate import bases, parts, plan
from examples.replicate.make_data import MANIFEST, make_data
from examples.replicate.plan import Run, Store
from examples.replicate.results import Row, read_rows, row_of_model, write_rows
from megatron_replay.errors import DataError
from megatron_replay.evaluation.results import read_evaluation
from megatron_replay.files import sha256_of_files, write_json


@dataclass(frozen=True)
class Job:
    """One part, which needs the products of others; it is done when its ``product`` exists."""

    name: str
    product: Path
    action: Callable[[], None]
    needs: Sequence[Path] = ()


class Study:
    """The directory of a study: data, corpora, bases, stores, runs, and the rows of all runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "data"
        self.rows_path = folder / "rows.csv"

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
                fix="Give another directory as --output",
            )  # fmt: skip
        parts.make_corpora(self.data)

    def jobs(self, runs: Sequence[Run]) -> list[Job]:
        """Everything that ``runs`` need, each part before those that need it."""
        jobs: dict[Path, Job] = {}
        for run in runs:
            for job in (self._base(run.store), self._store(run.store), self._run(run)):
                jobs.setdefault(job.product, job)
        return list(jobs.values())

    def row_path(self, run: Run) -> Path:
        """Where a finished run leaves its row."""
        return self.folder / "runs" / run.name / parts.ROW

    def _base_path(self, store: Store) -> Path:
        return self.folder / "bases" / f"{store.base}-{store.size}"

    def _store_path(self, store: Store) -> Path:
        return self.folder / "stores" / store.name

    def _base(self, store: Store) -> Job:
        folder, size = self._base_path(store), bases.SIZES[store.size]
        return Job(
            f"base {store.base} {store.size}",
            parts.base_evaluation(folder, "all"),
            lambda: parts.make_base(folder, size, store.base, self.data),
        )

    def _store(self, store: Store) -> Job:
        folder, base = self._store_path(store), self._base_path(store)
        return Job(
            f"Stage 0 {store.name}",
            folder / "manifest.json",
            lambda: parts.make_store(folder, store, base, self.data),
            needs=[parts.base_evaluation(base, "all")],
        )

    def _run(self, run: Run) -> Job:
        base, store, row = (
            self._base_path(run.store),
            self._store_path(run.store),
            self.row_path(run),
        )
        matched = [self.row_path(other) for other in plan.matching(run)] if run.lr is None else []
        return Job(
            run.name,
            row,
            lambda: parts.make_run(row.parent, run, base, store, self.data, matched),
            needs=[parts.base_evaluation(base, "all"), store / "manifest.json", *matched],
        )

    def collect(self, runs: Sequence[Run]) -> int:
        """Write rows.csv: every base and every finished run of this directory, of whatever plan.

        Returns how many of ``runs`` are finished.
        """
        rows = [_base_row(path) for path in sorted(self.folder.glob("bases/*/evaluation-*.json"))]
        for path in sorted(self.folder.glob(f"runs/*/*/*/{parts.ROW}")):
            rows += read_rows(path)
        write_rows(self.rows_path, rows)
        return sum(self.row_path(run).exists() for run in runs)


def _base_row(path: Path) -> Row:
    base, _, size = path.parent.name.rpartition("-")
    store = Store(base=base, size=size, domain=path.stem.removeprefix("evaluation-"))
    is_all = store.domain == "all"
    return row_of_model(
        read_evaluation(path)["models"][0],
        name=f"base {base}-{size}" + ("" if is_all else f" {store.domain}"),
        method="Base", tables="methods remedies sweep" if is_all else "sweep",
        variant="", base=store.setting, size=size, seed=0, lr=None,
    )  # fmt: skip
