"""The study: its data come from the published formats, its runs are distinct, its pool goes on."""

from __future__ import annotations

import bz2
import contextlib
import io
import json
import math
import os
import re
import signal
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.replicate import data, plan, run
from examples.replicate.data import DATABASES, Sources
from examples.replicate.plan import PLANS
from examples.replicate.results import Row, read_rows, write_rows
from examples.replicate.run import Pool
from examples.replicate.study import Failed, Job, Study
from megatron_replay.errors import DataError
from tests import processes
from tests.evaluation.site import save_model, write_database

#: On the domain whose published rows are the easiest to make up.
SPIDER = replace(
    PLANS["quick"],
    runs=lambda: plan.runs_of("spider", [plan.FULL], plan.RATES, blends=(0.5,)),
    costs={"spider": plan.Cost(1, 1)},
)


def lines(path: Path, *values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = (value if isinstance(value, str) else json.dumps(value) for value in values)
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")


def publish(folder: Path) -> Path:
    """A few rows of every set, in its published format."""
    asked = []
    for name in DATABASES:
        file = folder / "spider" / "database" / name / f"{name}.sqlite"
        write_database(file, "create table t (a int)", "insert into t values (1), (2)")
        for number in range(9):
            row = {"db_id": name, "query": f"SELECT a + {number} FROM t"}
            asked += [row | {"question": f"what is {n} plus {number}?"} for n in ("a", "the a")]
    lines(folder / "spider" / "dev.json", json.dumps(asked))
    oran = folder / "oran-bench-13k" / "Benchmark"
    options = ["1. core", "2.  edge", "3. radio", "4. cloud"]
    for number, name in enumerate("EMH"):
        lines(oran / f"fin_{name}.json", [f"where is {number}?", options, "3"],
              ["where is 0?", options, "1"], ["a twin?", ["1. a", "2. a", "3. b", "4. c"], "3"],
              ["none?", [], "3"])  # fmt: skip
    facts = [f"V\tpfcp.cause\t{n}\tfact {n}" for n in range(9)]
    lines(folder / "wireshark-telecom" / "tshark_G_values.telecom.tsv", *facts,
          "V\tpfcp.cause\t9\tReserved", "V\tother.cause\t1\tno")  # fmt: skip
    text = ["", " = A title = ", f" {'a b ' * 90} . <unk> c . d"]
    for file in ("raw/wikitext-test.txt", "valid.txt"):
        lines(folder / "wikitext2" / file, *text * 60)
    lines(folder / "lambada" / "lambada_test.jsonl", {"text": "it was a long day"})
    # Each answer is right once: a model that always gives the same one is right sometimes.
    (folder / "hellaswag").mkdir()
    scenes = "".join(f"He runs.\n{n}\nno\nto win\nnever\nnot\n" for n in range(4))
    file = folder / "hellaswag" / "hellaswag_val_full.txt.bz2"
    file.write_bytes(bz2.compress(scenes.encode()))
    question = {"query": "Question: Is it?", "choices": ["yes", "no"]}
    lines(folder / "arc_easy" / "arc_easy.jsonl", *(question | {"gold": n} for n in range(2)))
    way = {"goal": "eat", "sol1": "chew", "sol2": "sing"}
    lines(folder / "piqa" / "valid.jsonl", way | {"sol2": "x" * 500}, way, way)
    lines(folder / "piqa" / "valid-labels.lst", "1", "0", "1")
    task = {"input": "Which is it?\nOptions:\n(A) red\n(B) blue (sky)"}
    tasks = [task | {"target": f"({letter})"} for letter in "AB"]
    lines(folder / "bbh" / "hyperbaton.json", {"canary": "", "examples": tasks})
    lines(folder / "dolly" / "rows.jsonl",
          *[{"instruction": "Say hi.", "context": "", "response": "hi"}] * 60)  # fmt: skip
    return folder


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def right(row: dict[str, Any]) -> str:
    return str(row["options"][row["answer"]])


def test_data_are_made_of_the_published_formats(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(data, "ORAN_TRAIN", 2)
    monkeypatch.setattr(data, "ORAN_TEST", 1)
    monkeypatch.setattr(data, "NUM_FACTS", 5)
    sources, made = Sources(publish(tmp_path / "sets")), tmp_path / "made"
    given = {"domains": ["spider", "oran", "causes"], "databases": 2, "items": 4}
    data.write_data(made, sources, **given)
    train, test = (
        json.loads((made / "spider" / f).read_text()) for f in ("train.json", "dev.json")
    )
    queries = ({(row["db_id"], row["query"]) for row in rows} for rows in (train, test))
    assert set.isdisjoint(*queries)
    assert (len(train), len(test)) == (24, 12)
    assert {row["db_id"] for row in test} == set(DATABASES[:2])
    assert len(list((made / "spider" / "database").rglob("*.sqlite"))) == 2
    (asked,), trained = rows_of(made / "choices" / "oran.jsonl"), rows_of(made / "oran.jsonl")
    assert right(asked) == "radio"
    assert {row["completion"] for row in trained} == {"radio"}  # of two equal questions, the first
    assert len({row["prompt"] for row in (asked, *trained)}) == 3
    assert asked["prompt"].splitlines()[1:] == [f"- {option}" for option in asked["options"]]
    facts, new = rows_of(made / "causes.jsonl"), rows_of(made / "choices" / "causes.jsonl")
    known = {row["completion"] for row in facts}
    assert (len(known), len(facts), len(new)) == (5, 30, 10)
    assert {right(row) for row in new} == known
    assert {row["prompt"] for row in facts}.isdisjoint(row["prompt"] for row in new)
    for row in new:
        assert len(set(row["options"])) == 4
        assert re.findall(r"\d+", row["prompt"]) == [right(row).removeprefix("fact ")]
    found = {path.stem: rows_of(path) for path in (made / "general").iterdir()}
    assert {name: {right(row) for row in rows} for name, rows in found.items()} == {
        "lambada": {" day"}, "hellaswag": {" no", " to win", " never", " not"},
        "arc_easy": {" yes", " no"}, "piqa": {" chew", " sing"}, "bbh": {" red", " blue (sky)"},
    }  # fmt: skip
    assert found["lambada"][0]["prompt"] == "it was a long"
    assert found["bbh"][0]["prompt"] == "Question: Which is it?\nAnswer:"
    for name in ("general_text", "heal_text"):
        texts = {row["text"] for row in rows_of(made / f"{name}.jsonl")}
        assert texts == {f"{'a b ' * 90} . d"}
    assert rows_of(made / "heal_chat.jsonl")[0] == {"prompt": "Say hi.", "completion": "hi"}
    data.write_data(tmp_path / "again", sources, **given)
    for path in filter(Path.is_file, made.rglob("*")):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(made)).read_bytes()


def test_a_missing_set_is_named_with_its_origin(tmp_path: Path) -> None:
    sources = Sources(publish(tmp_path))
    sources.files(data.SETS, 2)
    (tmp_path / "piqa" / "valid.jsonl").unlink()
    with pytest.raises(DataError, match=r"piqa: no valid\.jsonl .*published here: https://github"):
        sources.files(data.SETS, 2)


@pytest.mark.parametrize("name", PLANS)
def test_runs_of_a_plan_have_their_own_directories_and_all_they_need(name, tmp_path) -> None:
    runs = PLANS[name].named()
    assert len({run.name for run in runs}) == len(runs)
    jobs = Study(tmp_path, PLANS[name], device="cpu").jobs(runs, tmp_path)
    made = [job.product for job in jobs]
    assert len(set(made)) == len(made)
    for number, job in enumerate(jobs):
        assert set(job.needs) <= set(made[:number])
    assert PLANS[name].named(["nothing*"]) == []
    assert {run.lr for run in PLANS[name].named(["*lr0.0003-seed0"])} == {plan.LR}


@pytest.mark.parametrize(("name", "hours"), [("quick", 80 / 60), ("small", 8.5), ("whole", 20)])
def test_a_plan_keeps_its_time(name, hours, tmp_path, capfd) -> None:
    given = ["--data", "D", "--base", "B", "--output", str(tmp_path), "--workers", "2"]
    assert run.main(["--plan", name, *given, "--list"]) == 0
    *runs, last = capfd.readouterr().out.splitlines()
    assert [line.split()[3] for line in runs] == [one.name for one in PLANS[name].named()]
    assert float(last.split()[1]) <= round(hours, 1)  # core-hours, by the measured times of parts


def _touching(path: Path, *needs: Path) -> Job:
    def touch() -> None:
        assert all(need.exists() for need in needs)
        path.touch()

    return Job(path.name, path, touch, needs=needs)


def _runs_what_is_open(folder: Path) -> None:
    """Once its needs are there."""
    first, second, third = (folder / name for name in ("a", "b", "c"))
    third.touch()
    jobs = [_touching(second, first), _touching(first), _touching(third)]
    pool = Pool(jobs, workers=2)
    assert pool.total == 2
    pool.run()
    assert second.exists()
    assert not pool.failed


def _refused() -> None:
    raise Failed(4)


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stops_at_a_failure(folder: Path) -> None:
    """Prints it, and starts nothing after it."""
    for action, code in ((_refused, 4), (_killed, -9)):
        bad, later = folder / f"bad{code}" / "product", folder / f"later{code}"
        pool = Pool([Job("bad", bad, action), _touching(later)], workers=1)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            pool.run()
        assert pool.failed == [f"bad: exit code {code}; see {bad.parent}.log"]
        assert list(bad.parent.iterdir()) == []  # Stage 0 refuses a directory with a log in it
        assert not later.exists()
        assert f"failed with exit code {code}" in said.getvalue()


@pytest.mark.parametrize("test", [_runs_what_is_open, _stops_at_a_failure])
def test_pool(test: Callable[[Path], None], tmp_path: Path) -> None:
    """It forks, and refuses to from a process with threads."""
    assert processes.wait(processes.fork(test, tmp_path)) == 0


def test_pool_refuses_to_fork_beside_a_thread(tmp_path: Path) -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        with pytest.raises(AssertionError, match="a fork beside threads may hang"):
            Pool([_touching(tmp_path / "a")], workers=1).run()
    finally:
        done.set()
        thread.join()


def _one_run(folder: Path) -> None:
    """Without LAMBADA, of which a random model gets nothing right: retention needs some."""
    del data.GENERAL["lambada"]
    PLANS["quick"] = SPIDER
    warnings.simplefilter("ignore")  # megatron-core's; the parts' own tests refuse ours
    argv = [
        "--plan", "quick", "--data", str(folder / "sets"), "--base", str(folder / "model"),
        "--output", str(folder / "study"), "--workers", "1", "--only", "*full-*lr0.0003*",
    ]  # fmt: skip
    assert run.main(argv) == 0
    rows = read_rows(folder / "study" / "rows.csv")
    assert [row.method for row in rows] == ["base", "full softmax", "full softmax, α 0.5"]
    base, tuned, blend = rows
    assert len({row.weights for row in rows}) == 3
    assert tuned.relative_l2_percent > 0
    assert blend.relative_l2_percent == pytest.approx(tuned.relative_l2_percent / 2, rel=1e-3)
    assert tuned.outside
    assert len(tuned.hits) == len(base.hits) == 36
    made = sorted(path for path in folder.rglob("*") if path.is_file())
    assert run.main(argv) == 0  # nothing is made again
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == made
    assert not [*folder.rglob("iter_*"), *(folder / "study" / "runs").rglob("*.safetensors")]


def test_one_run_from_published_sets_to_rows(tmp_path: Path, capfd) -> None:
    publish(tmp_path / "sets")
    save_model(tmp_path / "model", max_position_embeddings=2048)
    assert processes.wait(processes.fork(_one_run, tmp_path)) == 0, capfd.readouterr()


def test_a_study_of_other_data_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Study, "parts", lambda _: type("", (), {"make_corpora": print}))
    publish(tmp_path / "sets")
    save_model(tmp_path / "model")
    study = Study(tmp_path / "study", SPIDER, device="cpu")
    study.prepare(tmp_path / "sets", tmp_path / "model")
    study.prepare(tmp_path / "sets", tmp_path / "model")
    lines(tmp_path / "sets" / "lambada" / "lambada_test.jsonl", {"text": "another"})
    with pytest.raises(DataError, match=r"study\.json: this study was made from other data"):
        study.prepare(tmp_path / "sets", tmp_path / "model")


def row(method: str = "m", **more: Any) -> Row:
    given: dict[str, Any] = {
        "name": f"{method}-{more}", "method": method, "domain": "shop", "lr": 3e-4, "seed": 0,
        "weights": "ab", "perplexity": 20.0, "relative_l2_percent": 1.0, "outside": {},
        "loss_std": None, "gradient_norm_cv": None, "steps": None, "seconds": None,
        "stage0_seconds": None, "hits": np.array([True, False]), "general": {},
    }  # fmt: skip
    return Row(**given | more)


def test_rows_are_collected_from_all_runs_that_are_done(tmp_path: Path) -> None:
    """A run that was done again has its new rows; runs of another plan stay."""
    first, second, *_ = SPIDER.named()
    study = Study(tmp_path, SPIDER, device="cpu")
    for one, method in ((first, "old"), (first, "new"), (second, "other")):
        path = study.rows_of(one)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(path, [row(method, perplexity=math.inf)])
        assert study.collect([first]) == 1
    rows = read_rows(study.rows_path)
    assert sorted(row.method for row in rows) == ["new", "other"]
    assert {row.perplexity for row in rows} == {math.inf}
