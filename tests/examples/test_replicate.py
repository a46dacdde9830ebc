"""The study: questions have their answers, runs are distinct, the pool stops and goes on."""

from __future__ import annotations

import contextlib
import io
import math
import os
import shutil
import signal
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from examples.quickstart import nl2sql
from examples.replicate import choices, joins, make_data, parts, plan
from examples.replicate.results import read_rows, write_rows
from examples.replicate.run import Pool
from examples.replicate.study import Job, Study
from megatron_replay.checkpoint.staging import WRITTEN, staging_directory
from megatron_replay.errors import DataError, OutputError
from megatron_replay.locks import DirectoryLock
from tests import processes

ONE = "ignorant-small-*/lrmatched-seed2"


@pytest.mark.parametrize(
    ("name", "only"), [*((name, "*") for name in plan.PLANS), ("paper", ONE), ("paper", "nothing*")]
)
def test_runs_of_a_plan_have_their_own_directories_and_all_they_need(name, only, tmp_path) -> None:
    runs = plan.plan(name, only=[only])
    assert len({run.name for run in runs}) == len(runs)
    jobs = Study(tmp_path).jobs(runs)
    made = [job.product for job in jobs]
    assert len(set(made)) == len(made)
    assert {need for job in jobs for need in job.needs} <= set(made)
    if only == ONE:  # with those that it needs
        methods = ["AdamW (SFT)", "AdamW, matched", "Dyn. Top-K + MoClip"]
        assert sorted(run.method for run in runs) == methods
        assert {(run.store.base, run.seed) for run in runs} == {("ignorant", 2)}
    assert bool(runs) == (only != "nothing*")


def test_joined_questions_are_answered_by_their_database(tmp_path: Path) -> None:
    database = tmp_path / "database.sqlite"
    joins.write_database(database, seed=0)
    pools = nl2sql.only_answerable(joins.question_pools(joins.NEW_PAIRS), database)
    assert all(len(pool) > 20 for pool in pools)
    texts = [question.text for pool in pools for question in pool]
    assert len(set(texts)) == len(texts)
    with sqlite3.connect(database) as connection:
        for pool in joins.question_pools(joins.practice_pairs(1, seed=0)):
            with pytest.raises(sqlite3.OperationalError, match="no such table"):
                connection.execute(pool[0].sql)


def test_choices_hold_the_right_answer_once() -> None:
    known = choices.facts(communication=True)[:40]
    rows = choices.questions(known, [name for name, _ in known], seed=0)
    assert len({row["answer"] for row in rows}) > 1
    for row, (name, _) in zip(rows, known, strict=True):
        assert row["options"][row["answer"]] == name
    train, test = choices.recall(known, seed=0)
    answers = {row["completion"] for row in train}
    assert all(row["options"][row["answer"]] in answers for row in test)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    sums = choices.arithmetic(seed=0)
    for row in sums:
        a, b = row["prompt"].removeprefix("add ").removesuffix(": ").split(" and ")
        assert row["options"][row["answer"]] == str(int(a) + int(b))
    copies = choices.copying(nl2sql.PRACTICE_VALUES.split(), 50, seed=0)
    for row in copies:
        assert row["prompt"] == f"repeat {row['options'][row['answer']]}: "
    for row in (*rows, *test, *sums, *copies):
        assert len(set(row["options"])) == choices.OPTIONS


def test_cloze_hides_the_next_word_of_the_text() -> None:
    text = "word " * 40 + "the quick brown fox jumps over lazy dogs while every single bird sings."
    (row,) = choices.cloze([text], 1, seed=0)
    assert row["prompt"] + row["options"][row["answer"]] in text
    with pytest.raises(ValueError, match="2 texts needed, 1 fit"):
        choices.cloze([text], 2, seed=0)


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
    raise parts.Failed(4)


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


def test_data_are_written_whole_and_nothing_else_is_touched(tmp_path, monkeypatch) -> None:
    def write(folder: Path, seed: int) -> None:
        (folder / "rows.jsonl").write_text(f"{seed}\n")

    monkeypatch.setattr(make_data, "write_everything", write)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"theirs: not empty, and without a data\.json"):
        make_data.make_data(theirs, seed=0)
    assert (theirs / "thesis.txt").read_text() == "mine"
    ours, cut = tmp_path / "ours", staging_directory(tmp_path / "ours")
    cut.mkdir()
    (cut / "half.jsonl").touch()
    with pytest.raises(OutputError, match="holds other files"):
        make_data.make_data(ours, seed=0)
    DirectoryLock(cut, purpose="data").release()  # left by a run that was killed
    make_data.make_data(ours, seed=0)
    make_data.make_data(ours, seed=0)
    assert sorted(path.name for path in ours.iterdir()) == [WRITTEN, "data.json", "rows.jsonl"]
    assert not cut.exists()
    with pytest.raises(DataError, match="changed, or made with another seed"):
        make_data.make_data(ours, seed=1)
    (ours / "rows.jsonl").write_text("other\n")
    with pytest.raises(DataError, match="changed, or made with another seed"):
        make_data.make_data(ours, seed=0)


def test_a_study_of_other_data_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(make_data, "write_everything", lambda folder, seed: None)
    monkeypatch.setattr(parts, "make_corpora", lambda data: None)
    study = Study(tmp_path)
    study.prepare()
    study.prepare()
    shutil.rmtree(study.data)  # made again by another version
    monkeypatch.setattr(
        make_data, "write_everything", lambda folder, seed: (folder / "new").touch()
    )
    with pytest.raises(DataError, match="the models here were made from other data"):
        study.prepare()


def test_rows_are_collected_from_all_runs_that_are_done(tmp_path: Path) -> None:
    """A run that was done again has its new row; runs of another plan stay."""
    first, second, *_ = plan.plan("paper")
    study = Study(tmp_path)
    for run, method in ((first, "old"), (first, "new"), (second, "other")):
        path = study.row_path(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(path, [parts.made_with(run) | {"method": method, "perplexity": math.inf}])
        assert study.collect([first]) == 1
    assert sorted(row["method"] for row in read_rows(study.rows_path)) == ["new", "other"]
    assert {row["perplexity"] for row in read_rows(study.rows_path)} == {"inf"}
