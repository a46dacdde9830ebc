"""``--profile``: a file of each rank, in which a step has its parts by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import stages


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stages.prepare(tmp_path_factory.mktemp("profile"), documents=40, num_hidden_layers=1)


def regions(path: Path) -> list[dict[str, Any]]:
    events = json.loads(path.read_text())["traceEvents"]
    return [
        e for e in events if e.get("ph") == "X" and e.get("cat") in ("user_annotation", "cpu_op")
    ]


def inside(event: dict[str, Any], step: dict[str, Any]) -> bool:
    """Whether ``event`` begins and ends within ``step``."""
    end = step["ts"] + step["dur"]
    return step["ts"] <= event["ts"] and event["ts"] + event["dur"] <= end


@pytest.mark.distributed
def test_each_rank_traces_the_parts_of_the_steps_asked_for(folder, tmp_path):
    flags = ["--profile", "--sequence-parallel", "--train-iters", 5]
    stages.succeed("stage1", *stages.argv(folder, tmp_path, *flags), tp=2)
    names = [f"iterations-0000004-0000005-rank-{rank:05d}.json" for rank in (0, 1)]
    assert sorted(p.name for p in (tmp_path / "profile").iterdir()) == names
    for name in names:
        events = regions(tmp_path / "profile" / name)
        steps = [event for event in events if event["name"] == "step"]
        assert len(steps) == 2
        for step in steps:
            parts = [event["name"] for event in events if inside(event, step)]
            # Packs of this rank: two micro-batches and more, each forward and backward.
            assert parts.count("data") == parts.count("optimizer") == 1
            assert parts.count("head") == 8
            assert sum(part.startswith("c10d::") for part in parts) > 8


@pytest.mark.distributed
def test_a_run_that_ends_early_leaves_what_it_traced(folder, tmp_path):
    flags = ["--profile", "--train-iters", 5, "--exit-interval", 4, "--probe-interval", 0]
    stages.succeed("stage1", *stages.argv(folder, tmp_path, *flags))
    [trace] = (tmp_path / "profile").iterdir()
    assert trace.name == "iterations-0000004-0000004-rank-00000.json"
