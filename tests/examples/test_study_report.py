"""The study's rows, curves, tables and figures, from rows whose results are found by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from examples.replicate import curves, report, tables
from examples.replicate.plan import FULL, LR
from examples.replicate.results import Row, read_rows, row_of_model, write_rows
from megatron_replay.errors import DataError
from tests.markdown import table

QUESTIONS = 100


def hits(percent: float, questions: int = QUESTIONS) -> np.ndarray:
    return np.arange(questions) < round(percent * questions / 100)


def row(method: str, score: float, change: float = 0.0, *, kept: float = 50.0, **more: Any) -> Row:
    """Score of the domain and of a general benchmark in per cent; perplexity 20 + ``change``."""
    given: dict[str, Any] = {
        "name": f"{method}{more}", "method": method, "domain": "shop", "lr": LR, "seed": 0,
        "weights": "ab", "perplexity": 20.0 + change, "relative_l2_percent": 1.0,
        "outside": {8: 1.5, 12: 2.5}, "loss_std": 0.1, "gradient_norm_cv": 0.2, "steps": 12,
        "seconds": 60.0, "stage0_seconds": None, "hits": hits(score),
        "general": {"cloze": hits(kept)},
    }  # fmt: skip
    return Row(**given | more)


def base(score: float = 10.0) -> Row:
    return row("base", score, lr=0.0, outside={}, steps=None, seconds=None)


def sweep(method: str, *points: tuple[float, float], seed: int = 0) -> list[Row]:
    return [
        row(method, x, y, lr=(i + 1) * LR, seed=seed, name=f"{method}{i}-{seed}")
        for i, (x, y) in enumerate(points)
    ]


@given(st.lists(st.booleans(), min_size=1), st.floats(allow_nan=False))
def test_rows_are_written_and_read_again(tmp_path_factory, of: list[bool], perplexity) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    one = row("m, 1", 0, hits=np.array(of), perplexity=perplexity, outside={3: 0.25, 5: 12.5})
    write_rows(path, [one, base()])
    first, second = read_rows(path)
    assert first.hits.tolist() == of
    assert first.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert first.general["cloze"].tolist() == hits(50).tolist()
    same = {name: getattr(one, name) for name in ("name", "method", "lr", "outside", "steps")}
    assert {name: getattr(first, name) for name in same} == same
    assert (second.steps, second.seconds, second.outside) == (None, None, {})


def test_a_row_has_an_evaluation_s_numbers() -> None:
    entry = {
        "sha256": "ab" * 32,
        "sql": {"shop": {"accuracy": 0.5, "hits": "10"}},
        "choices": {"cloze": {"accuracy": 0.5, "general": True, "hits": "011"}},
        "general": {"perplexity": math.inf},
        "relative_l2_percent": 1.25,
    }
    found = row_of_model(entry, name="n", method="m", domain="shop")
    assert (found.weights, found.perplexity, found.relative_l2_percent) == (
        "ab" * 6,
        math.inf,
        1.25,
    )
    assert found.hits.tolist() == [True, False]
    assert {name: of.tolist() for name, of in found.general.items()} == {
        "cloze": [False, True, True]
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [("a,b\n1,2\n", r"rows\.csv: not rows of the study"), (None, r"rows\.csv:2: damaged")],
)
def test_mistakes_in_rows_are_one_line(tmp_path, text, message) -> None:
    path = tmp_path / "rows.csv"
    write_rows(path, [base()])
    path.write_text(text or path.read_text().replace("20,", "x,", 1))
    with pytest.raises(DataError, match=message):
        read_rows(path)


def test_interpolation_never_leaves_the_curve() -> None:
    turning = [(10.0, 1.0), (20.0, 3.0), (16.0, 4.0), (8.0, 6.0), (12.0, 0.0)]
    expected = {12.5: 1.5, 18.0: 2.6, 20.0: 3.0, 11.0: 1.2, 12.0: 0.0, 9.0: 4.5}
    assert {x: curves.interpolate(turning, x) for x in expected} == pytest.approx(expected)
    assert curves.interpolate(turning, 20.01) is curves.interpolate(turning, 7.99) is None
    assert curves.interpolate([(20.0, 3.0), (16.0, 0.0)], 18.0) is None  # too high from the start
    assert curves.interpolate([(5.0, 2.0), (5.0, 1.0)], 5.0) == 1.0
    assert curves.interpolate([], 1.0) is None
    diverged = [(10.0, 1.0), (20.0, math.inf)]
    assert [curves.interpolate(diverged, x) for x in (10.0, 15.0)] == [1.0, math.inf]
    assert curves.interpolate([(10.0, 1.0), (20.0, math.nan)], 10.0) == 1.0


def test_curves_are_means_over_seeds_and_compared_at_equal_gain() -> None:
    """Both reach 30 to 60: at 45, ours forgets 1.75 and full softmax 3.5."""
    ours = sweep("ours", (20, 0.5), (60, 2)) + sweep("ours", (40, 1.5), (80, 4), seed=1)
    reference = sweep(FULL, (20, 1), (60, 5))
    found = {
        score: differences["ΔPPL"][0]
        for score, differences in curves.compare(ours, reference, base())
    }
    assert found == pytest.approx({37.5: 1.375 - 2.75, 45.0: 1.75 - 3.5, 52.5: 2.125 - 4.25})


def test_only_scores_above_the_base_are_compared() -> None:
    pair = [sweep(name, (20, 2), (60, 6)) for name in ("ours", FULL)]
    scores = [[score for score, _ in curves.compare(*pair, base(of))] for of in (10, 40, 60)]
    assert scores == [[30, 40, 50], [45, 50, 55], []]
    assert list(curves.compare(sweep("ours", (70, 2), (80, 6)), pair[1], base())) == []


def test_the_interval_covers_the_questions() -> None:
    """A share p of n questions has the standard deviation √(p(1-p)/n): 4 points here."""
    values = curves.curve([row("m", 20)], base(), curves.draw(base(), 4000))[:, 0, 0]
    assert values[0] == 20
    assert values[1:].std() == pytest.approx(4.0, abs=0.2)
    low, high = curves.interval(values[1:])
    assert (low, high) == pytest.approx((20 - 1.96 * 4, 20 + 1.96 * 4), abs=1.1)
    missing = [np.where(np.arange(100) < n, np.nan, 1.0) for n in (10, 11)]
    assert [curves.interval(of) for of in missing] == [(1.0, 1.0), None]


def test_the_interval_covers_the_seeds() -> None:
    """Of two seeds with ΔPPL 0 and 4, the mean of two draws is 0, 2, 4: half of them 2."""
    rows = [row("m", 20, change, seed=seed) for seed, change in enumerate((0.0, 4.0))]
    values = curves.curve(rows, base(), curves.draw(base(), 4000))[:, 0, 1]
    assert values[0] == 2.0
    assert set(values) == {0.0, 2.0, 4.0}
    assert (values == 2.0).mean() == pytest.approx(0.5, abs=0.05)


def test_methods_share_their_questions() -> None:
    """Of equal answers the difference is 0 in every replicate; only the retention differs."""
    ours, reference = (sweep(name, (20, 2), (60, 6)) for name in ("ours", FULL))
    worse = [one._replace(general={"cloze": hits(25)}) for one in ours]
    for _, differences in curves.compare(worse, reference, base()):
        reached = differences["ΔPPL"][~np.isnan(differences["ΔPPL"])]
        assert set(reached) == {0.0}
        lost = differences["retention lost, points"]
        assert lost[0] == 50.0  # 25 of the base's 50 per cent
        assert np.nanstd(lost) > 0


def test_the_tables_have_means_and_intervals(tmp_path: Path) -> None:
    rows = [base(), row(FULL, 30, 1.0, kept=45), row(FULL, 40, 2.0, kept=35, seed=1)]
    first, second = tables.runs(rows, "shop")
    assert (first["method"], first["rate"], first["score, %"]) == ("base", "–", "10.0 [5.0, 16.0]")
    assert first["retention, %"] == "100.0 [100.0, 100.0]"  # the draws are of the same questions
    assert second["score, %"].startswith("35.0 [")
    assert second["retention, %"].startswith("80.0 [")
    shown = {"ΔPPL": "+1.50", "cloze, %": "40.0", "seeds": "2",
             "outside mass, %": "2.50", "rate": "0.0003"}  # fmt: skip
    assert {name: second[name] for name in shown} == shown
    with pytest.raises(DataError, match="domain shop: no row of the base"):
        tables.runs(rows[1:], "shop")


def test_the_report_has_tables_and_figures_and_replaces_its_own(tmp_path: Path) -> None:
    rows = [base(), *sweep(FULL, (20, 1), (60, 5)), *sweep("ours", (20, 1), (60, 3))]
    rows += [one._replace(domain="quiz") for one in rows[:3]]
    write_rows(tmp_path / "rows.csv", rows)
    output = tmp_path / "out"
    given = ["--rows", str(tmp_path / "rows.csv"), "--output-dir", str(output)]
    assert report.main(given) == report.main(given) == 0
    text = (output / "tables.md").read_text()
    assert [line["rate"] for line in table(text, "Runs: quiz")] == ["–", "0.0003", "0.0006"]
    lines = table(text, "At equal gain")
    assert [(line["method"], line["score, %"]) for line in lines] == [
        ("ours", "30.0"), ("ours", "40.0"), ("ours", "50.0")
    ]  # fmt: skip
    assert lines[1]["ΔPPL"].startswith("-1.00 [")
    for name in ("forgetting.png", "retention.png", "outside.png"):
        image = imread(output / name)
        assert 0.01 < (image[..., :3].min(-1) < 0.9).mean() < 0.6
        assert f"![{name}]" in text
    (output / "tables.md").write_text("mine")
    assert report.main(given) == 6
    assert (output / "tables.md").read_text() == "mine"
