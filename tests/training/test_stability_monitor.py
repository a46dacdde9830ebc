"""Streaming numbers are those of functional.stability; spikes and warnings come when they do."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_replay.functional import gradient_norm_cv, loss_std, loss_variance, spikes
from megatron_replay.training.stability import AngleWatch, SpikeCounter, StabilityMonitor

#: Ties and steps of one size often, so that values meet their limit exactly, and jumps.
series = st.lists(
    st.one_of(st.sampled_from([0.0, 1.0, -1.0, 50.0]), st.floats(-10, 10)), min_size=1, max_size=60
)


@given(values=series, window=st.integers(1, 9))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_counting_as_it_grows_is_counting_at_the_end(values, window):
    counter = SpikeCounter(window)
    began = [i for i, value in enumerate(values) if counter.observe(value) is not None]
    whole = spikes(values, window=window)
    assert (tuple(began), counter.count, counter.judged) == (
        whole.indices, whole.count, whole.judged,
    )  # fmt: skip


def test_the_limit_is_that_of_the_window_before():
    counter = SpikeCounter(4)
    found = [counter.observe(value) for value in (1.0, -1.0, 1.0, -1.0, 5.0, 6.5, 1e9)]
    # 5 is below 6 sigma of the first four; then the window holds it: mean 1, sigma sqrt(6).
    assert found[:6] == [None] * 6
    assert found[6] == pytest.approx(np.mean([1, -1, 5, 6.5]) + 6 * np.std([1, -1, 5, 6.5]))


steps = st.lists(
    st.tuples(
        st.one_of(st.none(), st.just(math.nan), st.floats(0, 10)),
        st.one_of(st.just(math.inf), st.floats(0.1, 10)),
    ),
    max_size=40,
)


@given(steps=steps, warmup=st.integers(0, 10))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_the_numbers_are_those_of_the_whole_series(steps, warmup):
    monitor = StabilityMonitor(warmup_iters=warmup)
    for iteration, (loss, norm) in enumerate(steps, start=1):
        monitor.observe(iteration, loss, norm)
    kept = [
        (iteration, loss, norm)
        for iteration, (loss, norm) in enumerate(steps, start=1)
        if loss is not None and math.isfinite(loss) and math.isfinite(norm)
    ]
    losses, after = [loss for _, loss, _ in kept], [n for i, _, n in kept if i > warmup]
    values = monitor.values()
    assert (values["steps"], values["non_finite"]) == (len(kept), len(steps) - len(kept))
    assert values["loss_std"] == (loss_std(losses) if kept else None)
    assert values["loss_variance"] == (loss_variance(losses) if kept else None)
    assert values["gradient_norm_cv"] == (gradient_norm_cv(after) if after else None)
    assert values["loss_spikes"] is values["gradient_spike_rate"] is None  # too short to judge
    assert f"{len(steps) - len(kept)} " in monitor.summary()


def test_numbers_by_hand():
    monitor = StabilityMonitor(warmup_iters=20)
    # Logged every tenth iteration: two of the eight steps lie in the warm-up.
    for k, (loss, norm) in enumerate(
        zip([9, 9, 9, 9, 1, -1, -1, 1], [7, 7, 1, 3] * 2, strict=True)
    ):
        monitor.observe(10 * (k + 1), loss, norm)
    values = monitor.values()
    assert (values["loss_variance"], values["loss_std"]) == (1.0, 1.0)
    # 1 3 7 7 1 3: mean 11/3.
    assert values["gradient_norm_cv"] == pytest.approx(np.std([1, 3, 7, 7, 1, 3]) / (22 / 6))


def run(count: int = 400) -> list[dict]:
    """Lines of a run whose loss and gradient norm jump, together and apart, once twice in a row."""
    rng = np.random.default_rng(0)
    losses, norms = 3 + 0.1 * rng.normal(size=count), 1 + 0.2 * rng.random(count)
    losses[[150, 151, 399]] += 90.0, 900.0, 90.0
    norms[[150, 300]] += 100.0
    losses[200] = math.nan
    return [
        {"iteration": i + 1, "loss": losses[i], "grad_norm": norms[i]} for i in range(count)
    ]  # fmt: skip


def observe(monitor: StabilityMonitor, lines: list[dict]) -> dict[int, list[str]]:
    said = {
        line["iteration"]: monitor.observe(line["iteration"], line["loss"], line["grad_norm"])
        for line in lines
    }
    return {iteration: messages for iteration, messages in said.items() if messages}


def test_a_spike_is_told_when_it_begins():
    monitor = StabilityMonitor(warmup_iters=0)
    said = observe(monitor, run())
    assert {k: [m.split(" spikes")[0] for m in v] for k, v in said.items()} == {
        151: ["loss", "gradient norm"], 301: ["gradient norm"], 400: ["loss"],
    }  # fmt: skip
    before = [line["loss"] for line in run()[22:150]]
    limit = np.mean(before) + 6 * np.std(before)
    assert (
        f"loss spikes to {run()[150]['loss']:.4g}, above mean + 6 sigma = {limit:.4g}"
        in said[151][0]
    )
    values = monitor.values()
    assert (values["loss_spikes"], values["gradient_spikes"], values["non_finite"]) == (2, 2, 1)
    assert values["loss_spike_rate"] == 2 / (399 - 128)
    assert "2 loss and 2 gradient-norm spikes in 271 steps judged" in monitor.summary()


@pytest.mark.parametrize("stop", [1, 100, 151, 152, 205, 399])
def test_a_resumed_monitor_goes_on_as_if_it_had_not_stopped(stop):
    """Refilled from what the log keeps, where NaN is null; in the middle of a spike, too."""
    whole, resumed = StabilityMonitor(warmup_iters=140), StabilityMonitor(warmup_iters=140)
    lines = run()
    said = observe(whole, lines)
    as_logged = [{k: None if v != v else v for k, v in line.items()} for line in lines[:stop]]
    observe(resumed, json.loads(json.dumps(as_logged)))
    assert observe(resumed, lines[stop:]) == {k: v for k, v in said.items() if k > stop}
    assert resumed.values() == whole.values()
    assert resumed.summary() == whole.summary()


def warnings(updates: list[dict]) -> dict[int, list[str]]:
    """What is said, by the number of the step (from 1)."""
    watch = AngleWatch()
    said = {k: watch.observe(update) for k, update in enumerate(updates, start=1)}
    return {k: messages for k, messages in said.items() if messages}


def test_nothing_is_said_before_the_window_is_full_and_then_once():
    bad = {"obtuse": 1.0, "update_rms_over_lr": 0.001, "degrees": 91.0}
    said = warnings([bad] * 200)
    assert list(said) == [50]
    obtuse, still = said[50]
    assert "against the momentum in 100 % of the last 50" in obtuse
    assert "--global-batch-size" in obtuse
    assert "0.001 x lr" in still
    assert warnings([bad] * 49) == {}


def test_the_mean_of_the_window_is_judged():
    # One obtuse step in two is the limit, not beyond it; then 26 of 50 are.
    half = [{"obtuse": float(k % 2)} for k in range(100)]
    assert warnings(half) == {}
    assert list(warnings([*half, {"obtuse": 1.0}, {"obtuse": 1.0}])) == [101]
    # Small updates of a warm-up are outweighed; the warning comes when the mean falls below.
    warmup = [{"update_rms_over_lr": 0.0}] * 10 + [{"update_rms_over_lr": 0.5}] * 60
    assert warnings(warmup) == {}
    assert list(warnings(warmup + [{"update_rms_over_lr": 0.0}] * 60)) == [70 + 49]


def test_steps_without_the_quantity_do_not_count():
    """AdamW has no angle; a skipped step has nothing; the log keeps NaN as null."""
    one, nothing = {"update_rms_over_lr": 0.001}, [{}, {"update_rms_over_lr": None}]
    assert list(warnings([*[one] * 49, *nothing, one])) == [52]
    assert warnings([{"update_rms_over_lr": 0.3}] * 100) == {}
