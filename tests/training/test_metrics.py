"""metrics.jsonl across stops, and stability against numpy's own fits and numbers by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_replay.run_log import read_metrics
from megatron_replay.training.metrics import MetricsLog, Stability, UpdateWarnings

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
    """All lines if there is no checkpoint, the reading at the start too: it is taken again."""
    write(tmp_path, range(4), resume=0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 3, "lo')  # a kill left it incomplete
    assert write(tmp_path, [10], resume=resume) == kept
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines == [{"iteration": i, **STEP, "loss": i / 2} for i in [*kept, 10]]


def test_numbers_go_to_tensorboard_and_all_goes_to_the_file(tmp_path):
    log = MetricsLog(tmp_path, resume_iteration=0)
    values = {"lr": float("nan"), "general": {"perplexity": 2.0, "sample": "ab"}, "none": None}
    log.write(1, values)
    log.close()
    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"iteration": 1, **values, "lr": None}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"lr", "general/perplexity"}


def steps(losses, norms=None) -> list[dict]:
    norms = [1.0] * len(losses) if norms is None else norms
    return [
        {"iteration": i, "loss": loss, "grad_norm": norm}
        for i, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=1)
    ]


def feed(stability: Stability, lines: list[dict]) -> dict[int, dict[str, float]]:
    """The spikes that begin, by iteration."""
    found = {line["iteration"]: stability.add(line) for line in lines}
    return {iteration: spikes for iteration, spikes in found.items() if spikes}


def spiky_run(seed: int, count: int) -> list[dict]:
    """Steps with jumps, alone and in a row, values that are not finite, and a falling loss."""
    rng = np.random.default_rng(seed)
    losses = 3 - np.arange(count) / count + 0.1 * rng.normal(size=count)
    norms = 1 + 0.2 * rng.random(count)
    for series in (losses, norms):
        series[rng.integers(count, size=count // 40)] += 10 ** rng.uniform(0, 3)
        series[rng.integers(count, size=2)] = math.nan, math.inf
    if count > 250:
        losses[[200, 201, 202]] += 50.0, 500.0, 5000.0
    return steps(losses.tolist(), norms.tolist())


def reference(lines: list[dict], warmup: int) -> tuple[dict, dict[int, dict[str, float]]]:
    """The numbers and spikes by their definitions, with numpy.polyfit, over the whole series."""
    kept = [x for x in lines if np.isfinite([x["loss"], x["grad_norm"]]).all()]
    losses = np.array([x["loss"] for x in kept])
    half = losses[len(losses) // 2 :]
    t = np.arange(len(half))
    residual = half - np.polyval(np.polyfit(t, half, 1), t)
    after = np.array([x["grad_norm"] for x in kept if x["iteration"] > warmup])
    values = {
        "steps": len(kept),
        "non_finite": len(lines) - len(kept),
        "loss_std": np.sqrt(np.mean(residual**2)),
        "loss_variance": np.mean(residual**2),
        "gradient_norm_cv": np.std(after) / np.mean(after),
    }
    began: dict[int, dict[str, float]] = {}
    for name, key in (("loss", "loss"), ("gradient", "grad_norm")):
        series, above = np.array([x[key] for x in kept]), [False] * len(kept)
        for i in range(128, len(kept)):
            window = series[i - 128 : i]
            limit = window.mean() + 6 * np.sqrt(((window - window.mean()) ** 2).mean())
            above[i] = series[i] > limit
            if above[i] and not above[i - 1]:
                began.setdefault(kept[i]["iteration"], {})[name] = limit
        count, judged = sum(name in spikes for spikes in began.values()), len(kept) - 128
        values[f"{name}_spikes"] = count if judged > 0 else None
        values[f"{name}_spike_rate"] = count / judged if judged > 0 else None
    return values, began


@pytest.mark.parametrize(
    ("seed", "count", "warmup"),
    [(0, 400, 0), (1, 400, 140), (2, 1000, 10), (3, 100, 99), (4, 9, 0)],
)
def test_the_numbers_are_those_of_numpy(seed, count, warmup):
    lines = spiky_run(seed, count)
    stability = Stability(warmup_iters=warmup)
    values, began = reference(lines, warmup)
    found = feed(stability, lines)
    assert found == {i: pytest.approx(spikes, rel=1e-12) for i, spikes in began.items()}
    numbers = stability.values()
    assert {k for k, v in numbers.items() if v is None} == {k for k in values if values[k] is None}
    assert {k: v or 0 for k, v in numbers.items()} == pytest.approx(
        {k: v or 0 for k, v in values.items()}, rel=1e-9
    )
    assert count < 250 or values["loss_spikes"] > 0


@pytest.mark.parametrize("stop", [1, 100, 201, 202, 205, 399])
def test_a_resumed_run_has_the_numbers_of_one_that_never_stopped(stop):
    """Refilled from the log, where NaN is null, also in the middle of a spike."""
    whole, resumed = Stability(warmup_iters=140), Stability(warmup_iters=140)
    lines = spiky_run(0, 400)
    began = feed(whole, lines)
    logged = [
        {k: v if math.isfinite(v) else None for k, v in line.items()} for line in lines[:stop]
    ]
    feed(resumed, json.loads(json.dumps(logged)))
    assert feed(resumed, lines[stop:]) == {k: v for k, v in began.items() if k > stop}
    assert resumed.values() == whole.values()
    assert resumed.summary() == whole.summary()


def test_what_is_undefined_is_none():
    stability = Stability(warmup_iters=2)
    assert stability.values()["loss_std"] is None
    feed(stability, steps([5.0], [3.0]))
    assert stability.values()["loss_variance"] == 0.0  # a line passes through two points
    assert stability.values()["gradient_norm_cv"] is None  # still in the warm-up
    feed(stability, [{"iteration": 3, "loss": 1.0, "grad_norm": 0.0}])
    assert stability.values()["gradient_norm_cv"] is None  # the mean is 0


def test_a_constant_series_has_no_spike_by_rounding():
    for value in (0.1, 0.3, 0.7, 1.1, 2.3):
        assert feed(Stability(warmup_iters=0), steps([value] * 400)) == {}
    assert list(feed(Stability(warmup_iters=0), steps([0.1] * 500 + [0.2]))) == [501]


BAD = {"obtuse": 1.0, "update_rms_over_lr": 0.001, "degrees": 91.0}
TINY, OPPOSED = {"update_rms_over_lr": 0.0}, {"obtuse": 1.0}
#: Of half, one obtuse step in two, the limit is reached, not passed. AdamW has no angle, a skipped
#: step has nothing, and the log keeps NaN as null: they are not counted.
HALF = [{"obtuse": float(k % 2)} for k in range(100)]
WARM_UP = [TINY] * 10 + [{"update_rms_over_lr": 0.5}] * 60


@pytest.mark.parametrize(
    ("updates", "warned"),
    [
        ([BAD] * 49, []),
        ([BAD] * 200, [50, 50]),
        (HALF, []),
        ([*HALF, OPPOSED, OPPOSED], [101]),
        (WARM_UP, []),
        (WARM_UP + [TINY] * 60, [70 + 49]),
        ([*[TINY] * 49, {}, {"update_rms_over_lr": None}, TINY], [52]),
        ([{"update_rms_over_lr": 0.3}] * 100, []),
    ],
)
def test_a_warning_comes_once_for_the_mean_of_a_full_window(updates, warned):
    watch = UpdateWarnings()
    found = [(k, text) for k, update in enumerate(updates, start=1) for text in watch.add(update)]
    assert [k for k, _ in found] == warned
    if updates[-1] is BAD and found:
        assert "against the momentum in 100 % of the last 50" in found[0][1]
        assert "0.001 x lr" in found[1][1]
