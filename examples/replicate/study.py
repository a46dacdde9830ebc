"""The directory of a study, and the jobs that fill it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from examples.replicate.data import GENERAL_SETS, SETS_OF, Sources, write_data
from examples.replicate.plan import Plan, Run, Store
from examples.replicate.results import ROWS, base_evaluation, base_row, read_rows, write_rows
from megatron_replay import platform
from megatron_replay.checkpoint.hf import HFReader
from megatron_replay.checkpoint.staging import publish, start_directory
from megatron_replay.errors import DataError
from megatron_replay.files import sha256_of_files, write_json


class Failed(Exception):  # noqa: N818 - the program has printed the reason
    """A program ended with this exit code."""

    def __init__(self, code: int) -> None:
        self.code = code


@dataclass(frozen=True)
class Job:
    """One part, which needs the products of others; it is done when its ``product`` exists."""

    name: str
    product: Path
    action: Callable[[], None]
    needs: Sequence[Path] = ()


class Study:
    """The directory of a study: data, corpora, base, stores, runs, and the rows of all runs."""

    def __init__(self, folder: Path, plan: Plan, *, device: str) -> None:
        self.folder, self.plan, self.device = folder, plan, device
        self.data, self.base = folder / "data", folder / "base"
        self.rows_path = folder / "rows.csv"

    def parts(self) -> ModuleType:
        """parts.py, which imports megatron-core: after this process has its device.

        A process with a CUDA context cannot fork, so for an accelerator only a part's own process
        calls this.
        """
        platform.select(self.device).prepare()
        from examples.replicate import parts

        return parts

    def prepare(self, published: Path, base: Path) -> None:
        """Write the data and the corpora; ``published`` has the sets, ``base`` is the model.

        Raises:
            DataError: a set is missing, or what is here was made from other data or another base.
            CheckpointError: ``base`` has no model.
        """
        sources, domains = Sources(published), self.plan.domains
        sets = [*(SETS_OF[domain] for domain in domains), *GENERAL_SETS]
        made_from = {
            "sets": sha256_of_files(sources.files(sets, self.plan.databases)),
            "base": sha256_of_files(HFReader(base).files()),
            "databases": self.plan.databases,
            "items": self.plan.items,
            "device": self.device,
        }
        settled = self.folder / "study.json"
        if not settled.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(settled, made_from)
        elif json.loads(settled.read_text()) != made_from:
            raise DataError(
                "this study was made from other data, another base, or on another device",
                where=settled, fix="Give another directory as --output",
            )  # fmt: skip
        if not self.data.exists():
            staged = start_directory(self.data)
            write_data(staged, sources, domains=domains, databases=self.plan.databases,
                       items=self.plan.items)  # fmt: skip
            publish(staged, self.data, overwrite=False)
        self.parts().make_corpora(self.data, base, domains)

    def jobs(self, runs: Sequence[Run], base: Path) -> list[Job]:
        """Everything that ``runs`` need, each part before those that need it."""
        jobs: dict[Path, Job] = {}
        for run in runs:
            for job in (self._base(base), self._store(run.store), self._run(run)):
                jobs.setdefault(job.product, job)
        return list(jobs.values())

    def rows_of(self, run: Run) -> Path:
        """Where a finished run leaves its rows."""
        return self.folder / "runs" / run.name / ROWS

    def _store_path(self, store: Store) -> Path:
        return self.folder / "stores" / store.name

    def base_product(self) -> Path:
        """The last thing that the base's job writes."""
        return base_evaluation(self.base, self.plan.domains[-1])

    def _base(self, source: Path) -> Job:
        domains = self.plan.domains
        return Job(
            "base",
            self.base_product(),
            lambda: self.parts().make_base(self.base, source, self.data, domains, self.device),
        )

    def _store(self, store: Store) -> Job:
        folder = self._store_path(store)
        return Job(
            f"Stage 0 {store.name}",
            folder / "manifest.json",
            lambda: self.parts().make_store(folder, store, self.base, self.data, self.device),
            needs=[self.base_product()],
        )

    def _run(self, run: Run) -> Job:
        store, rows = self._store_path(run.store), self.rows_of(run)
        return Job(
            run.name,
            rows,
            lambda: self.parts().make_run(
                rows.parent, run, self.base, store, self.data, self.device
            ),
            needs=[self.base_product(), store / "manifest.json"],
        )

    def collect(self, runs: Sequence[Run]) -> int:
        """Write rows.csv: the base and every finished run of this directory.

        Returns how many of ``runs`` are finished.
        """
        rows = [base_row(path) for path in sorted(self.base.glob("evaluation-*.json"))]
        for path in sorted(self.folder.glob(f"runs/*/*/*/{ROWS}")):
            rows += read_rows(path)
        write_rows(self.rows_path, rows)
        return sum(self.rows_of(run).exists() for run in runs)
