"""What is read of a run's directory: totals, last readings, damaged lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_replay.errors import DataError
from megatron_replay.run_log import read_metrics, summarize_run

STABILITY = {
    "loss_std": 0.25, "loss_variance": 0.0625, "gradient_norm_cv": None, "loss_spikes": 1,
    "loss_spike_rate": 0.01, "gradient_spikes": 0, "gradient_spike_rate": 0.0, "non_finite": 2,
}  # fmt: skip


def write_run(directory: Path, lines: list[dict[str, Any]]) -> Path:
    directory.mkdir()
    (directory / "resolved_config.yaml").write_text("optimizer:\n  lr: 0.1\n")
    (directory / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return directory


def steps(count: int = 40) -> list[dict[str, Any]]:
    """Losses of 3 - i/100, tokens of 100 + i, half a second each."""
    return [
        {
            "iteration": i, "loss": 3 - i / 100, "grad_norm": 1.0, "lr": 1e-3, "tokens": 100 + i,
            "positions": 9, "seconds": 0.5, "data_wait_seconds": 0.001 * i,
        }
        for i in range(1, count + 1)
    ]  # fmt: skip


def test_totals_and_last_readings(tmp_path: Path) -> None:
    lines = steps()
    for at, distance, perplexity in ((40, 0.0123, 21.5), (20, 0.01, 20.0), (0, None, 19.25)):
        general = {"perplexity": perplexity, "delta_ppl": perplexity - 19.25, "sample": "5" * 16}
        probe = {"outside_mass": at / 1000, "restricted_loss": 0.1, "full_loss": 0.11}
        reading = {"iteration": at, "general": general, "probe": probe}
        reading["stability"] = STABILITY if at == 40 else {"loss_std": 9.0}
        lines.insert(at, reading | ({} if distance is None else {"relative_l2": distance}))
    for line in lines:
        if "loss" in line:  # prefixes are shared
            line["computed_tokens"] = line["tokens"] / 4
    summary = summarize_run(write_run(tmp_path / "run", lines))
    assert (summary.iterations, summary.logged) == (40, 40)
    assert summary.computed_share == 0.25
    assert summary.tokens == sum(100 + i for i in range(1, 41))
    assert summary.seconds == pytest.approx(20.0)
    assert summary.tokens_per_second == pytest.approx(summary.tokens / 20)
    assert summary.data_wait_share == pytest.approx(0.82 / 20)
    assert summary.final_loss == pytest.approx(3 - (37 + 38 + 39 + 40) / 400)
    assert {name: getattr(summary, name) for name in STABILITY} == STABILITY
    assert (summary.relative_l2, summary.general_perplexity, summary.delta_ppl) == (
        0.0123, 21.5, 2.25,
    )  # fmt: skip
    assert [line["iteration"] for line in summary.probes] == [0, 20, 40]
    assert summary.outside_mass == 0.04


def test_what_was_not_logged_is_none(tmp_path: Path) -> None:
    """Every second step only; one without a label, which has no loss; one without a wait."""
    lines = steps(60)[1::2]
    lines[0] |= {"loss": None, "grad_norm": None, "positions": 0}
    del lines[0]["data_wait_seconds"]
    summary = summarize_run(write_run(tmp_path / "run", lines))
    assert (summary.iterations, summary.logged) == (60, 30)
    assert summary.tokens is summary.seconds is summary.data_wait_share is None
    assert summary.computed_share is None
    assert summary.tokens_per_second > 200
    assert (
        summary.loss_std is summary.non_finite is summary.relative_l2 is summary.delta_ppl is None
    )
    assert summary.outside_mass is None


DAMAGED = [
    {"iteration": "1"}, {"iteration": None}, {"general": [1]}, {"probe": 3}, {"relative_l2": True},
    {"general": {"perplexity": "low", "sample": ""}}, {"stability": {"loss_std": "low"}},
    {"loss": "low"}, {"grad_norm": 10**400}, {"data_wait_seconds": "x"},
    {"computed_tokens": "x"},
    b"[1]", b"3", b"[" * 99_999, b"\xff", b'{"iteration": 1, "x": NaN',
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((change, "jsonl:40: damaged") for change in DAMAGED),
        ({"iteration": 3}, r"jsonl:40: damaged.*39 or more.*found \{.iteration.: 3"),
        ({"tokens": None}, "jsonl: the lines' 'tokens' have no sum"),
        ({"seconds": -1e9}, "jsonl: the lines' 'seconds' have no sum"),
    ],
)
def test_damaged_lines_are_one_line(
    tmp_path: Path, change: dict[str, Any] | bytes, message: str
) -> None:
    *lines, last = steps()
    run = write_run(tmp_path / "run", lines)
    with open(run / "metrics.jsonl", "ab") as handle:
        line = change if isinstance(change, bytes) else json.dumps(last | change).encode()
        handle.write(line + b"\n")
    with pytest.raises(DataError, match=message) as caught:
        summarize_run(run)
    assert "\n" not in str(caught.value)


def test_a_line_that_a_kill_left_incomplete_is_dropped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps(2))
    with open(run / "metrics.jsonl", "a") as handle:
        handle.write('{"iteration": 3, "lo')
    assert read_metrics(run / "metrics.jsonl") == steps(2)
    assert summarize_run(run).iterations == 2


def test_a_directory_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"resolved_config\.yaml: no such file"):
        summarize_run(tmp_path)
    with pytest.raises(DataError, match=r"metrics\.jsonl: no training step was logged"):
        summarize_run(write_run(tmp_path / "empty", []))
    without = [line | {"loss": None} for line in steps()]
    with pytest.raises(DataError, match="no logged step has a finite loss"):
        summarize_run(write_run(tmp_path / "nan", without))
