"""``--profile``: a file of each rank, in which a step has its parts by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e import stages


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stages.prepare(tmp_path_factory.mktemp("profile"), documents=40, num_hidden_layers=1)


@pytest.mark.distributed
def test_each_rank_traces_the_parts_of_the_steps_asked_for(folder, tmp_path):
    flags = ["--profile", "--sequence-parallel", "--train-iters", 5]
    stages.succeed("stage1", *stages.argv(folder, tmp_path, *flags), tp=2)
    names = [f"iterations-0000004-0000005-rank-{rank:05d}.json" for rank in (0, 1)]
    assert sorted(p.name for p in (tmp_path / "profile").iterdir()) == names
    for name in names:
        events = json.loads((tmp_path / "profile" / name).read_text())["traceEvents"]
        events = [e for e in events if e.get("cat") in ("user_annotation", "cpu_op")]
        spans = [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in events if e.get("ph") == "X"]
        steps = [(start, stop) for part, start, stop in spans if part == "step"]
        assert len(steps) == 2
        for first, last in steps:
            parts = [part for part, start, stop in spans if first <= start and stop <= last]
            # Four micro-batches, each forward and backward.
            assert parts.count("data") == parts.count("optimizer") == 1
            assert parts.count("head") == 8
            assert sum(part.startswith("c10d::") for part in parts) > 8


@pytest.mark.distributed
def test_a_run_that_ends_early_leaves_what_it_traced(folder, tmp_path):
    flags = ["--profile", "--train-iters", 5, "--exit-interval", 4, "--probe-interval", 0]
    stages.succeed("stage1", *stages.argv(folder, tmp_path, *flags))
    [trace] = (tmp_path / "profile").iterdir()
    assert trace.name == "iterations-0000004-0000004-rank-00000.json"
