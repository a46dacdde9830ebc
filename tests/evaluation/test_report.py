"""tools/report.py: its tables, its figure, and one line for each mistake."""

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
from megatron_replay.evaluation.report import COLOURS, build_report, render_markdown
from megatron_replay.evaluation.results import read_evaluation
from tests.markdown import table
from tests.test_run_log import STABILITY, steps, write_run
from tools import report


def method(name: str, accuracy: float, change: float, l2: float, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "path": f"runs/{name}",
        "sha256": "0" * 64,
        "key": name,
        "sql": {"shop.v1": {"accuracy": accuracy, "standard_error": 0.03, "questions": 200}},
        "choices": {"cloze": {"accuracy": 0.5, "standard_error": 0.02, "general": True}},
        "general": {"perplexity": 20 + change, "delta_perplexity": change, "tokens": 10},
        "relative_l2_percent": l2,
        **more,
    }


def rendered(*models: dict[str, Any]) -> str:
    evaluation = {"models": models, "inputs": {}, "settings": {}, "command": "evaluate"}
    return render_markdown(build_report(evaluation, {}, timings={}, command="report"))


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (
            {"failures": {"other answer": 1, "sql error": 1}, "unfinished": 3, "empty_gold": 2},
            "1 other answer, 1 sql error (3 cut off, 2 left out)",
        ),
        ({"failures": {"timeout": 2}, "unfinished": 0, "empty_gold": 0}, "2 timeout"),
        ({"failures": {}, "unfinished": 0, "empty_gold": 2}, "– (2 left out)"),
    ],
)
def test_the_reasons_of_failed_queries_are_counted(found: dict[str, Any], reason: str) -> None:
    scored = {"accuracy": 0.5, "standard_error": 0.1, "questions": 4}
    text = rendered(method("m", 0.0, 0.0, 0.0, sql={"shop": scored | found}))
    (line,) = table(text, "What it gained")
    assert (line["questions"], line["failure reason"]) == ("4", reason)


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(models=3), "models: of another type"),
        (lambda d: d.update(models=[]), "models: damaged: no results"),
        (lambda d: d.update(models=[3]), r"models\[0\]: of another type .*an object; found 3"),
        (lambda d: d.update(kept=[{}]), r"kept\[0\]: 'key' is missing"),
        (lambda d: d.update(command=3), "command: of another type .*a string; found 3"),
        (lambda d: d.update(settings=[]), "settings: of another type"),
        (lambda d: d.update(inputs={"a": {"path": 1}}), "inputs: a: 'sha256' is missing"),
        (lambda d: d.pop("inputs"), "'inputs' is missing"),
        (lambda d: d.pop("format"), "not an evaluation"),
        (lambda d: d["models"][1].pop("name"), r"models\[1\]: 'name' is missing"),
        (lambda d: d["models"][1].update(name=3), r"models\[1\]: name: of another type"),
        (
            lambda d: d["models"][0].update(relative_l2_percent=None),
            "l2_percent: of another",
        ),
        (lambda d: d["models"][0].update(sql=3), r"models\[0\]: sql: of another type"),
        (lambda d: d["models"][0].update(sql={"a": 3}), "sql: a: of another type"),
        (lambda d: d["models"][0].update(sql={"a": {}}), "sql: a: 'accuracy' is missing"),
        (
            lambda d: d["models"][0]["sql"]["shop.v1"].update(accuracy="x"),
            "v1: accuracy: of",
        ),
        (lambda d: d["models"][0]["sql"]["shop.v1"].update(questions=0.5), "questions: of another"),
        (
            lambda d: d["models"][0]["sql"]["shop.v1"].update(failures={"a": []}),
            "failures: a: of",
        ),
        (
            lambda d: d["models"][0]["choices"]["cloze"].update(general=2),
            "cloze: general: of",
        ),
        (lambda d: d["models"][0].update(general=True), r"models\[0\]: general: of another"),
        (lambda d: d["models"][0]["general"].pop("perplexity"), "'perplexity' is missing"),
        (lambda d: d["models"][0].update(lm_eval={"t": {"score": 1}}), "t: 'metric' is missing"),
        (
            lambda d: d["models"][0]["general"].update(loss=10**400),
            "general: loss: of another type",
        ),
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
    last = {"iteration": 40, "stability": STABILITY}
    run = write_run(tmp_path / "run", [*steps(), last])
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
    _, full, *_ = table(text, "What it gained")
    assert (full["shop.v1 %"], full["questions"]) == ("21.0 ± 3.0", "200")
    assert "data next token %" not in full  # not measured: no column
    *_, replay, ghost = table(text, "What it kept")
    assert (replay["cloze %"], replay["Δ perplexity"]) == ("50.0 ± 2.0", "+0.30")
    assert (replay["relative L2 %"], replay["outside mass %"]) == ("1.57", "7.00")
    assert (ghost["method"], ghost["outside mass %"]) == (r"replay\|ghost", "–")
    (cost,) = table(text, "What it cost")
    assert cost == {"method": "full softmax", "iterations": "40", "tokens": "4,820",
                    "seconds": "20.0", "tokens/s": "241", "waiting for data %": "4.10"}  # fmt: skip
    (steady,) = table(text, "How steady it was")
    assert (steady["final loss"], steady["loss std"]) == ("2.6150", "0.2500")
    assert table(text, "Time of the parts")[-1] == {"part": "all", "seconds": "192.2"}
    for source in ("python tools/evaluate.py --base runs/base", "python tools/report.py",
                   str(run / "resolved_config.yaml")):  # fmt: skip
        assert source in text
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
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
