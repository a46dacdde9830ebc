"""tools/report.py: its tables, its figure, and one line for each mistake."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from megatron_replay.errors import DataError
from megatron_replay.evaluation.report import COLOURS, build_report, report_figure
from megatron_replay.evaluation.results import domain_mean, read_evaluation, scores
from tests.markdown import parsed, table
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


def evaluation_file(directory: Path, change: Any = lambda document: None) -> Path:
    mass = {"outside_mass": 0.07, "restricted_loss": 0.1, "full_loss": 0.2}
    failed = {"failures": {"other answer": 1, "sql error": 1}, "unfinished": 3, "empty_gold": 2}
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
    for model, found in zip(
        document["models"],
        (failed, {"failures": {"timeout": 2}, "unfinished": 0}, {"failures": {}, "empty_gold": 2}),
        strict=False,
    ):
        model["sql"]["shop.v1"] |= found
    change(document)
    path = directory / "eval.json"
    path.write_text(json.dumps(document))
    return path


def models(number: int, **values: Any) -> Any:
    return lambda document: document["models"][number].update(values)


def benchmark(kind: str, name: str, **values: Any) -> Any:
    return lambda document: document["models"][0][kind][name].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(models=3), r"models: .*expected a list; found 3"),
        (lambda d: d.update(models=[]), "models: damaged: no results"),
        (lambda d: d.update(models=[3]), r"models\[0\]: .*expected an object; found 3"),
        (lambda d: d.update(kept=[{}]), r"kept\[0\]: 'key' is missing"),
        (lambda d: d.update(command=3), "command: .*expected a string; found 3"),
        (lambda d: d.update(settings=[]), r"settings: .*an object; found \[\]"),
        (lambda d: d.update(inputs={"a": {"path": "1"}}), "inputs: a: 'sha256' is missing"),
        (lambda d: d.pop("inputs"), "'inputs' is missing"),
        (lambda d: d.pop("format"), 'expected "format": 2'),
        (lambda d: d.update(format=1), 'expected "format": 2; found 1'),
        (lambda d: d["models"][1].pop("name"), r"models\[1\]: 'name' is missing"),
        (models(1, name=3), r"models\[1\]: name: .*a string; found 3"),
        (models(0, relative_l2_percent=None), "relative_l2_percent: .*a number; found None"),
        (models(0, sql=3), r"models\[0\]: sql: .*an object; found 3"),
        (models(0, sql={"a": 3}), "sql: a: .*an object; found 3"),
        (models(0, sql={"a": {}}), "sql: a: 'accuracy' is missing"),
        (benchmark("sql", "shop.v1", accuracy="x"), "shop.v1: accuracy: .*a number; found 'x'"),
        (benchmark("sql", "shop.v1", questions=0.5), "questions: .*an integer or null; found 0.5"),
        (benchmark("sql", "shop.v1", failures={"a": []}), r"failures: a: .*an integer; found \[\]"),
        (benchmark("choices", "cloze", general=2), "general: .*true or false; found 2"),
        (models(0, general=True), r"models\[0\]: general: .*an object; found True"),
        (models(0, general={"loss": 1.0}), "general: 'perplexity' is missing"),
        (models(0, general={"perplexity": 10**400}), "perplexity: .*expected a number; found 1000"),
        (models(0, lm_eval={"t": {"score": 1}}), "t: 'metric' is missing"),
    ],
)
def test_a_damaged_evaluation_is_one_line(tmp_path, change, message):
    with pytest.raises(DataError, match=rf"eval\.json.*{message}"):
        read_evaluation(evaluation_file(tmp_path, change))


def test_scores_of_the_domain_and_of_general_benchmarks_are_apart():
    choice = {"accuracy": 0.5, "accuracy_per_byte": 0.9, "standard_error": 0.03}
    task = {"score": 0.2, "standard_error": 0.04}
    model = {
        "sql": {"shop": {"accuracy": 0.25, "standard_error": 0.0}},
        "choices": {"a": choice | {"general": True}, "b": choice | {"general": False}},
        "lm_eval": {"c": task | {"general": True}, "d": task | {"general": False}},
    }
    assert scores(model, general=True) == {"a": 50.0, "c": 20.0}
    assert scores(model, general=False) == {"shop": 25.0, "b": 50.0, "d": 20.0}
    # (0² + 3² + 4²)^½ / 3: the tasks are independent.
    assert domain_mean(model) == (pytest.approx(95 / 3), pytest.approx(5 / 3))
    assert domain_mean({"choices": {"b": {"accuracy": 0.5}}}) == (50.0, None)


def test_what_each_model_answers_is_shown(tmp_path):
    asked = {"question": "How many\n*books*?", "gold": "select 1"}
    right, wrong = asked | {"answer": "select 1", "right": True}, asked | {"right": False}
    wrong["answer"] = "Sure:\n```sql\nselect 2 | " + 300 * "x"

    def change(document: dict[str, Any]) -> None:
        for model, sample in zip(document["models"], (wrong, right), strict=False):
            model["sql"]["shop.v1"]["samples"] = [sample, sample | {"gold": "select 2"}]

    evaluation = evaluation_file(tmp_path, change)
    assert report.main([f"--evaluation={evaluation}", f"--output-dir={tmp_path / 'out'}"]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    _, found, after = text.partition("**shop.v1**: How many *books*?\n\n")
    assert found
    gold, base, tuned = parsed(after.partition("\n\n")[0])
    assert gold == {"method": "gold query", "answer": "`select 1`", "right": ""}
    assert (base["right"], tuned["right"], tuned["answer"]) == ("no", "yes", "`select 1`")
    assert base["answer"].startswith("`Sure: '''sql select 2 \\| xxx")
    assert len(base["answer"]) < 250
    # Two questions may be asked in the same words.
    _, _, second = after.partition("**shop.v1**: How many *books*?\n\n")
    assert parsed(second.partition("\n\n")[0])[0]["answer"] == "`select 2`"


def test_the_whole_report(tmp_path, capsys):
    last = {"iteration": 40, "stability": STABILITY, "probe": {"outside_mass": 0.02}}
    run = write_run(tmp_path / "run", [*steps(), last])
    timings = tmp_path / "timings.json"
    timings.write_text(json.dumps({"base": 180.25, "stage 0": 12}))
    flags = [
        f"--evaluation={evaluation_file(tmp_path)}",
        f"--run=full softmax={run}",
        "--line=base,replay,full softmax",
        f"--timings={timings}",
        "--note=On a tiny model.",
        f"--output-dir={tmp_path / 'out'}",
    ]
    assert report.main(flags) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert capsys.readouterr().out == text
    gained = table(text, "What it gained")
    assert (gained[1]["shop.v1 %"], gained[1]["questions"]) == ("21.0 ± 3.0", "200")
    assert "data next token %" not in gained[1]  # not measured: no column
    assert [line["failure reason"] for line in gained] == [
        "1 other answer, 1 sql error (3 cut off, 2 left out)", "2 timeout", "– (2 left out)", "–",
    ]  # fmt: skip
    assert text.index("On a tiny model.") < text.index("What it gained")
    _, full, replay, ghost = table(text, "What it kept")
    assert (full["run: outside mass %"], replay["run: outside mass %"]) == ("2.00", "–")
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


def test_a_line_joins_the_models_in_its_order(tmp_path):
    document = read_evaluation(evaluation_file(tmp_path))
    named = ["base", "replay", "full softmax"]
    built = build_report(document, {}, lines=[named], timings={}, command="")
    [line] = [x for x in report_figure(built).axes[0].lines if len(x.get_xdata()) == 3]
    assert np.allclose(line.get_xydata(), [[0, 2], [0.3, 19.5], [0.6, 21]])


def without_general_text(document):
    for model in document["models"]:
        del model["general"]


def test_without_forgetting_the_tables_are_written_and_the_figure_says_why(tmp_path, capsys):
    file = evaluation_file(tmp_path, without_general_text)
    assert report.main([f"--evaluation={file}", f"--output-dir={tmp_path}/out"]) == 0
    assert "21.0 ± 3.0" in (tmp_path / "out" / "report.md").read_text()
    built = build_report(
        read_evaluation(file), {}, lines=[["base", "replay"]], timings={}, command=""
    )
    left = report_figure(built).axes[0]
    assert "--general-text" in left.texts[0].get_text()
    assert not left.lines


PIPE = "expected a regular file; found a pipe"


@pytest.mark.parametrize(
    ("flag", "code", "message"),
    [
        ("--run=other={run}", 2, "--run: the model 'other' was not evaluated"),
        ("--line=base,other", 2, "--line: the model 'other' was not evaluated"),
        ("--line=base", 2, "expected two names or more; found base"),
        ("--run=full softmax", 2, "expected NAME=DIR"),
        ("--runs=x", 2, "unknown flag --runs (did you mean --run?)"),
        ("--run=\udce9=x", 2, "this name is not UTF-8 (found '\\udce9')"),
        ("--timings={run}/metrics.jsonl", 3, "not JSON"),
        ("--timings={run}/../eval.json", 3, "not timings"),
        ("--evaluation={run}/metrics.jsonl", 3, "not JSON: Extra data"),
        ("--evaluation={run}/../pipe", 3, PIPE),
        ("--timings={run}/../pipe", 3, PIPE),
        ("--run=replay={run}/../pipes", 3, PIPE),
        # Changes of the evaluation, which then has no figure.
        (models(2, sql={}), 3, "replay and base were measured on different things"),
        (models(2, general={"perplexity": 20.0}), 3, "were measured on different things"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, flag, code, message):
    run = write_run(tmp_path / "run", steps())
    write_run(tmp_path / "pipes", [])
    (tmp_path / "pipes" / "metrics.jsonl").unlink()
    os.mkfifo(tmp_path / "pipes" / "metrics.jsonl")
    os.mkfifo(tmp_path / "pipe")
    change, more = (None, [flag.format(run=run)]) if isinstance(flag, str) else (flag, [])
    file = evaluation_file(tmp_path, *([change] if change else []))
    assert report.main([f"--evaluation={file}", f"--output-dir={tmp_path}/out", *more]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_earlier_report_is_replaced_and_nothing_else(tmp_path, capsys):
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


def test_no_output_is_an_input(tmp_path, capsys):
    evaluation = evaluation_file(tmp_path).rename(tmp_path / "report.json")
    (tmp_path / "report.md").write_text('{"a": 1}')
    (tmp_path / "other.json").write_bytes(evaluation.read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for name, flag, more in (
        ("report.json", "--evaluation", []),
        ("other.json", "--timings", [f"--timings={tmp_path}/report.md"]),
    ):
        given = [f"--evaluation={tmp_path}/{name}", f"--output-dir={tmp_path}", *more]
        assert report.main(given) == 2
        assert f"the output is also read, as {flag}" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
