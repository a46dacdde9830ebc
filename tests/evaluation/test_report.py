"""tools/report.py: numbers of the run against numpy, tables, mistakes, and a figure."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from megatron_replay.errors import DataError
from megatron_replay.evaluation.figure import COLOURS
from megatron_replay.evaluation.report import build_report, render_markdown
from megatron_replay.evaluation.suite import read_evaluation
from megatron_replay.run_log import summarize_run
from tools import report


def method(name: str, accuracy: float, change: float, l2: float, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "path": f"runs/{name}",
        "sha256": "0" * 64,
        "key": name,
        "sql": {"shop.v1": {"accuracy": accuracy, "standard_error": 0.03, "questions": 200}},
        "choices": {"cloze": {"accuracy": 0.5, "standard_error": 0.02, "general": True}},
        "task": {"perplexity": 1.5, "loss": 0.4, "accuracy": 0.9, "tokens": 10},
        "general": {"perplexity": 20 + change, "delta_perplexity": change, "tokens": 10},
        "relative_l2_percent": l2,
        **more,
    }


def test_a_perplexity_of_a_task_keeps_its_unit() -> None:
    wiki = {"score": 9.0, "metric": "word_perplexity,none", "standard_error": None,
            "higher_is_better": False, "share": False, "general": False}  # fmt: skip
    old = {"score": 0.25, "metric": "acc,none", "standard_error": 0.02, "general": False}
    tuned = {"wiki": wiki | {"score": 30.0, "standard_error": 0.5}, "old": old}
    evaluation = {
        "models": [
            method("base", 0.02, 0.0, 0.0, lm_eval={"wiki": wiki, "old": old}),
            method("tuned", 0.21, 0.6, 3.07, lm_eval=tuned),
        ],
        "inputs": {}, "settings": {}, "command": "evaluate",
    }  # fmt: skip
    text = render_markdown(build_report(evaluation, {}, timings={}, command="report"))
    assert "| shop.v1 % | questions | wiki word_perplexity ↓ | old % |" in text
    assert "| 200 | 9.000 | 25.0 ± 2.0 |" in text
    assert "| 200 | 30.000 ± 0.500 | 25.0 ± 2.0 |" in text


def test_why_queries_failed_is_told() -> None:
    scored = {"accuracy": 0.5, "standard_error": 0.1, "questions": 4}
    found = (
        {"failures": {"other answer": 1, "sql error": 1}, "unfinished": 3, "empty_gold": 2},
        {"failures": {"timeout": 2}, "unfinished": 0, "empty_gold": 0},
        {"failures": {}, "unfinished": 0, "empty_gold": 2},
    )
    models = [
        method(str(i), 0.0, 0.0, 0.0, sql={"shop": scored | one}) for i, one in enumerate(found)
    ]
    evaluation = {"models": models, "inputs": {}, "settings": {}, "command": "evaluate"}
    text = render_markdown(build_report(evaluation, {}, timings={}, command="report"))
    assert "| shop % | questions | failure reason |" in text
    assert "| 4 | 1 other answer, 1 sql error (3 cut off, 2 left out) |" in text
    assert "| 4 | 2 timeout |" in text
    assert "| 4 | – (2 left out) |" in text


def evaluation_file(directory: Path) -> Path:
    mass = {"outside_mass": 0.07, "restricted_loss": 0.1, "full_loss": 0.2}
    document = {
        "format": 2,
        "command": "python tools/evaluate.py --base runs/base",
        "settings": {},
        "inputs": {"general_text": {"path": "heldout.jsonl", "sha256": "ab" * 32}},
        "models": [
            method("base", 0.02, 0.0, 0.0),
            method("full softmax", 0.21, 0.6, 3.07),
            method("replay", 0.195, 0.3, 1.57, candidates=mass),
            method("replay|ghost", 0.2, 0.31, 1.6),
        ],
    }
    path = directory / "eval.json"
    path.write_text(json.dumps(document))
    return path


def write_run(directory: Path, lines: list[dict[str, Any]], *, warmup: int = 10) -> Path:
    directory.mkdir()
    (directory / "resolved_config.yaml").write_text(f"optimizer:\n  lr_warmup_iters: {warmup}\n")
    (directory / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return directory


def steps(count: int = 40) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {
            "iteration": i,
            "loss": 3 - 0.05 * i + 0.1 * rng.normal(),
            "grad_norm": 1 + 0.2 * rng.random(),
            "lr": 1e-3,
            "tokens": 100 + i,
            "seconds": 0.5,
        }
        for i in range(1, count + 1)
    ]


def test_run_summary_against_numpy(tmp_path: Path) -> None:
    lines = steps()
    probe = {"outside_mass": 0.01, "restricted_loss": 0.1, "full_loss": 0.11}
    summary = summarize_run(
        write_run(tmp_path / "run", [*lines, {"iteration": 40, "probe": probe}])
    )
    assert (summary.iterations, summary.logged, summary.non_finite) == (40, 40, 0)
    assert summary.tokens == sum(100 + i for i in range(1, 41))
    assert summary.seconds == pytest.approx(20.0)
    assert summary.tokens_per_second == pytest.approx(summary.tokens / 20)
    assert summary.data_wait_share is None
    last = np.array([line["loss"] for line in lines[20:]])
    line = np.polyval(np.polyfit(np.arange(20), last, 1), np.arange(20))
    assert summary.loss_std == pytest.approx((last - line).std(), rel=1e-9)  # of the steps: ddof 0
    assert summary.loss_variance == pytest.approx(summary.loss_std**2)
    norms = np.array([line["grad_norm"] for line in lines[10:]])  # after the warm-up
    assert summary.gradient_norm_cv == pytest.approx(norms.std() / norms.mean())
    assert summary.final_loss == pytest.approx(last[-4:].mean())
    assert summary.probes == [{"iteration": 40, "probe": probe}]
    assert summary.loss_spikes is summary.gradient_spike_rate is None  # too short to judge
    assert summary.relative_l2 is summary.general_perplexity is summary.delta_ppl is None


def test_the_share_of_waiting_for_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = steps()
    for line in lines:
        line["data_wait_seconds"] = 0.001 * line["iteration"]
    run = write_run(tmp_path / "run", lines)
    assert summarize_run(run).data_wait_share == pytest.approx(0.82 / 20)
    given = [f"--evaluation={evaluation_file(tmp_path)}", f"--run=replay={run}"]
    assert report.main([*given, f"--output-dir={tmp_path}"]) == 0
    text = capsys.readouterr().out
    assert "| waiting for data % |" in text
    assert "| 4.10 |" in text


def test_spikes(tmp_path: Path) -> None:
    lines = steps(200)
    lines[150]["loss"] += 1000
    summary = summarize_run(write_run(tmp_path / "run", lines))
    assert (summary.loss_spikes, summary.gradient_spikes) == (1, 0)
    assert (summary.loss_spike_rate, summary.gradient_spike_rate) == (1 / 72, 0.0)


def test_warm_up_is_told_by_iteration(tmp_path: Path) -> None:
    """Of lines 2, 4, ... 40, five lie in ten iterations of warm-up; a null is not one of them."""
    lines = steps()[1::2]
    lines[1] |= {"loss": None, "grad_norm": None}
    norms = np.array([line["grad_norm"] for line in lines[5:]])
    summary = summarize_run(write_run(tmp_path / "run", lines))
    assert summary.gradient_norm_cv == pytest.approx(norms.std() / norms.mean())
    all_warmup = summarize_run(write_run(tmp_path / "short", lines, warmup=40))
    assert all_warmup.gradient_norm_cv is None


def test_the_last_readings_of_a_run_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = steps()
    for at, distance, perplexity in ((40, 0.0123, 21.5), (20, 0.01, 20.0), (0, None, 19.25)):
        general = {"perplexity": perplexity, "delta_ppl": perplexity - 19.25, "sample": "5" * 16}
        more = {} if distance is None else {"relative_l2": distance}
        lines.insert(at, {"iteration": at, "general": general, **more})
    run = write_run(tmp_path / "run", lines)
    summary = summarize_run(run)
    assert (summary.relative_l2, summary.general_perplexity, summary.delta_ppl) == (
        0.0123, 21.5, 2.25,
    )  # fmt: skip
    evaluation = evaluation_file(tmp_path)
    given = [f"--evaluation={evaluation}", f"--run=replay={run}", f"--output-dir={tmp_path}"]
    assert report.main(given) == 0
    text = capsys.readouterr().out
    assert "| run: relative L2 % | run: general perplexity | run: Δ perplexity |" in text
    assert "| 0.2000 | 1.23 | 21.50 | +2.25 |" in text
    assert f"| {summary.loss_std:.4f} | {summary.loss_variance:.3g} |" in text


def test_totals_are_not_guessed_and_null_is_counted(tmp_path: Path) -> None:
    lines = steps(60)
    lines[7] |= {"loss": None, "grad_norm": None}
    assert summarize_run(write_run(tmp_path / "a", lines)).non_finite == 1
    every_second = summarize_run(write_run(tmp_path / "b", lines[1::2]))
    assert (every_second.iterations, every_second.logged) == (60, 30)
    assert every_second.tokens is None
    assert every_second.seconds is None


def test_damaged_runs_are_refused(tmp_path: Path) -> None:
    torn = write_run(tmp_path / "torn", steps())
    with open(torn / "metrics.jsonl", "a") as handle:
        handle.write('{"iteration": 41, "lo')
    with pytest.raises(DataError, match=r"metrics\.jsonl:41: not a line of metrics"):
        summarize_run(torn)
    with pytest.raises(DataError, match=r"metrics\.jsonl:3: iterations go backwards"):
        summarize_run(write_run(tmp_path / "back", [*steps(2), *steps(1)]))
    with pytest.raises(DataError, match="no 'grad_norm' in the line of iteration 1"):
        summarize_run(write_run(tmp_path / "less", [{"iteration": 1, "loss": 1.0}]))
    bomb = "a: {x: &a0 [1]}\n"
    bomb += "".join(f"b{i}: {{x: &a{i} [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 60))
    for content, message in (
        (b"optimizer: {lr: 1.0}\n", "the warm-up, which the gradient norm's CV leaves out"),
        (b"optimizer: {lr_warmup_iters: .inf}\n", "the warm-up, which"),
        (b"- 1\n", "not a resolved configuration"),
        (b"", "not a resolved configuration"),
        (b"optimizer: {1: 2}\n", "not a resolved configuration"),
        (b"optimizer: {lr: 2020-01-01}\n", "not a resolved configuration"),
        (bomb.encode(), "not a resolved configuration"),
        (b"optimizer: [\n", "not YAML"),
        (b"[" * 1_000, "not YAML"),
        (b"optimizer: \xff", "not UTF-8"),
    ):
        damaged = write_run(tmp_path / f"damaged {message} {len(content)}", steps())
        (damaged / "resolved_config.yaml").write_bytes(content)
        with pytest.raises(DataError, match=f"resolved_config.yaml: .*{message}"):
            summarize_run(damaged)
    with pytest.raises(DataError, match="no training step is logged"):
        summarize_run(write_run(tmp_path / "empty", []))
    with pytest.raises(DataError, match="is this a run's directory"):
        summarize_run(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iteration": "1"}, "not a line of metrics"),
        ({"iteration": None}, "not a line of metrics"),
        ({"general": [1]}, "not a line of metrics"),
        ({"general": {"perplexity": "low"}}, "not a line of metrics"),
        ({"probe": 3}, "not a line of metrics"),
        ({"relative_l2": True}, "not a line of metrics"),
        ({"loss": "low"}, "'loss' is no number in the line of iteration 40"),
        ({"grad_norm": [1.0]}, "'grad_norm' is no number"),
        ({"grad_norm": 10**400}, "'grad_norm' is no number"),
        ({"tokens": None}, "the lines' 'tokens' have no sum"),
        ({"seconds": -1e9}, "the lines' 'seconds' have no sum"),
        ({"data_wait_seconds": "x"}, "'data_wait_seconds' is no number"),
    ],
)
def test_damaged_lines_are_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    lines = [line | {"data_wait_seconds": 0.0} for line in steps()]
    run = write_run(tmp_path / "run", [*lines[:-1], lines[-1] | change])
    with pytest.raises(DataError, match=f"metrics.jsonl.*{message}"):
        summarize_run(run)


def test_odd_bytes_in_the_metrics_are_one_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps())
    for content in (b"[1]\n", b"3\n", b"[" * 99_999, b"\xff\n", b'{"iteration": 1, "loss": NaN'):
        (run / "metrics.jsonl").write_bytes(content)
        with pytest.raises(DataError, match=r"metrics\.jsonl"):
            summarize_run(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(models=3), "models: damaged: no list of results"),
        (lambda d: d.update(models=[]), "models: damaged: no list of results"),
        (lambda d: d.update(models=[3]), r"models\[0\]: not an object"),
        (lambda d: d.update(kept=[{}]), r"kept\[0\]: 'key' is missing"),
        (lambda d: d.update(command=3), "'command' is of another type"),
        (lambda d: d.update(settings=[]), "settings: not an object"),
        (lambda d: d.update(inputs={"a": {"path": 1}}), "inputs: a: 'sha256' is missing"),
        (lambda d: d.pop("inputs"), "'inputs' is missing"),
        (lambda d: d.pop("format"), "not an evaluation"),
        (lambda d: d["models"][1].pop("name"), r"models\[1\]: 'name' is missing"),
        (lambda d: d["models"][1].update(name=3), r"models\[1\]: 'name' is of another type"),
        (lambda d: d["models"][0].update(relative_l2_percent=None), "'relative_l2_percent' is of"),
        (lambda d: d["models"][0].update(sql=3), r"models\[0\]: sql: not an object"),
        (lambda d: d["models"][0].update(sql={"a": 3}), "sql: a: not an object"),
        (lambda d: d["models"][0].update(sql={"a": {}}), "sql: a: 'accuracy' is missing"),
        (lambda d: d["models"][0]["sql"]["shop.v1"].update(accuracy="x"), "shop.v1: 'accuracy' is"),
        (lambda d: d["models"][0]["sql"]["shop.v1"].update(questions=0.5), "'questions' is of"),
        (lambda d: d["models"][0]["sql"]["shop.v1"].update(failures={"a": []}), "failures: 'a' is"),
        (lambda d: d["models"][0]["choices"]["cloze"].update(general=2), "cloze: 'general' is of"),
        (lambda d: d["models"][0].update(general=True), r"models\[0\]: general: not an object"),
        (lambda d: d["models"][0]["general"].pop("perplexity"), "'perplexity' is missing"),
        (lambda d: d["models"][0].update(retention={"cloze": "x"}), "retention: 'cloze' is of"),
        (lambda d: d["models"][0].update(lm_eval={"t": {"score": 1}}), "t: 'metric' is missing"),
        (lambda d: d["models"][0]["task"].update(loss=10**400), "task: 'loss' is of another type"),
    ],
)
def test_a_damaged_evaluation_is_one_line(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    path = evaluation_file(tmp_path)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match=rf"eval\.json.*{message}"):
        read_evaluation(path)


def test_the_whole_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", steps())
    timings = tmp_path / "timings.json"
    timings.write_text(json.dumps({"base": 180.25, "stage 0": 12}))
    flags = [
        f"--evaluation={evaluation_file(tmp_path)}",
        f"--run=full softmax={run}",
        f"--timings={timings}",
        f"--output-dir={tmp_path / 'out'}",
    ]
    assert report.main(flags) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert capsys.readouterr().out == text
    assert "| method | shop.v1 % | questions | task perplexity |" in text
    assert "| full softmax | 21.0 ± 3.0 | 200 | 1.500 |" in text
    assert "| replay | 50.0 ± 2.0 | 20.30 | +0.30 | 1.57 | 7.00 | 0.1000 | 0.2000 |" in text
    assert "| replay\\|ghost | 50.0 ± 2.0 | 20.31 | +0.31 | 1.60 | – | – | – |" in text
    assert "| full softmax | 40 | 4,820 | 20.0 | 241 |" in text
    assert "| all | 192.2 |" in text
    assert "next token" not in text  # not measured: no column
    assert "python tools/evaluate.py --base runs/base" in text
    assert "python tools/report.py --evaluation=" in text
    assert str(run / "resolved_config.yaml") in text
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert document["methods"][1]["run"]["iterations"] == 40
    image = imread(tmp_path / "out" / "report.png")
    assert image.shape[:2] == (700, 1600)
    assert 0.01 < (image[..., :3].min(-1) < 0.9).mean() < 0.5
    for colour in COLOURS[:4]:  # the methods have those of every other figure
        assert np.isclose(image[..., :3], to_rgb(colour), atol=0.003).all(-1).sum() > 50


@pytest.mark.parametrize(
    ("flag", "code", "message"),
    [
        ("--run=other={run}", 2, "the run 'other' was not evaluated"),
        ("--run=full softmax", 2, "expected NAME=DIR"),
        ("--timings={run}/metrics.jsonl", 3, "not JSON"),
        ("--timings={run}/../eval.json", 3, "not timings"),
        ("--evaluation={run}/metrics.jsonl", 3, "not JSON: Extra data"),
        ("--evaluation={run}/../pipe", 3, "expected a regular file; found a pipe"),
        ("--timings={run}/../pipe", 3, "expected a regular file; found a pipe"),
        ("--run=replay={run}/../pipes", 3, "expected a regular file; found a pipe"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, code: int, message: str
) -> None:
    run = write_run(tmp_path / "run", steps())
    write_run(tmp_path / "pipes", [])
    (tmp_path / "pipes" / "metrics.jsonl").unlink()
    os.mkfifo(tmp_path / "pipes" / "metrics.jsonl")
    os.mkfifo(tmp_path / "pipe")
    given = [f"--evaluation={evaluation_file(tmp_path)}", f"--output-dir={tmp_path / 'out'}"]
    assert report.main([*given, flag.format(run=run)]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_figure_needs_gain_and_forgetting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = evaluation_file(tmp_path)
    document = json.loads(path.read_text())
    for model in document["models"]:
        del model["general"]
    path.write_text(json.dumps(document))
    assert report.main([f"--evaluation={path}", f"--output-dir={tmp_path}"]) == 3
    assert "no gain against forgetting to draw" in capsys.readouterr().err
    assert not (tmp_path / "report.md").exists()


@pytest.mark.parametrize("damage", [{"sql": {}}, {"general": {"perplexity": 20.0}}])
def test_a_figure_of_models_that_were_measured_on_different_things(
    tmp_path: Path, damage: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = evaluation_file(tmp_path)
    document = json.loads(path.read_text())
    document["models"][2].update(damage)
    path.write_text(json.dumps(document))
    assert report.main([f"--evaluation={path}", f"--output-dir={tmp_path}/out"]) == 3
    assert "replay and base were measured on different things" in capsys.readouterr().err


def test_an_earlier_report_is_replaced_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "save", lambda _, path: path.write_bytes(b"drawn"))
    out = tmp_path / "out"
    given = [f"--evaluation={evaluation_file(tmp_path)}", f"--output-dir={out}"]
    assert report.main(given) == report.main(given) == 0
    (out / "report.json").unlink()  # report.md alone is enough
    assert report.main(given) == 0
    (out / "report.json").unlink()
    (out / "report.md").write_text("# Report\n\nmine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert report.main(given) == 6
    assert "out: these files are not from an earlier report of ours" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_no_output_is_an_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = evaluation_file(tmp_path).rename(tmp_path / "report.json")
    timings = tmp_path / "report.md"
    timings.write_text('{"a": 1}')
    other = tmp_path / "other.json"
    other.write_bytes(evaluation.read_bytes())
    for given, flag in (
        ([f"--evaluation={evaluation}", f"--output-dir={tmp_path}"], "--evaluation"),
        ([f"--evaluation={other}", f"--timings={timings}", f"--output-dir={tmp_path}"],
         "--timings"),
    ):  # fmt: skip
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert report.main(given) == 2
        assert f"the output is also read, as {flag}" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
