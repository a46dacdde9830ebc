"""lm-eval: which number is a task's score, which files decide it, and, where it is, a real run."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys

import pytest

from megatron_replay.errors import ConfigError, DataError
from megatron_replay.evaluation import suite
from megatron_replay.evaluation.inputs import task_files
from megatron_replay.evaluation.lm_eval_tasks import require_lm_eval, share_metric, task_score
from tests.evaluation.site import save_chat_model, write_rows
from tools import evaluate

DECLARED = {"metadata": {"version": 1, "share": True}}
OWN = {"process_results": "def per_cent(doc, results): ..."}


def listed(*names, higher=True, **more):
    """Configuration and directions of a task that lists these metrics."""
    config = {"task": "t", "metric_list": [{"metric": name} for name in names], **more}
    return config, dict.fromkeys(names, higher)


def of_entry(name, **entry):
    return listed(name, metric_list=[{"metric": name} | entry])


@pytest.mark.parametrize(
    ("task", "share"),
    [
        (listed("acc"), True),
        (listed("acc_norm", "other"), True),
        (listed("exact_match"), True),
        (listed("f1"), True),
        (listed("bleu"), False),
        (listed("likelihood"), False),
        (listed("rouge1"), False),
        (listed("rouge1", **DECLARED), True),
        (listed("f1", **OWN), False),
        (listed("acc", **OWN, **DECLARED), True),
        (of_entry("acc", aggregation="perplexity"), False),
        (of_entry("acc", aggregation="mean"), True),
        (of_entry("acc", hf_evaluate=True), False),
        (of_entry("acc", metric="def acc(...): ..."), False),
        (listed("acc", metric_list=None), True),
    ],
)
def test_whether_a_score_is_a_share_is_decided_by_the_task(task, share):
    name = next(iter(task[1]))
    if share:
        assert share_metric("t", [task]) == name
        task = task[0], {name: False}
    with pytest.raises(
        DataError, match=f"task t: {name} is {'better when' if share else 'not kn'}"
    ):
        share_metric("t", [task])


ACC = {"group": "g", "aggregate_metric_list": [{"metric": "acc"}]}


def test_a_group_is_a_share_where_all_of_its_tasks_are():
    own, without = listed("acc", "rouge1"), listed("f1")
    other, lower = listed("acc", **OWN), listed("acc", higher=False)
    assert share_metric("g", [own, own, without], ACC) == "acc"
    assert share_metric("g", [own, other], ACC | DECLARED) == "acc"
    for tasks, group, message in (
        ([own, other], ACC, "task t: acc is not known"),
        ([own, lower], ACC, "task t: acc is better when lower"),
        ([without], ACC, "task g: no task of this group has acc"),
        ([own, other], ACC | {"aggregate_metric_list": None}, r"task g: it has no score.*t,t"),
        ([listed()], None, "task g: it has no score of its own"),
        ([listed("acc", metadata={"share": 1})], None, r"expected true or false; found 1\)"),
    ):
        with pytest.raises(DataError, match=message):
            share_metric("g", tasks, group)


def test_the_score_is_that_of_the_metric():
    """In what lm_eval 0.4.13 returned for a task and a group, less the rest."""
    values = {
        "alias": "plain", "sample_len": 300, "acc,none": 0.25, "acc_stderr,none": 0.02,
        "acc_norm,none": 0.5, "acc_norm_stderr,none": "N/A", "f1,custom-extract": 1 + 2e-16,
        "a,none": 35.0, "b,none": -0.1, "c,none": math.nan,
    }  # fmt: skip
    results = {"results": {"plain": values}}
    for metric, score, key, error in (
        ("acc", 0.25, "acc,none", 0.02),
        ("acc_norm", 0.5, "acc_norm,none", None),
        ("f1", pytest.approx(1.0), "f1,custom-extract", None),
    ):
        assert task_score(results, "plain", metric) == {
            "score": score, "metric": key, "standard_error": error, "questions": 300,
        }  # fmt: skip
    for metric in "abc":
        with pytest.raises(DataError, match=rf"plain: {metric} is not the share .*from 0 to 1"):
            task_score(results, "plain", metric)
    with pytest.raises(DataError, match=r"task plain: the task gave no bleu.*found.*acc,none"):
        task_score(results, "plain", "bleu")


def test_local_data_that_a_task_names_decides_too(tmp_path):
    tasks, data = tmp_path / "tasks", tmp_path / "data"
    for folder, *names in (
        (data, "a.jsonl", "b-1.jsonl", "b-2.jsonl", "unused.jsonl"), (tasks, "functions.py")
    ):  # fmt: skip
        folder.mkdir()
        for name in names:
            (folder / name).touch()
    (tasks / "task.yaml").write_text(
        f"task: one\ndataset_path: json\nprocess_docs: !function functions.pick\n"
        f"dataset_kwargs: {{data_files: {{test: {data}/a.jsonl, train: ['{data}/b-*.jsonl']}}}}\n"
    )
    assert [path.name for path in task_files(tasks)] == [
        "a.jsonl", "b-1.jsonl", "b-2.jsonl", "functions.py", "task.yaml"
    ]  # fmt: skip
    with pytest.raises(DataError, match="no task's YAML file here"):
        task_files(data)


def test_odd_task_files_are_one_line(tmp_path):
    """A pipe would hang lm-eval; an alias of aliases holds more than can be walked."""
    tasks, file = tmp_path / "tasks", tmp_path / "tasks" / "task.yaml"
    tasks.mkdir()
    lines = ["dataset_path: &a0 [x, x]"]
    lines += [f"data_dir{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)]
    file.write_text("\n".join(lines) + "\ndata_dir: *a59\n")
    assert task_files(tasks) == [file]
    os.mkfifo(tmp_path / "pipe")
    for content, message in (
        (b"task: [" * 1_000, r"task\.yaml: not YAML"),
        (b"task: \xff", r"task\.yaml: damaged: not UTF-8"),
        (b"task: {", r"task\.yaml: not YAML"),
        (f"dataset_path: {tmp_path}/pipe".encode(), r"pipe: .*found a pipe"),
    ):
        file.write_bytes(content)
        with pytest.raises(DataError, match=message):
            task_files(tasks)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(DataError, match=r"task\.yaml: .*found a pipe"):
        task_files(tasks)


def test_without_the_harness(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"not installed.*pip install 'megatron-replay\[eval\]'"):
        require_lm_eval()


@pytest.fixture
def harness(tmp_path, monkeypatch):
    """A base whose answers differ, and a multiple-choice task over ``rows.jsonl``; its flags."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval: see requirements/eval.txt")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    save_chat_model(tmp_path / "base", scale=8.0)
    (tmp_path / "tasks").mkdir()
    return [
        f"--base={tmp_path / 'base'}", f"--output={tmp_path / 'eval.json'}",
        f"--lm-eval-include-path={tmp_path / 'tasks'}",
    ]  # fmt: skip


def task_of(directory, *metrics, **more):
    """A task's YAML; its last line may get a tag that JSON cannot have."""
    task = {
        "task": "rows", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(directory / "rows.jsonl")}},
        "output_type": "multiple_choice", "doc_to_text": "{{prompt}}", "target_delimiter": "",
        "doc_to_choice": "{{options}}", "doc_to_target": "answer", **more,
    }  # fmt: skip
    if metrics:
        entry = {"aggregation": "mean", "higher_is_better": True}
        task["metric_list"] = [{"metric": metric} | entry for metric in metrics]
    return json.dumps(task)


@pytest.mark.filterwarnings("default")  # the harness's libraries have their own
@pytest.mark.parametrize(
    "style", [["--no-chat-template"], ["--chat-template", "--system-prompt=Be brief."]]
)
def test_a_real_run_agrees_with_our_own_choices(tmp_path, harness, style):
    (tmp_path / "tasks" / "rows.yaml").write_text(task_of(tmp_path, "acc"))
    given = [*harness, *style, "--lm-eval-tasks=rows", f"--choices=ours={tmp_path / 'rows.jsonl'}"]
    scores = []
    for shift in range(3):  # the second and third time, no cache may answer
        rows = [
            {"prompt": f"{i}?", "options": [f"x{i}", "yes", f"{i * i}"],
             "answer": (i % 5 + shift) % 3}
            for i in range(60)
        ]  # fmt: skip
        write_rows(tmp_path / "rows.jsonl", *rows)
        assert evaluate.main(given) == 0
        [entry] = json.loads((tmp_path / "eval.json").read_text())["models"]
        assert entry["lm_eval"]["rows"]["score"] == entry["choices"]["ours"]["accuracy"]
        scores.append(entry["lm_eval"]["rows"]["score"])
    assert sum(scores) == pytest.approx(1)
    assert len(set(scores)) > 1
    assert math.isfinite(entry["lm_eval"]["rows"]["standard_error"])
    assert entry["retention"] == {"rows": 100.0}
    assert evaluate.main([*given, "--lm-eval-tasks=nothing"]) == 3


@pytest.mark.filterwarnings("default")
def test_a_real_run_takes_the_first_metric_of_the_list(tmp_path, harness, monkeypatch, capsys):
    tasks, metrics = tmp_path / "tasks", ("acc_norm", "acc")
    (tasks / "rows.yaml").write_text(task_of(tmp_path, *metrics))
    write_rows(
        tmp_path / "rows.jsonl",
        *({"prompt": f"{i}?", "options": ["x" * 9, "y"], "answer": i % 2} for i in range(20)),
    )
    (tasks / "functions.py").write_text("def function(doc, results): return {'acc_norm': 0.8}\n")
    end = ", process_results: !function functions.function}"
    declared = task_of(tmp_path, *metrics, task="custom", **DECLARED)
    (tasks / "custom.yaml").write_text(declared[:-1] + end)
    rolling = {"task": "texts", "output_type": "loglikelihood_rolling", "doc_to_text": "",
               "doc_to_target": "{{prompt}}"}  # fmt: skip
    (tasks / "texts.yaml").write_text(task_of(tmp_path, **rolling))
    both = ["--lm-eval-tasks=rows", "--lm-eval-domain-tasks=custom"]
    assert evaluate.main([*harness, *both]) == 0
    [entry] = json.loads((tmp_path / "eval.json").read_text())["models"]
    assert entry["lm_eval"]["rows"]["metric"] == "acc_norm,none"
    assert entry["lm_eval"]["custom"]["score"] == pytest.approx(0.8)
    assert [entry["lm_eval"][name]["general"] for name in ("rows", "custom")] == [True, False]
    monkeypatch.setattr(suite, "measure", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "eval.json").unlink()
    (tasks / "custom.yaml").write_text(task_of(tmp_path, *metrics, task="custom")[:-1] + end)
    for flag, message in (
        ("--lm-eval-domain-tasks=texts", "word_perplexity is better when lower"),
        ("--lm-eval-tasks=custom", "acc_norm is not known to be a share"),
    ):
        capsys.readouterr()
        assert evaluate.main([*harness, flag]) == 3
        assert message in capsys.readouterr().err
