"""metrics.jsonl across stops: lines of lost steps go, the others stay for whoever goes on."""

from __future__ import annotations

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_replay.training.metrics import MetricsLog, read_metrics


def write(directory, iterations, *, resume: int) -> list[int]:
    """Log ``iterations``; returns those whose lines were kept from before."""
    log = MetricsLog(directory, directory / "events", resume_iteration=resume)
    for iteration in iterations:
        log.write(iteration, {"loss": iteration / 2})
    log.close()
    return [line["iteration"] for line in log.kept]


@pytest.mark.parametrize(("resume", "kept"), [(0, []), (2, [0, 1, 2]), (9, [0, 1, 2, 3])])
def test_lines_after_the_checkpoint_are_dropped(tmp_path, resume, kept):
    """All of them where there is none, the measurement of the start too: it is taken again."""
    write(tmp_path, range(4), resume=0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 1, "lo')  # torn by a kill
    assert write(tmp_path, [10], resume=resume) == kept
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines == [{"iteration": i, "loss": i / 2} for i in [*kept, 10]]


def test_numbers_go_to_tensorboard_and_all_goes_to_the_file(tmp_path):
    log = MetricsLog(tmp_path, tmp_path / "events", resume_iteration=0)
    values = {"loss": float("nan"), "general": {"perplexity": 2.0, "sample": "ab"}, "none": None}
    log.write(1, values)
    log.close()
    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"iteration": 1, **values, "loss": None}
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "general/perplexity"}
