"""tools/blend.py: the search for the weight, and the tool on a very small model."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_replay.evaluation.results import read_evaluation
from tests.evaluation.site import save_model, write_rows
from tests.same_weights import require_equal
from tools import blend, evaluate

BUDGET = 0.3


def search(delta):
    """Result of the search on a curve, and the weights measured, each of them once."""
    measured = []

    def measure(weight):
        measured.append(weight)
        return delta(weight)

    found = blend.largest_within(measure, BUDGET)
    assert len(measured) == len(set(measured)) <= 8
    assert all(0 < weight <= 1 for weight in measured)
    return found, measured


@given(crossing=st.floats(0, 1.5))
def test_of_a_rising_curve_the_last_weight_within_to_a_64th(crossing):
    (weight, falls_back), _ = search(lambda w: BUDGET if w <= crossing else math.inf)
    assert weight == min(math.floor(64 * crossing) / 64, 1.0)
    assert not falls_back


@given(levels=st.lists(st.floats(-1, 1) | st.just(math.nan), min_size=65, max_size=65))
def test_of_any_curve_a_weight_within_below_one_beyond(levels):
    """And, where the search says so, one that is within again."""
    (weight, falls_back), measured = search(lambda w: levels[round(64 * w)])
    within = {w: levels[round(64 * w)] <= BUDGET for w in measured}
    assert weight == 0 or within[weight]
    beyond = [w for w in measured if not within[w]]
    assert (weight == 1) == (not beyond)
    if beyond:
        assert min(beyond) == weight + 1 / 64
        assert falls_back == any(within[w] for w in measured if w > weight)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The tuned model's text is less probable the larger its weights are."""
    folder = tmp_path_factory.mktemp("site")
    save_model(folder / "base")
    save_model(folder / "tuned", scale=4.0)
    write_rows(folder / "text.jsonl", {"text": "general text " * 9}, {"text": "more"})
    write_rows(folder / "data.jsonl", {"prompt": "how many?\n", "completion": "count"})
    return folder


def run(site, tmp_path, budget, *flags):
    return blend.main([
        f"--base={site}/base", f"--tuned={site}/tuned", f"--save={tmp_path}/blend",
        f"--general-text={site}/text.jsonl", f"--max-delta-perplexity={budget}", *flags,
    ])  # fmt: skip


def test_the_tool_writes_what_it_measured(site, tmp_path, capsys):
    assert run(site, tmp_path, 5, f"--data={site}/data.jsonl") == 0
    printed = capsys.readouterr().out.splitlines()
    document = json.loads((tmp_path / "blend.curve.json").read_text())
    weight, curve = document["weight"], document["curve"]
    assert 0 < weight < 1
    assert [point["weight"] for point in curve] == sorted(point["weight"] for point in curve)
    assert printed[0].split("  ")[:2] == ["weight", "general perplexity"]
    assert [float(line.split()[0]) for line in printed[1 : len(curve) + 1]] == [
        pytest.approx(point["weight"], abs=1e-4) for point in curve
    ]
    # The same windows, tokens and sums as an evaluation of what was written.
    evaluate.main([
        f"--base={site}/base", f"--model=blend={tmp_path}/blend", f"--data={site}/data.jsonl",
        f"--general-text={site}/text.jsonl", f"--output={tmp_path}/eval.json",
    ])  # fmt: skip
    _, evaluated = read_evaluation(tmp_path / "eval.json")["models"]
    [point] = [point for point in curve if point["weight"] == weight]
    assert point["general"] == evaluated["general"]
    assert point["data"] == evaluated["data"]
    assert point["general"]["delta_perplexity"] <= 5
    [above] = [point for point in curve if point["weight"] == weight + 1 / 64]
    assert above["general"]["delta_perplexity"] > 5


def test_a_tuned_model_within_the_budget_is_taken(site, tmp_path):
    assert run(site, tmp_path, 1e9) == 0
    require_equal(tmp_path / "blend", site / "tuned")
    assert run(site, tmp_path, 1e9, "--overwrite") == 0


@pytest.mark.parametrize(
    ("budget", "flags", "code", "message"),
    [
        ("1e-9", [], 2, "no blend is within the budget, down to weight 0.0156"),
        ("0", [], 2, "no blend is within the budget, down to weight 0.0156"),
        ("-1", [], 2, "--max-delta-perplexity: no budget (expected a number of at least 0; found"),
        ("nan", [], 2, "expected a number of at least 0; found nan"),
        ("inf", [], 2, "expected a number of at least 0; found inf"),
        ("1", ["--save={site}/base"], 2, "the output is also read, as --base"),
        ("1", ["--save={site}"], 6, "the directory is not empty"),
        ("1", ["--save=."], 6, "the directory is not empty"),
        ("1", ["--data={site}/nothing"], 3, "no such file, given as --data"),
        ("1", ["--tuned={site}/text.jsonl"], 4, "no Hugging Face model here"),
        ("1", ["--chat-template"], 2, "--chat-template: has no effect on general text"),
    ],
)
def test_mistakes_are_one_line(site, tmp_path, capsys, budget, flags, code, message):
    assert run(site, tmp_path, budget, *(flag.format(site=site) for flag in flags)) == code
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "blend").exists()
