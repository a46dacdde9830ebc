"""Tasks of the lm-evaluation-harness: from local YAML files, on local data, without a network.

    score(task) = the first metric of the YAML file's metric_list, behind its first filter
    score(task without a list), score(group) = the first that lm-eval gives

The harness is an extra (``pip install 'megatron-replay[eval]'``) and is imported when it is used.
"""

from __future__ import annotations

import glob
import importlib.metadata
import io
import logging
import os
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from transformers import AutoTokenizer, PreTrainedModel

from megatron_replay.errors import ConfigError, DataError

Result = dict[str, Any]
#: For metrics whose standard error has no formula; a mean's has one.
_BOOTSTRAP_ITERATIONS = 1000
#: Metrics of lm-eval's own that are better when higher, but no shares: to 100, from -1, unbounded.
_NO_SHARES = ("bleu", "chrf", "chrf++", "mcc", "likelihood")
#: What may name local data in a task's YAML file.
_DATA_KEYS = ("data_files", "data_dir", "dataset_path")


@dataclass(frozen=True, kw_only=True)
class LmEvalTasks:
    """Which tasks.

    Attributes:
        general: tasks of general abilities.
        domain: tasks of the domain.
        include_path: directory of their YAML files.
    """

    general: tuple[str, ...]
    domain: tuple[str, ...]
    include_path: Path


def require_lm_eval() -> str:
    """The harness's version.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import lm_eval.models.huggingface  # noqa: F401

        return importlib.metadata.version("lm_eval")
    except ImportError as error:
        raise ConfigError(
            "the lm-evaluation-harness is not installed, or not wholly",
            where="--lm-eval-tasks",
            found=error,
            fix="Run: pip install 'megatron-replay[eval]'",
        ) from error


def task_files(include_path: Path) -> list[Path]:
    """Every file of the directory, and the local data that its YAML files name.

    Raises:
        DataError: there is no YAML file.
    """
    files = {path for path in include_path.rglob("*") if path.is_file()}
    files = {path for path in files if "__pycache__" not in path.parts}
    tasks = [path for path in files if path.name.endswith(("yaml", "yml"))]
    if not tasks:
        raise DataError("no task's YAML file here", where=include_path)
    for path in tasks:
        try:
            tree = yaml.compose(path.read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise DataError(f"not YAML: {error}", where=path) from error
        for name in _named_data(tree):
            for found in map(Path, glob.glob(name)):
                inside = found.rglob("*") if found.is_dir() else [found]
                files |= {file for file in inside if file.is_file()}
    return sorted(files)


def _named_data(node: yaml.Node | None, below: bool = False) -> Iterator[str]:
    """Strings under ``_DATA_KEYS``; tags such as ``!function`` are left alone."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _named_data(value, below or key.value in _DATA_KEYS)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _named_data(value, below)
    elif isinstance(node, yaml.ScalarNode) and below:
        yield node.value


def run_tasks(
    model: PreTrainedModel,
    tokenizer: Path,
    tasks: LmEvalTasks,
    *,
    batch_size: int,
    progress: bool,
) -> Result:
    """Score of every task: ``{task: {"score", "metric", "standard_error", …}}``.

    Raises:
        ConfigError: the harness is not installed, or has no use for this tokenizer.
        DataError: a task is unknown, cannot be run, or has no score.
    """
    if not tokenizer.is_dir():
        raise ConfigError(
            "lm-eval reads no such tokenizer",
            where="--tokenizer",
            expected="a Hugging Face directory",
            found=tokenizer,
        )
    names = [*tasks.general, *tasks.domain]
    with ExitStack() as stack:
        stack.enter_context(_offline())
        if not progress:
            stack.enter_context(redirect_stderr(io.StringIO()))
        require_lm_eval()
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        try:
            manager = TaskManager(include_path=str(tasks.include_path), include_defaults=False)
            _require_known(names, manager.all_tasks, tasks.include_path)
            backend = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
            if model.generation_config.eos_token_id is None:
                # The harness would go on behind the answer, as far as its batch's longest.
                model.generation_config.eos_token_id = backend.eos_token_id
            results = simple_evaluate(
                HFLM(pretrained=model, tokenizer=backend, batch_size=batch_size),
                tasks=names,
                task_manager=manager,
                log_samples=False,
                bootstrap_iters=_BOOTSTRAP_ITERATIONS,
            )
        except DataError:
            raise
        except Exception as error:  # whatever a task's own functions and datasets raise
            raise DataError(
                f"lm-eval cannot run {', '.join(names)}: {type(error).__name__}: {error}",
                where=tasks.include_path,
            ) from error
    return {name: task_score(results, name, general=name in tasks.general) for name in names}


def _require_known(names: list[str], known: list[str], where: Path) -> None:
    for name in names:
        if name not in known:
            raise DataError(
                "no such lm-eval task",
                where=where,
                expected=" or ".join(sorted(known)[:8]) or "YAML files with a task",
                found=name,
            )


def task_score(results: Mapping[str, Any], task: str, *, general: bool) -> Result:
    """One task's entry, from what the harness returned.

    Raises:
        DataError: it has no metric, or a general one that is better when lower or no share of
            one: retention is a percentage of the base's score.
    """
    values = results["results"].get(task, {})
    metrics = [key for key in values if "," in key and not key.split(",")[0].endswith("_stderr")]
    # The harness has them in the order of its own code. A group has no configuration.
    listed = results.get("configs", {}).get(task, {}).get("metric_list") or []
    order = [entry["metric"] for entry in listed]
    metrics.sort(key=lambda key: [*order, key.split(",")[0]].index(key.split(",")[0]))
    if not metrics:
        parts = results.get("group_subtasks", {}).get(task, [])
        raise DataError(
            "the group has no score of its own" if parts else "the task has no score",
            where=f"lm-eval task {task}",
            fix=f"Name its tasks: {','.join(parts)}" if parts else None,
        )
    metric, _, filtered = metrics[0].partition(",")
    score = float(values[metrics[0]])
    higher_is_better = results["higher_is_better"].get(task, {}).get(metric, True)
    if higher_is_better is None:
        raise DataError(
            f"of the group's tasks, {metric} is better when lower in some only",
            where=f"lm-eval task {task}",
            fix="Name its tasks",
        )
    # A function of the task's own may give per cent.
    share = higher_is_better and metric not in _NO_SHARES and not score > 1
    if general and not share:
        kind = "no share from 0 to 1" if higher_is_better else "better when lower"
        raise DataError(
            f"{metric} is {kind}, so no percentage of it can be kept",
            where=f"lm-eval task {task}",
            fix="List another metric first; --lm-eval-domain-tasks shows this one by itself, "
            "outside the domain's mean",
        )
    error = values.get(f"{metric}_stderr,{filtered}")
    return {
        "score": score,
        "metric": metrics[0],
        "higher_is_better": higher_is_better,
        "share": share,
        "standard_error": float(error) if isinstance(error, float) else None,
        "questions": values.get("sample_len"),
        "general": general,
    }


@contextmanager
def _offline() -> Iterator[None]:
    """Nothing is fetched or kept, whatever was imported before: variables are read only then."""
    import huggingface_hub.constants

    with ExitStack() as stack:
        stack.enter_context(_replaced(os.environ, "HF_HUB_OFFLINE", "1"))
        stack.enter_context(_replaced(os.environ, "HF_DATASETS_OFFLINE", "1"))
        stack.enter_context(_replaced(vars(huggingface_hub.constants), "HF_HUB_OFFLINE", True))
        try:
            import datasets.config
        except ImportError:
            pass  # `require_lm_eval` says so
        else:
            known = vars(datasets.config)
            stack.enter_context(_replaced(known, "HF_HUB_OFFLINE", True))
            # Its cache gives yesterday's rows for a local file that has changed since.
            cache = stack.enter_context(TemporaryDirectory(prefix="lm-eval-"))
            stack.enter_context(_replaced(known, "HF_DATASETS_CACHE", Path(cache)))
        yield


@contextmanager
def _replaced(values: MutableMapping[str, Any], name: str, value: Any) -> Iterator[None]:
    before = values.get(name)
    values[name] = value
    try:
        yield
    finally:
        if before is None:
            del values[name]
        else:
            values[name] = before
