"""The study's rows, tables, curves and figures: the committed evidence, and a few rows by hand."""

from __future__ import annotations

import csv
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from examples.replicate import curves, plan, report, tables
from examples.replicate.results import read_rows, row_of_model, write_rows
from megatron_replay.errors import DataError
from tests.markdown import parsed, table

EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence"


def row(method: str, seed: int = 0, *, shop: float | None = None, **more: Any) -> dict[str, Any]:
    """One run: score of the task ``shop`` in per cent, perplexity 20 more than ``change``."""
    change = more.pop("change", 0.0)
    given = {
        "name": f"{method}-{seed}-{more}", "method": method, "tables": "methods", "variant": "",
        "base": "b", "size": "s", "seed": seed, "lr": 1e-4, "weights": "0", "domain/shop": shop,
        "general/cloze": 40.0, "perplexity": 20.0 + change, "relative_l2_percent": 1.0,
        "steps": 100, "seconds": 50.0, "stage0_seconds": None, "outside_percent": None,
        "loss_std": 0.1, "gradient_norm_cv": 0.2, "loss_spikes": 0, "gradient_spikes": 1,
    }  # fmt: skip
    return given | more


def base(shop: float | None = 10.0, **more: Any) -> dict[str, Any]:
    return row("Base", shop=shop, tables="methods remedies sweep", lr=None) | {
        "steps": None, "seconds": None, "general/cloze": 50.0, **more,
    }  # fmt: skip


def load(tmp_path: Path, *rows: dict[str, Any]) -> pd.DataFrame:
    write_rows(tmp_path / "rows.csv", rows)
    return tables.load_rows([tmp_path / "rows.csv"])


def curve_rows(method: str, seed: int, *points: tuple[float, float]) -> list[dict[str, Any]]:
    return [
        row(method, seed, shop=x, change=y, lr=(i + 1) * 1e-4, tables="sweep")
        for i, (x, y) in enumerate(points)
    ]


def test_rows_are_written_and_read_again(tmp_path: Path) -> None:
    entry = {
        "sha256": "ab" * 32,
        "sql": {"shop": {"accuracy": 1 / 3}},
        "choices": {"cloze": {"accuracy": 0.5, "general": True}},
        "general": {"perplexity": math.inf},
        "relative_l2_percent": 1.25,
    }
    made_with = {"name": "n", "method": "m, 1", "tables": "", "variant": "", "base": "b"}
    one = row_of_model(entry, **made_with, size="s", seed=3, lr=2e-4)
    write_rows(tmp_path / "rows.csv", [one])
    (read,) = read_rows(tmp_path / "rows.csv")
    assert (read["method"], read["weights"], read["lr"]) == ("m, 1", "ab" * 6, "0.0002")
    assert float(read["domain/shop"]) == pytest.approx(100 / 3, rel=1e-6)
    assert (read["general/cloze"], read["perplexity"], read["steps"]) == ("50", "inf", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "x"}, "column seed: not a number"),
        ({"base": "another"}, "another, s: no row of the base model"),
    ],
)
def test_mistakes_in_rows_are_one_line(tmp_path, change, message) -> None:
    with pytest.raises(DataError, match=message):
        load(tmp_path, base(), row("TAM", shop=1.0) | change)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"other\.csv: not rows of the study"):
        read_rows(tmp_path / "other.csv")


def test_a_line_is_the_mean_and_deviation_of_its_seeds(tmp_path: Path) -> None:
    scores = {"AdamW (SFT)": (40.0, 42.0, 44.0), "TAM": (45.0, None)}
    rows = [row(m, s, shop=x, change=0.5 * s) for m, of in scores.items() for s, x in enumerate(of)]
    found = tables.paper_tables(load(tmp_path, *rows, base()))
    assert parsed(tables.markdown(found["Table 1: domain scores (b, s)"])) == [
        {"method": "Base", "shop, %": "10.0", "domain mean, %": "10.0", "n": "1"},
        {"method": "AdamW (SFT)", "shop, %": "42.0 ± 2.0", "domain mean, %": "42.0 ± 2.0",
         "n": "3"},
        {"method": "TAM", "shop, %": "45.0 [n = 1]", "domain mean, %": "45.0 [n = 1]", "n": "2"},
    ]  # fmt: skip
    (_, adamw, _) = parsed(tables.markdown(found["Table 2: general benchmarks (b, s)"]))
    assert adamw["retention, %"] == "80.0 ± 0.0"
    assert adamw["general perplexity"] == "20.50 ± 0.50"
    (adamw, _) = parsed(tables.markdown(found["Table 3: distance and forgetting (b, s)"]))
    assert adamw["ΔPPL"] == "+0.50 ± 0.50"
    (adamw, _) = parsed(tables.markdown(found["Cost (b, s)"]))
    assert (adamw["s/step"], adamw["both, s"]) == ("0.500 ± 0.000", "50.0 ± 0.0")


def test_intervals_are_those_of_student_t() -> None:
    """t of 1, 2 and 9 degrees of freedom as printed in tables; 1, 2, 6 has the variance 14/2."""
    mean, std, half, n = tables.spread([1.0, math.nan, 2.0, 6.0])
    assert (mean, n) == (3.0, 3)
    assert std == pytest.approx(statistics.stdev([1, 2, 6])) == pytest.approx(math.sqrt(7))
    assert half == pytest.approx(4.3027 * math.sqrt(7 / 3), rel=1e-4)
    assert tables.spread([0.0, 2.0])[2] == pytest.approx(12.7062, rel=1e-4)
    ten = tables.spread(range(10))
    assert ten[2] == pytest.approx(2.2622 * statistics.stdev(range(10)) / 10**0.5, rel=1e-4)
    assert math.isnan(tables.spread([5.0])[2])


def test_remedies_are_compared_seed_by_seed(tmp_path: Path) -> None:
    """Differences of 1 and 3 points over the seeds 1 and 2, which both methods have."""
    ours = [row("document", s, shop=x, tables="remedies") for s, x in ((1, 11.0), (2, 103.0))]
    full = [row("full softmax", s, shop=x, tables="remedies") for s, x in ((1, 10.0), (2, 100.0))]
    rows = load(tmp_path, *ours, *full, row("full softmax", 3, shop=9, tables="remedies"), base())
    *_, document = parsed(tables.markdown(tables.remedies(rows)))
    assert document["domain mean, %, paired"] == "+2.0 [-10.7, +14.7]"


def test_ablations_are_lines_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    rows = [
        row("m", shop=x, tables="angles", variant=v)
        for v, x in (("90", 1.0), ("", 2.0), ("100", 3.0), ("30", 4.0))
    ]
    found = tables.paper_tables(load(tmp_path, *rows, base()))
    lines = parsed(tables.markdown(found["Table 5: largest angle (b, s)"]))
    assert [line["variant"] for line in lines] == ["30", "45", "90", "100"]


def test_two_runs_of_one_seed_in_a_line_are_refused(tmp_path: Path) -> None:
    rows = [row("TAM", shop=1.0), row("TAM", shop=2.0, lr=0.1), base()]
    with pytest.raises(DataError, match=r"TAM-0.*two runs in one line"):
        tables.paper_tables(load(tmp_path, *rows))
    # The same run listed twice counts once, and the last row counts.
    rows = load(tmp_path, row("TAM", shop=1.0), row("TAM", shop=2.0), base())
    assert rows[rows.method == "TAM"].domain_mean.tolist() == [2.0]


def test_a_row_that_lacks_a_task_has_no_domain_mean(tmp_path: Path) -> None:
    rows = load(tmp_path, row("TAM", shop=30.0, **{"domain/quiz": 50.0}), row("MoFO", shop=1.0),
                base(**{"domain/quiz": 0.0}))  # fmt: skip
    assert rows.set_index("method").domain_mean.reindex(["TAM", "Base"]).tolist() == [40.0, 5.0]
    assert np.isnan(rows.set_index("method").domain_mean["MoFO"])


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


def test_sweeps_are_compared_at_equal_gain(tmp_path: Path) -> None:
    """Both reach 30 to 60: at 45, ours forgets 1.75 and full softmax 3.5, with every seed."""
    rows = [base()]
    for seed in (0, 1):
        rows += curve_rows("full softmax", seed, (20, 1), (60, 5))
        rows += curve_rows("ours", seed, (30, 1), (70, 3))
        rows += curve_rows("one", seed, (40, 2))
        rows += curve_rows("low", seed, (15, 2))
        rows += curve_rows("worse", seed, (0, 1), (10, 2))
    rows += curve_rows("one", 2, (90, 9))  # a seed that the reference lacks
    found = [
        (line["method"], line["domain mean, %"], line["ΔPPL difference"], line["n"])
        for line in parsed(tables.markdown(curves.equal_gain(load(tmp_path, *rows))))
    ]
    assert found == [
        ("ours", "37.5", "-1.38 [-1.38, -1.38]", "2"),
        ("ours", "45.0", "-1.75 [-1.75, -1.75]", "2"),
        ("ours", "52.5", "-2.12 [-2.12, -2.12]", "2"),
        ("one", "40.0", "-1.00 [-1.00, -1.00]", "2"),
        ("low", "15.0", "the reference does not reach it", "–"),
        ("worse", "–", "no score that both reach with every seed", "–"),
    ]


@pytest.mark.parametrize(
    ("base_score", "expected"),
    [
        (10, ["30.0", "40.0", "50.0"]),
        (40, ["45.0", "50.0", "55.0"]),  # only what is above the base is a gain
        (60, ["–"]),
        (None, ["30.0", "40.0", "50.0"]),
    ],
)
def test_curves_are_compared_above_the_base(tmp_path, base_score, expected) -> None:
    rows = [base(base_score)]
    for method in ("full softmax", "ours"):
        rows += curve_rows(method, 0, (20, 2), (60, 6))
    found = curves.equal_gain(load(tmp_path, *rows))
    assert found["domain mean, %"].tolist() == expected


def test_the_page_s_numbers_come_from_the_committed_rows(tmp_path: Path) -> None:
    """Some of docs/evidence.md, by plain means over the CSV; and report writes all files."""
    with (EVIDENCE / "rows.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert (EVIDENCE / "rows.csv").stat().st_size <= 300_000

    def domain(method: str) -> float:
        names = ("domain/tables", "domain/joins", "domain/protocols")
        of = [r for r in rows if r["method"] == method and r["base"] == "competent"
              and "methods" in r["tables"].split()]  # fmt: skip
        assert {r["seed"] for r in of} == {"0", "1", "2"}
        return statistics.mean(float(r[name]) for r in of for name in names)

    assert domain("AdamW (SFT)") == pytest.approx(71.1, abs=0.05)
    assert domain("Dyn. Top-K + MoClip") == pytest.approx(46.3, abs=0.05)
    given = ["--rows", str(EVIDENCE / "rows.csv"), "--output-dir", str(tmp_path / "out")]
    assert report.main(given) == report.main(given) == 0  # it replaces its own
    text = (tmp_path / "out" / "tables.md").read_text()
    _, adamw, *_ = table(text, "Table 1: domain scores (competent, small)")
    assert (adamw["method"], adamw["domain mean, %"]) == ("AdamW (SFT)", "71.1 ± 0.5")
    for name in ("forgetting-small.png", "forgetting-large.png"):
        image = imread(tmp_path / "out" / name)
        assert image.shape[1] >= 1000
        assert 0.01 < (image[..., :3].min(-1) < 0.9).mean() < 0.5
        assert (EVIDENCE / name).exists()
    (tmp_path / "out" / "tables.md").write_text("mine")
    assert report.main(given) == 6
    assert (tmp_path / "out" / "tables.md").read_text() == "mine"


def test_the_page_s_table_of_remedies_comes_from_the_committed_rows() -> None:
    """Change of forgetting and of accuracy against full softmax, by plain means over the CSV."""
    rows = read_rows(EVIDENCE / "rows.csv")

    def change(base: str, domain: str, size: str, method: str, lr: str) -> tuple[str, str]:
        own, full = (
            {r["seed"]: r for r in rows if (r["base"], r["size"], r["method"], r["lr"]) ==
             (f"{base}, {domain}", size, name, lr)}
            for name in (method, "full softmax")
        )  # fmt: skip
        of_base = ("Base", f"{base}, {domain}", size)
        (start,) = (float(r["perplexity"]) for r in rows
                    if (r["method"], r["base"], r["size"]) == of_base)  # fmt: skip
        seeds = own.keys() & full.keys()
        forgot, of_full = (
            statistics.mean(float(r[seed]["perplexity"]) - start for seed in seeds)
            for r in (own, full)
        )
        score = f"domain/{domain}"
        points = statistics.mean(float(own[s][score]) - float(full[s][score]) for s in seeds)
        return f"{100 * (forgot / of_full - 1):+.0f}", f"{points:+.1f}"

    page = (EVIDENCE.parent / "evidence.md").read_text().replace("−", "-")
    lines = page.partition("| base, domain, size |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(lines) == 10
    for line in lines:
        where, _, _, *cells = (cell.strip(" %") for cell in line.strip("|").split("|"))
        found = [text for cell in cells for text in cell.split()]
        of = where.split(", ")
        expected = [*change(*of, "position (the paper's)", "0.0004")]
        for method in ("document + ghost", plan.DIVERGENCE):
            changes = [change(*of, method, lr) for lr in ("0.0002", "0.0004", "0.0008")]
            expected += [forgot for forgot, _ in changes] + [points for _, points in changes]
        assert [float(x) for x in found] == pytest.approx([float(x) for x in expected]), where


def test_the_committed_rows_are_runs_of_the_plan() -> None:
    """But for the 40 runs of options that were removed, whose names are in no plan."""
    runs = {run.name: run for name in plan.PLANS for run in plan.plan(name)}
    rows = [r for r in read_rows(EVIDENCE / "rows.csv") if r["method"] != "Base"]
    unknown = [r["name"] for r in rows if r["name"] not in runs]
    removed = ("-tile-", "-micro-batch-", "-sampled-", "-full-loss-every-")
    assert len(unknown) == 40
    assert all(any(part in name for part in removed) for name in unknown)
    for r in rows:
        if run := runs.get(r["name"]):
            assert (run.method, " ".join(run.tables), str(run.seed)) == (
                r["method"], r["tables"], r["seed"],
            )  # fmt: skip
