"""metrics.jsonl across stops: lines of lost steps go, the others stay for whoever goes on."""

from __future__ import annotations

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_replay.errors import OutputError
from megatron_replay.training.metrics import MetricsLog, read_metrics

STEP = {"grad_norm": 1.0, "positions": 3, "seconds": 0.5}


def write(directory, iterations, *, resume: int) -> list[int]:
    """Log ``iterations``; returns those whose lines were kept from before."""
    log = MetricsLog(directory, resume_iteration=resume)
    for iteration in iterations:
        log.write(iteration, STEP | {"loss": iteration / 2})
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
    assert lines == [{"iteration": i, **STEP, "loss": i / 2} for i in [*kept, 10]]


@pytest.mark.parametrize(
    "line",
    [
        b"", b"{}", b"[]", b"null", b"\xff\xfe", b'"text"', b'{"iteration": "1"}', b"[" * 99_999,
        b'{"iteration": true}', b'{"iteration": -1}', b'{"iteration": 1, "loss": 2}',
        b'{"iteration": 1, "loss": "2", "seconds": 1, "positions": 1, "grad_norm": 1}',
        b'{"iteration": 1, "loss": 2, "seconds": 1, "positions": 1, "grad_norm": {}}',
        b'{"iteration": 1, "general": 3}', b'{"iteration": 1, "general": {"perplexity": "x"}}',
    ],
)  # fmt: skip
def test_a_damaged_line_is_named(tmp_path, line):
    """Only what a kill has torn, at the very end, is dropped without a word."""
    write(tmp_path, range(3), resume=0)
    path = tmp_path / "metrics.jsonl"
    first, *others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + line + b"\n" + b"".join(others))
    with pytest.raises(OutputError, match=r"metrics\.jsonl:2: damaged"):
        MetricsLog(tmp_path, resume_iteration=2)


def test_numbers_go_to_tensorboard_and_all_goes_to_the_file(tmp_path):
    log = MetricsLog(tmp_path, resume_iteration=0)
    values = {"loss": float("nan"), "general": {"perplexity": 2.0, "sample": "ab"}, "none": None}
    log.write(1, values)
    log.close()
    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"iteration": 1, **values, "loss": None}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "general/perplexity"}
