"""tools/report.py row and tables: exact tables of a few rows, every format, mistakes."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from megatron_replay.errors import DataError
from megatron_replay.evaluation.curve_tables import CurveComparison, compare_curves
from megatron_replay.evaluation.figure_style import score_limits
from megatron_replay.evaluation.paper_figures import draw_figures
from megatron_replay.evaluation.paper_tables import paper_tables
from megatron_replay.evaluation.rows import Row, append_row, base_row, read_rows
from megatron_replay.evaluation.table_text import markdown_table, sources, to_csv, to_json
from tests.evaluation.synthetic_rows import RUN, entry, row
from tests.evaluation.test_report import evaluation_file, steps, write_run
from tools import report

OF = {"base": "small", "size": "1M"}


def methods() -> list[Row]:
    """A base and three methods; AdamW with three seeds, TAM with two, one without the quiz."""
    seeds = [(0.40, 0.50, 0.62), (0.42, 0.52, 0.60), (0.44, 0.54, 0.64)]
    rows = [
        row("AdamW", seed=i, evaluation=entry(*values, 0.8 + 0.1 * i, 5.0), **OF)
        for i, values in enumerate(seeds)
    ]
    rows += [row("TAM", seed=i, evaluation=entry(0.45, 0.5, 0.7, 0.4, 4.0), **OF) for i in (1, 0)]
    del rows[-1].evaluation["choices"]["quiz"]
    ours = {"loss": "restricted", "optimizer": "moclip", "stage0_seconds": 4.0, **OF}
    rows.append(row("Our own", evaluation=entry(0.38, 0.64, 0.75, -0.001, 3.0), **ours))
    rows.append(base_row(entry(0.05, 0.25, 0.8, 0.0, 0.0), command="evaluate", **OF))
    return rows


def table(rows: Sequence[Row], name: str, **of: Any) -> list[str]:
    found = [t for t in paper_tables(rows, **of) if t.name == name]
    assert len(found) == 1
    return markdown_table(found[0])


def test_table_1() -> None:
    assert table(methods(), "table1") == [
        "## Table 1: domain scores (small, 1M)",
        "",
        "| method | shop, % ↑ | quiz, % ↑ | domain mean, % ↑ | n |",
        "|---|---:|---:|---:|---:|",
        "| Base | 5.0 | 25.0 | 15.0 | 1 |",
        "| AdamW | <u>42.0 ± 2.0</u> | <u>52.0 ± 2.0</u> | 47.0 ± 2.0 | 3 |",
        "| TAM | **45.0 ± 0.0** (+3.0) | 50.0 (-2.0) [n = 1] | <u>47.5</u> (+0.5) [n = 1] | 2 |",
        "| Our own | 38.0 (-4.0) | **64.0** (+12.0) | **51.0** (+4.0) | 1 |",
        "",
        "± is the sample standard deviation over n seeds. In parentheses: difference from AdamW. "
        "**Best**, <u>second best</u>.",
        "",
    ]


def test_tables_2_and_3() -> None:
    assert table(methods(), "table2")[2:8] == [
        "| method | cloze, % ↑ | retention, % ↑ | general perplexity ↓ | n |",
        "|---|---:|---:|---:|---:|",
        "| Base | 80.0 | 100.0 | 20.00 | 1 |",
        "| AdamW | 62.0 ± 2.0 | 77.5 ± 2.5 | 20.90 ± 0.10 | 3 |",
        "| TAM | <u>70.0 ± 0.0</u> | <u>87.5 ± 0.0</u> | <u>20.40 ± 0.00</u> | 2 |",
        "| Our own | **75.0** | **93.8** | **20.00** | 1 |",
    ]
    assert table(methods(), "table3")[4:7] == [
        "| AdamW | 5.00 ± 0.00 | +0.90 ± 0.10 | 3 |",
        "| TAM | <u>4.00 ± 0.00</u> | <u>+0.40 ± 0.00</u> | 2 |",
        "| Our own | **3.00** | **+0.00** | 1 |",
    ]


def test_stability_and_efficiency() -> None:
    assert (
        table(methods(), "stability")[6]
        == "| Our own | 0.1000 | 1.00e-02 | 0.200 | 1.0 | 0.0 | 1 |"
    )
    assert table(methods(), "efficiency")[6] == "| Our own | 0.500 | 4.0 | 50.0 | <u>54.0</u> | 1 |"
    assert "| AdamW | 0.500 ± 0.000 | – | 50.0 ± 0.0 |" in table(methods(), "efficiency")[4]


def test_variants_are_lines_in_order() -> None:
    rows = [
        row("ours", tables=("angles",), variant=v, evaluation=entry(a, 0.5, 0.7, 0.1, 1.0))
        for v, a in (("90", 0.3), ("", 0.4), ("100", 0.1), ("30", 0.2))
    ]
    lines = table(rows, "table5")
    assert lines[0] == "## Table 5: the largest angle"
    assert [line.split(" | ")[0] for line in lines[4:8]] == ["| 30", "| 45", "| 90", "| 100"]
    assert lines[5] == "| 45 | **40.0** | 50.0 | **45.0** | 87.5 | 0.1000 | 1 |"


def test_bases_and_sizes_never_meet() -> None:
    """Each has its own reference and tasks; in the remedies' table each line names its own."""
    rows = [
        row(m, seed=s, base=b, size="1M", tables=("methods", "remedies"),
            evaluation=entry(shop + 0.02 * s, 0.5, 0.7, change + 0.1 * s, 1.0))
        for b, m, shop, change in (
            ("a", "AdamW", 0.1, 1.0), ("b", "AdamW", 0.5, 2.0),
            ("a", "ours", 0.2, 0.5), ("b", "ours", 0.5, 1.0),
        )
        for s in range(2)
    ]  # fmt: skip
    tables = {t.base: markdown_table(t) for t in paper_tables(rows) if t.name == "table1"}
    assert "(+10.0)" in tables["a"][5]
    assert "(+0.0)" in tables["b"][5]
    lines = table(rows, "remedies")
    assert lines[2].startswith("| base | size | method | domain mean, % ↑ | ΔPPL ↓ |")
    # half-width of two seeds: 12.7062 · s / √2, s / √2 = half their distance
    assert lines[4].startswith("| a | 1M | AdamW | 30.5 [24.1, 36.9] | +1.05 [+0.41, +1.69] |")
    assert lines[5].endswith("| +5.0 [+5.0, +5.0] | -0.50 [-0.50, -0.50] | 2 |")
    assert lines[6].startswith("| b | 1M | AdamW | 50.5 [44.1, 56.9] |")
    assert lines[7].endswith("| +0.0 [+0.0, +0.0] | -1.00 [-1.00, -1.00] | 2 |")
    assert not any("**" in line for line in lines[:8])


def sweep() -> list[Row]:
    """AdamW from 20 to 60 per cent with ΔPPL 1 to 5; ours from 30 to 70 with 1 to 3; a point."""
    curves = {"AdamW": ((0.2, 1.0), (0.6, 5.0)), "ours": ((0.3, 1.0), (0.7, 3.0))}
    curves |= {"one": ((0.4, 2.0),), "low": ((0.15, 2.0),), "worse": ((0.0, 1.0), (0.1, 2.0))}
    return [
        row(m, seed=s, lr=lr, tables=("sweep",), evaluation=entry(x, x, 0.5, y, 1.0), **OF)
        for m, points in curves.items()
        for lr, (x, y) in zip((1e-4, 2e-4), points, strict=False)
        for s in range(2)
    ] + [base_row(entry(0.1, 0.1, 0.8, 0.0, 0.0), command="evaluate", **OF)]


def test_sweeps_are_compared_as_curves() -> None:
    assert table(sweep(), "sweep")[2:6] == [
        "| method | learning rate | domain mean, % | domain gain, points | ΔPPL | relative L2, % "
        "| n |",
        "|---|---|---:|---:|---:|---:|---:|",
        "| AdamW | 0.0001 | 20.0 ± 0.0 | +10.0 ± 0.0 | +1.00 ± 0.00 | 1.00 ± 0.00 | 2 |",
        "| AdamW | 0.0002 | 60.0 ± 0.0 | +50.0 ± 0.0 | +5.00 ± 0.00 | 1.00 ± 0.00 | 2 |",
    ]
    found = {(c.method, c.at and round(c.at, 6)): c for c in compare_curves(sweep())}
    # both reach 30 to 60: at 45, ours has 1.75 and AdamW 3.5
    differences = [found["ours", at].difference for at in (37.5, 45.0, 52.5)]
    assert [d and d.mean for d in differences] == pytest.approx([-1.375, -1.75, -2.125])
    one = found["one", 40.0]
    assert one.own_score
    assert one.difference is not None
    assert one.difference.mean == pytest.approx(-1.0)
    assert found["low", 15.0].difference is None
    assert found["worse", None].why_not == "no score that both reach with every seed"
    asked = [c for c in compare_curves(sweep(), at_scores=[65.0]) if c.method == "ours"]
    assert [(c.difference, c.why_not) for c in asked] == [(None, "not reached by every seed")]
    assert compare_curves(methods()) == []


def test_a_point_has_the_mean_score_of_the_seeds_that_are_compared() -> None:
    """Seed 2, which no other method has, scores 90."""
    more = row(
        "one", seed=2, lr=1e-4, tables=("sweep",), evaluation=entry(0.9, 0.9, 0.5, 9, 1), **OF
    )
    [found] = [c for c in compare_curves([*sweep(), more]) if c.method == "one"]
    assert found.at == pytest.approx(40.0)
    assert found.difference is not None
    assert (found.difference.mean, found.difference.n) == (pytest.approx(-1.0), 2)


def test_the_domain_mean_is_one_in_every_table_and_curve(tmp_path: Path) -> None:
    """A task that only the base, or a row of another table, was evaluated on leaves it none."""
    choice = {"accuracy": 0.5, "standard_error": 0.02, "general": False}
    position = row("ours", tables=("positions",), evaluation=entry(0.4, 0.5, 0.7, 0.1, 1.0), **OF)
    for table_of in ("positions", "sweep"):
        rows = [*methods(), *sweep(), position]
        more = base_row(
            entry(0.1, 0.1, 0.8, 0.0, 0.0), tables=(table_of,), command="evaluate", **OF
        )
        more.evaluation["choices"]["more"] = choice
        rows.append(more)
        assert not any(
            column.quantity.title == "domain mean, %" and any(
                line.cells[i].value for line in made.lines if not line.is_base
            )
            for made in paper_tables(rows) for i, column in enumerate(made.columns)
        )  # fmt: skip
        assert {c.why_not for c in compare_curves(rows)} == {
            "no score that both reach with every seed",
            "the reference does not reach its score with every seed",
        }
        assert "pareto-1M.png" not in draw_figures(rows, tmp_path)


def test_a_variant_is_compared_with_its_own_reference() -> None:
    """Trained on less, say, AdamW is worse: so is what it is compared with."""
    less = [
        replace(r, variant="less", evaluation=entry(0.15, 0.15, 0.5, 9.0, 1.0)) for r in sweep()
    ]
    less = [r for r in less if not r.is_base]
    rows = [
        replace(r, tables=("sweep", "remedies")) for r in sweep() + less if r.lr in (1e-4, None)
    ]
    line = next(line for line in table(rows, "remedies") if "| ours, less |" in line)
    assert line.startswith("| small | 1M | ours, less | 15.0 [15.0, 15.0] | +9.00")
    assert line.endswith("| +0.0 [+0.0, +0.0] | +0.00 [+0.00, +0.00] | 2 |")
    against = {c.method: c.reference for c in compare_curves(sweep() + less)}
    assert against["ours"] == against["one"] == "AdamW"
    assert against["ours, less"] == against["one, less"] == "AdamW, less"
    assert "AdamW, less" not in against


def test_two_runs_in_one_line_are_refused() -> None:
    rows = methods()
    assert table([*rows, rows[0]], "table1") == table(rows, "table1")  # the same run, listed twice
    with pytest.raises(DataError, match=r"AdamW, small, 1M, seed 0: two runs.* 0\.0002 and 0\.1"):
        paper_tables([*rows, row("AdamW", lr=0.1, evaluation=rows[0].evaluation, **OF)])


def test_everything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    for one in methods() + sweep():
        append_row(rows, one)
    output = tmp_path / "out"
    assert report.main(["tables", f"--rows={rows}", f"--output-dir={output}", "--no-figures"]) == 0
    text = (output / "tables.md").read_text()
    shown, _, last = capsys.readouterr().out.rstrip("\n").rpartition("\n")
    assert shown in text
    assert "| **51.0** (+4.0) | 1 |" in shown
    assert "`train AdamW`" not in shown  # a terminal's reader wants the numbers
    assert last.startswith(f"{output / 'tables.md'}: ")
    assert "| **51.0** (+4.0) | 1 |" in text
    assert "| small | 1M | ours | AdamW | 45.0 | -1.75 [-1.75, -1.75] | 2 |" in text
    assert "| low | AdamW | 15.0 (its own) | the reference does not reach its score" in text
    assert (
        "- AdamW, small, 1M (in table1, table2, table3, table6, stability, efficiency; loss full; "
        "adamw, learning rate 0.0002; seeds 0, 1, 2; configuration `4164616d574e`): `train AdamW`"
    ) in text
    with (output / "table1.csv").open() as handle:
        lines = list(csv.DictReader(handle))
    assert float(lines[2]["shop difference"]) == pytest.approx(3.0)
    assert float(lines[1]["domain_mean std"]) == pytest.approx(2.0)
    assert (lines[1]["lr"], lines[1]["n"], lines[1]["command"]) == ("0.0002", "3", "train AdamW")
    document = json.loads((output / "tables.json").read_text())
    shop = document["tables"][0]["lines"][1]["cells"]["shop"]
    assert shop["values"] == [40.0, 42.0, 44.0]
    assert shop["half_width_95"] == pytest.approx(4.30265 * 2 / 3**0.5, rel=1e-5)
    assert document["curves"][0]["difference"]["n"] == 2
    assert len(document["tables"][0]["lines"][1]["config_hashes"][0]) == 64


def test_a_perplexity_of_the_domain_is_in_no_mean() -> None:
    """It has a column of its own, where less is better; files from before had no directions."""
    rows = []
    for method, perplexity in (("AdamW", 9.0), ("TAM", 30.0)):
        result = {"score": perplexity, "metric": "word_perplexity,none", "general": False}
        tasks = {"wiki": result | {"higher_is_better": False, "share": False}}
        tasks["old"] = {"score": 0.6, "metric": "acc,none", "general": False}
        rows.append(row(method, evaluation=entry(0.4, 0.5, 0.7, 0.1, 1.0, lm_eval=tasks)))
    assert table(rows, "table1")[2:6] == [
        "| method | shop, % ↑ | quiz, % ↑ | old, % ↑ | wiki, word_perplexity ↓ | domain mean, % ↑ "
        "| n |",
        "|---|---:|---:|---:|---:|---:|---:|",
        "| AdamW | 40.0 | 50.0 | 60.0 | **9.000** | 50.0 | 1 |",
        "| TAM | 40.0 (+0.0) | 50.0 (+0.0) | 60.0 (+0.0) | <u>30.000</u> (+21.000) | 50.0 (+0.0) "
        "| 1 |",
    ]
    [made] = [t for t in paper_tables(rows) if t.name == "table1"]
    assert made.columns[3].name == "wiki word_perplexity"


def test_a_task_may_be_called_domain() -> None:
    values = entry(0.4, 0.5, 0.7, 0.1, 1.0)
    values["choices"]["domain"] = {"accuracy": 0.9, "standard_error": 0.02, "general": False}
    [made] = [t for t in paper_tables([row("m", evaluation=values)]) if t.name == "table1"]
    [line] = to_json(made)["lines"]
    means = {name: cell["mean"] for name, cell in line["cells"].items()}
    assert means == pytest.approx({"shop": 40, "quiz": 50, "domain": 90, "domain_mean": 60})
    [line] = csv.DictReader(to_csv([made]).splitlines())
    assert (float(line["domain"]), float(line["domain_mean"])) == pytest.approx((90, 60))


def test_the_seeds_of_a_line_are_those_of_all_its_tables() -> None:
    """Methods with seeds 0 to 2, remedies with 0 to 4: one line, five seeds."""
    values = entry(0.4, 0.5, 0.7, 0.1, 1.0)
    rows = [
        row("AdamW", seed=s, evaluation=values, **OF,
            tables=("methods", "remedies") if s < 3 else ("remedies",))
        for s in range(5)
    ]  # fmt: skip
    made = [t for t in paper_tables(rows) if t.name in ("table1", "remedies")]
    assert [len(t.lines[0].rows) for t in made] == [3, 5]
    [line] = [line for line in sources(made) if line.startswith("- ")]
    assert "(in table1, remedies; " in line
    assert "; seeds 0, 1, 2, 3, 4; " in line


def test_the_row_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", steps())
    config = "loss: {loss: full}\noptimizer: {lr: 0.1, optimizer: adamw, lr_warmup_iters: 1}\n"
    (run / "resolved_config.yaml").write_text(config + "training: {seed: 7}\n")
    rows, of = tmp_path / "rows.jsonl", ["--base=small", "--size=1M"]
    given = ["row", f"--evaluation={evaluation_file(tmp_path)}", f"--rows={rows}", *of]
    replay = ["--model=replay", f"--run={run}", "--method=Replay", "--table=methods"]
    assert report.main([*given, "--model=base"]) == 0
    assert report.main([*given, *replay, "--table=sweep"]) == 0
    assert capsys.readouterr().out == f"{rows}: Base, seed 0\n{rows}: Replay, seed 7\n"
    base, other = read_rows(rows)
    assert (base.is_base, base.base, base.size) == (True, "small", "1M")
    assert (other.tables, other.seed, other.lr) == (("methods", "sweep"), 7, 0.1)
    command = f"python -m megatron_replay.stage1 --config {run / 'resolved_config.yaml'}"
    assert other.command == command
    for wrong, message in (
        (["--model=none"], "--model: no such model in the evaluation (expected base or"),
        (["--model=base", "--method=x"], "--method is of a run: --run is missing"),
        (replay[:2], "a run's row needs --method and --table"),
    ):
        assert report.main([*given, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert (
        report.main(["tables", f"--rows={rows}", "--reference=x", f"--output-dir={tmp_path}"]) == 2
    )
    assert "--reference: no row of this method (expected Base or Replay" in capsys.readouterr().err


def test_without_a_gain_no_price_of_one() -> None:
    """Curves from 20 to 60 per cent: all of it, its upper half, and nothing above the base."""

    def found(base_score: float, *, points: int = 2) -> list[CurveComparison]:
        rows = [
            row(m, seed=s, lr=lr, tables=("sweep",), evaluation=entry(x, x, 0.5, 10 * x, 1.0), **OF)
            for m in ("AdamW", "ours")
            for lr, x in ((1e-4, 0.2), (2e-4, 0.6))[: points if m == "ours" else 2]
            for s in range(2)
        ]
        base = base_row(entry(base_score, base_score, 0.8, 0.0, 0.0), command="evaluate", **OF)
        return [one for one in compare_curves([*rows, base]) if one.method == "ours"]

    assert [one.at for one in found(0.1)] == pytest.approx([30, 40, 50])
    assert [one.at for one in found(0.4)] == pytest.approx([45, 50, 55])
    (none,) = found(0.6)
    assert (none.difference, none.why_not) == (
        None, "no gain over the base that both reach with every seed",
    )  # fmt: skip
    (alone,) = found(0.2, points=1)
    assert (alone.at, alone.difference, alone.why_not) == (20.0, None, "no gain over the base")


def test_the_figures(tmp_path: Path) -> None:
    """Each is drawn where its rows are there; its paper is neither blank nor black."""
    kinds = (("positions", "all"), ("positions", ""), ("angles", "30"), ("angles", ""))
    rows = methods() + sweep()
    rows += [
        row("ours", seed=s, tables=(kind,), variant=variant, **OF,
            evaluation=entry(0.4 + 0.01 * s, 0.5, 0.7, 0.1, 1.0))
        for kind, variant in kinds for s in range(2)
    ]  # fmt: skip
    of_base = [f"figure{number}-small-1M.png" for number in (2, 3, 4)]
    assert draw_figures(rows, tmp_path) == [*of_base, "pareto-1M.png"]
    for name in (*of_base, "pareto-1M.png"):
        image = imread(tmp_path / name)
        assert image.shape[1] >= 1000
        assert 0.01 < (image[..., :3].min(-1) < 0.9).mean() < 0.5
    high = imread(tmp_path / of_base[-1]).shape[0]
    draw_figures([one for one in rows if one.variant == ""], tmp_path)
    assert imread(tmp_path / of_base[-1]).shape[0] < high  # nothing varies: two panels fewer
    assert draw_figures([one for one in rows if one.method in ("Base", "TAM")], tmp_path) == []


def test_earlier_tables_are_replaced_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    for one in methods():
        append_row(rows, one)
    given = ["tables", f"--rows={rows}", f"--output-dir={out}"]
    out.mkdir()
    mine = out / "figure2-small-1M.png"
    mine.write_bytes(b"mine")
    assert report.main(given) == 6
    assert "out: these files are not from an earlier report" in capsys.readouterr().err
    assert [path.read_bytes() for path in out.iterdir()] == [b"mine"]
    mine.unlink()
    assert report.main([*given, "--no-figures"]) == 0
    (out / "tables.json").unlink()  # tables.md alone is enough
    assert report.main([*given, "--no-figures"]) == 0
    table = rows.rename(out / "table1.csv")
    assert report.main(["tables", f"--rows={table}", f"--output-dir={out}"]) == 2
    assert "the output is also read, as --rows" in capsys.readouterr().err


def test_axes_of_scores() -> None:
    assert score_limits((20.0, 60.0)) == (20.0, 60.0)
    assert score_limits((-5.0, 60.0)) == (pytest.approx(-1.8), 60.0)
    assert score_limits((-0.05, 0.05)) == (pytest.approx(-0.03), 1.0)


def test_numbers_that_are_not_finite() -> None:
    """What is no number is neither best nor second, wherever its line stands."""
    changes = {"AdamW": (math.inf, 1.0), "MoFO": (math.nan, 1.0), "TAM": (math.nan,)}
    rows = [row(method, seed=s, evaluation=entry(0.1, 0.1, 0.1, v, 1.0))
            for method, values in changes.items() for s, v in enumerate(values)]  # fmt: skip
    rows.append(row("calm", run={**RUN, "loss_std": None}, evaluation=entry(0.1, 0.1, 0.1, 1, 1)))
    assert table(rows, "table3")[4:8] == [
        "| AdamW | 1.00 ± 0.00 | <u>∞</u> | 2 |",
        "| MoFO | 1.00 ± 0.00 | – | 2 |",
        "| TAM | 1.00 | – | 1 |",
        "| calm | 1.00 | **+1.00** | 1 |",
    ]
