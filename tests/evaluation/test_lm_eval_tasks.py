"""lm-eval: which number is a task's score, which files decide it, and, where it is, a real run."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_replay.errors import ConfigError, DataError
from megatron_replay.evaluation import suite
from megatron_replay.evaluation.inputs import task_files
from megatron_replay.evaluation.lm_eval_tasks import require_lm_eval, share_metric, task_score
from tests.evaluation.models import save_model
from tools import evaluate

#: What lm_eval 0.4.13 returned for a task and a group, less the rest.
RESULTS: dict[str, Any] = {
    "results": {
        "plain": {
            "name": "plain", "alias": "plain", "sample_len": 300,
            "acc,none": 0.25, "acc_stderr,none": 0.02,
            "acc_norm,none": 0.5, "acc_norm_stderr,none": "N/A",
        },
        "mean": {
            "alias": "mean", "name": "mean", "sample_len": 300,
            "exact_match,custom-extract": 0.125, "exact_match_stderr,custom-extract": "N/A",
            "sample_count": {"exact_match,custom-extract": 300},
        },
    },
}  # fmt: skip


def listed(*names: str, **more: Any) -> dict[str, Any]:
    """The configuration of a task that lists these metrics."""
    return {"task": "t", "metric_list": [{"metric": name} for name in names], **more}


@pytest.mark.parametrize(
    ("name", "more", "share"),
    [
        ("acc", {}, True),
        ("acc_norm", {}, True),
        ("exact_match", {}, True),
        ("f1", {}, True),
        ("bleu", {}, False),
        ("likelihood", {}, False),
        ("rouge1", {}, False),
        ("rouge1", {"metadata": {"version": 1, "share": True}}, True),
        ("f1", {"process_results": "def per_cent(doc, results): ..."}, False),
        ("acc", {"process_results": "def f(doc, results): ...", "metadata": {"share": True}}, True),
        ("acc", {"metric_list": [{"metric": "acc", "aggregation": "perplexity"}]}, False),
        ("acc", {"metric_list": [{"metric": "acc", "aggregation": "mean"}]}, True),
        ("acc", {"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, False),
        ("acc", {"metric_list": [{"metric": "def acc(...): ..."}]}, False),
        ("acc", {"metric_list": None}, True),
    ],
)
def test_whether_a_score_is_a_share_is_decided_by_the_task(
    name: str, more: dict[str, Any], share: bool
) -> None:
    config = listed(name) | more
    if share:
        assert metric_of_task(config, {name: True, "other": True}) == name
        with pytest.raises(DataError, match=rf"task t: {name} is better when lower"):
            metric_of_task(config, {name: False})
    else:
        with pytest.raises(DataError, match=r"task t: .* not known .*metadata: {share"):
            metric_of_task(config, {name: True})


def test_what_cannot_be_decided_is_one_line() -> None:
    with pytest.raises(DataError, match=r"task t: .*expected true or false; found 1\)"):
        metric_of_task(listed("acc", metadata={"share": 1}), {"acc": True})
    with pytest.raises(DataError, match="task t: it has no score of its own"):
        metric_of_task(listed(), {})


def test_a_group_is_a_share_where_all_of_its_tasks_are() -> None:
    group = {"group": "g", "aggregate_metric_list": [{"metric": "acc"}]}
    own = listed("acc", "rouge1"), {"acc": True, "rouge1": True}
    other = listed("acc", process_results="..."), {"acc": True}
    without, lower = (listed("f1"), {"f1": True}), (listed("acc"), {"acc": False})
    assert metric_of_group(group, [own, own, without]) == "acc"
    assert metric_of_group(group | {"metadata": {"share": True}}, [own, other]) == "acc"
    for tasks, message in (
        ([own, other], "task t: acc is not known"),
        ([own, lower], "task t: acc is better when lower"),
        ([without], "task g: no task of this group has acc"),
    ):
        with pytest.raises(DataError, match=message):
            metric_of_group(group, tasks)
    with pytest.raises(DataError, match=r"task g: it has no score of its own.*t,t"):
        metric_of_group({"group": "g", "aggregate_metric_list": None}, [own, other])


def test_the_score_is_that_of_the_metric() -> None:
    assert task_score(RESULTS, "plain", "acc") == {
        "score": 0.25, "metric": "acc,none", "standard_error": 0.02, "questions": 300,
    }  # fmt: skip
    found = task_score(RESULTS, "plain", "acc_norm")
    assert (found["score"], found["metric"]) == (0.5, "acc_norm,none")
    assert found["standard_error"] is None
    found = task_score(RESULTS, "mean", "exact_match")
    assert (found["score"], found["metric"]) == (0.125, "exact_match,custom-extract")
    with pytest.raises(DataError, match=r"task plain: the task gave no f1.*found.*acc,none"):
        task_score(RESULTS, "plain", "f1")


def test_a_share_that_is_none_is_an_error() -> None:
    for value in (35.0, -0.1, math.nan):
        with pytest.raises(DataError, match=r"task plain: acc is not the share .*from 0 to 1"):
            task_score({"results": {"plain": {"acc,none": value}}}, "plain", "acc")
    almost = {"results": {"plain": {"acc,none": 1 + 2e-16}}}
    assert task_score(almost, "plain", "acc")["score"] == pytest.approx(1.0)


def test_local_data_that_a_task_names_decides_too(tmp_path: Path) -> None:
    tasks, data = tmp_path / "tasks", tmp_path / "data"
    data.mkdir()
    for name in ("a.jsonl", "b-1.jsonl", "b-2.jsonl", "unused.jsonl"):
        (data / name).touch()
    tasks.mkdir()
    (tasks / "functions.py").touch()
    (tasks / "task.yaml").write_text(
        f"task: one\ndataset_path: json\nprocess_docs: !function functions.pick\n"
        f"dataset_kwargs: {{data_files: {{test: {data}/a.jsonl, train: ['{data}/b-*.jsonl']}}}}\n"
    )
    assert [path.name for path in task_files(tasks)] == [
        "a.jsonl", "b-1.jsonl", "b-2.jsonl", "functions.py", "task.yaml"
    ]  # fmt: skip
    with pytest.raises(DataError, match="no task's YAML file here"):
        task_files(data)


def test_odd_task_files_are_one_line(tmp_path: Path) -> None:
    """A pipe would hang lm-eval; an alias of aliases holds more than can be walked."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    lines = ["dataset_path: &a0 [x, x]"]
    lines += [f"data_dir{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)]
    (tasks / "task.yaml").write_text("\n".join(lines) + "\ndata_dir: *a59\n")
    assert [path.name for path in task_files(tasks)] == ["task.yaml"]
    for content in (b"task: [" * 1_000, b"task: \xff", b"task: {"):
        (tasks / "task.yaml").write_bytes(content)
        with pytest.raises(DataError, match=r"task\.yaml: (not YAML|damaged: not UTF-8)"):
            task_files(tasks)
    (tasks / "task.yaml").write_text(f"dataset_path: {tmp_path}/pipe")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"pipe: .*found a pipe"):
        task_files(tasks)
    (tasks / "task.yaml").unlink()
    os.mkfifo(tasks / "task.yaml")
    with pytest.raises(DataError, match=r"task\.yaml: .*found a pipe"):
        task_files(tasks)


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"not installed.*pip install 'megatron-replay\[eval\]'"):
        require_lm_eval()


def metric_of_task(config: dict[str, Any], directions: dict[str, bool]) -> str:
    return share_metric("t", [(config, directions)])


def metric_of_group(group: dict[str, Any], tasks: Any) -> str:
    return share_metric("g", tasks, group)


needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval: see requirements/eval.txt"
)


def write_task(directory: Path, **more: Any) -> None:
    """A base whose answers differ, and a multiple-choice task over ``rows.jsonl``."""
    base = save_model(directory / "base")
    scaled = {k: 8 * v for k, v in load_file(base / "model.safetensors").items()}
    save_file(scaled, base / "model.safetensors", metadata={"format": "pt"})
    (directory / "tasks").mkdir()
    task = {
        "task": "rows", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(directory / "rows.jsonl")}},
        "output_type": "multiple_choice", "doc_to_text": "{{prompt}}", "target_delimiter": "",
        "doc_to_choice": "{{options}}", "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        **more,
    }  # fmt: skip
    (directory / "tasks" / "rows.yaml").write_text(json.dumps(task))


@needs_harness
@pytest.mark.filterwarnings("default")  # the harness's libraries have their own
def test_a_real_run_agrees_with_our_own_choices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    write_task(tmp_path)
    given = [
        f"--base={tmp_path / 'base'}", f"--output={tmp_path / 'eval.json'}", "--lm-eval-tasks=rows",
        f"--lm-eval-include-path={tmp_path / 'tasks'}",
        f"--choices=ours={tmp_path / 'rows.jsonl'}",
    ]  # fmt: skip
    scores = []
    for shift in range(3):  # the second and third time, no cache may answer
        rows = [
            {
                "prompt": f"{i}?",
                "options": [f"x{i}", "yes", f"{i * i}"],
                "answer": (i % 5 + shift) % 3,
            }
            for i in range(60)
        ]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert evaluate.main(given) == 0
        [entry] = json.loads((tmp_path / "eval.json").read_text())["models"]
        assert entry["lm_eval"]["rows"]["score"] == entry["choices"]["ours"]["accuracy"]
        scores.append(entry["lm_eval"]["rows"]["score"])
    assert sum(scores) == pytest.approx(1)
    assert len(set(scores)) > 1
    assert math.isfinite(entry["lm_eval"]["rows"]["standard_error"])
    assert entry["retention"] == {"rows": 100.0}
    assert evaluate.main([*given, "--lm-eval-tasks=nothing"]) == 3


@needs_harness
@pytest.mark.filterwarnings("default")
def test_a_real_run_takes_the_first_metric_of_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    names = ("acc_norm", "acc")
    metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in names]
    write_task(tmp_path, metric_list=metrics)
    rows = [{"prompt": f"{i}?", "options": ["x" * 9, "y"], "answer": i % 2} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = json.loads((tmp_path / "tasks" / "rows.yaml").read_text()) | {"task": "custom"}
    (tmp_path / "tasks" / "functions.py").write_text(
        "def function(doc, results): return {'acc_norm': 0.8}\n"
    )
    end = ", process_results: !function functions.function}"
    declared = json.dumps(task | {"metadata": {"version": 1, "share": True}})
    (tmp_path / "tasks" / "custom.yaml").write_text(declared[:-1] + end)
    perplexity = {
        "task": "texts", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{prompt}}",
    }  # fmt: skip
    (tmp_path / "tasks" / "texts.yaml").write_text(json.dumps(perplexity))
    given = [
        f"--base={tmp_path / 'base'}", f"--output={tmp_path / 'eval.json'}",
        f"--lm-eval-include-path={tmp_path / 'tasks'}",
    ]  # fmt: skip
    both = ["--lm-eval-tasks=rows", "--lm-eval-domain-tasks=custom"]
    assert evaluate.main([*given, *both]) == 0
    [entry] = json.loads((tmp_path / "eval.json").read_text())["models"]
    assert entry["lm_eval"]["rows"]["metric"] == "acc_norm,none"
    assert entry["lm_eval"]["custom"]["score"] == pytest.approx(0.8)
    assert [entry["lm_eval"][name]["general"] for name in ("rows", "custom")] == [True, False]
    monkeypatch.setattr(suite, "measure", lambda *_, **__: pytest.fail("a model was loaded"))
    (tmp_path / "eval.json").unlink()
    capsys.readouterr()
    assert evaluate.main([*given, "--lm-eval-domain-tasks=texts"]) == 3
    assert "word_perplexity is better when lower" in capsys.readouterr().err
    (tmp_path / "tasks" / "custom.yaml").write_text(json.dumps(task)[:-1] + end)
    assert evaluate.main([*given, "--lm-eval-tasks=custom"]) == 3
    assert "acc_norm is not known to be a share" in capsys.readouterr().err
