"""lm-eval: which number is a task's score, which files decide it, and, where it is, a real run."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_replay.errors import ConfigError, DataError
from megatron_replay.evaluation.lm_eval_tasks import require_lm_eval, task_files, task_score
from megatron_replay.evaluation.scores import domain_scores
from tests.evaluation.models import save_model
from tools import evaluate

#: What lm_eval 0.4.13 returned for a task, two groups, and a task with a perplexity, less the rest.
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
        "ppl": {"alias": "ppl", "word_perplexity,none": 9.0, "word_perplexity_stderr,none": "N/A"},
    },
    "group_subtasks": {"mean": ["plain"], "loose": ["plain", "ppl"]},
    "configs": {
        "plain": {"metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
        "ppl": {"output_type": "loglikelihood_rolling"},
    },
    "higher_is_better": {
        "plain": {"acc": True, "acc_norm": True}, "mean": {"exact_match": True},
        "ppl": {"word_perplexity": False},
    },
}  # fmt: skip


def test_the_score_is_the_first_metric_of_the_list() -> None:
    assert task_score(RESULTS, "plain", general=True) == {
        "score": 0.25, "metric": "acc,none", "higher_is_better": True, "share": True,
        "standard_error": 0.02, "questions": 300, "general": True,
    }  # fmt: skip
    found = task_score(RESULTS, "mean", general=False)
    assert (found["score"], found["metric"]) == (0.125, "exact_match,custom-extract")
    assert found["standard_error"] is None


def test_the_harness_has_metrics_in_an_order_of_its_own() -> None:
    listed = [{"metric": name} for name in ("f1", "acc_norm", "acc")]
    results = RESULTS | {"configs": {"plain": {"metric_list": listed}}}
    found = task_score(results, "plain", general=True)  # f1 has no value: a function's, say
    assert (found["score"], found["metric"]) == (0.5, "acc_norm,none")
    assert found["standard_error"] is None
    for without in ({}, {"plain": {}}, {"plain": {"metric_list": [{"metric": "f1"}]}}):
        found = task_score(RESULTS | {"configs": without}, "plain", general=True)
        assert found["metric"] == "acc,none"


def test_what_has_no_score_to_keep_is_refused() -> None:
    with pytest.raises(DataError, match=r"task loose: the group has no score .*plain,ppl"):
        task_score(RESULTS, "loose", general=True)
    with pytest.raises(DataError, match="task ppl: word_perplexity is better when lower"):
        task_score(RESULTS, "ppl", general=True)
    rouge = RESULTS | {"results": {"plain": {"rouge1,none": 35.0}}}
    with pytest.raises(DataError, match="task plain: rouge1 is no share from 0 to 1"):
        task_score(rouge, "plain", general=True)
    directions = {"mean": {"exact_match": None}}
    with pytest.raises(DataError, match=r"task mean: .*exact_match is better when lower in some"):
        task_score(RESULTS | {"higher_is_better": directions}, "mean", general=False)


def test_what_is_no_share_is_told() -> None:
    perplexity = task_score(RESULTS, "ppl", general=False)
    told = ("score", "higher_is_better", "share")
    assert [perplexity[key] for key in told] == [9.0, False, False]
    for name, value in (("rouge1", 35.0), ("bleu", 0.5), ("mcc", 0.5)):
        results = RESULTS | {"results": {"plain": {f"{name},none": value}}}
        assert [task_score(results, "plain", general=False)[key] for key in told] == [
            value, True, False
        ]  # fmt: skip


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


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"not installed.*pip install 'megatron-replay\[eval\]'"):
        require_lm_eval()


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
def test_a_real_run_takes_the_first_metric_of_the_list_and_its_direction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    names = ("acc_norm", "acc")
    metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in names]
    write_task(tmp_path, metric_list=metrics)
    rows = [{"prompt": f"{i}?", "options": ["x" * 9, "y"], "answer": i % 2} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [
        f"--base={tmp_path / 'base'}", f"--output={tmp_path / 'eval.json'}",
        f"--lm-eval-include-path={tmp_path / 'tasks'}",
    ]  # fmt: skip
    perplexity = {
        "task": "texts", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{prompt}}",
    }  # fmt: skip
    (tmp_path / "tasks" / "texts.yaml").write_text(json.dumps(perplexity))
    tasks = ["--lm-eval-tasks=rows", "--lm-eval-domain-tasks=texts"]
    assert evaluate.main([*given, *tasks]) == 0
    [entry] = json.loads((tmp_path / "eval.json").read_text())["models"]
    found, texts = entry["lm_eval"]["rows"], entry["lm_eval"]["texts"]
    assert (found["metric"], found["higher_is_better"], found["share"]) == (
        "acc_norm,none", True, True,
    )  # fmt: skip
    assert texts["metric"].endswith("perplexity,none")
    assert (texts["higher_is_better"], texts["share"]) == (False, False)
    assert texts["score"] > 1
    assert domain_scores(entry) == {}
    assert evaluate.main([*given, "--lm-eval-tasks=texts"]) == 3
