"""Tasks of the lm-evaluation-harness: from local YAML files, on local data, without a network.

    score(task) = the first metric of the YAML file's metric_list, behind its first filter
    score(task without a list) = the first of lm-eval's defaults
    score(group) = the first metric that it aggregates

That the metric is a share is decided before a model is loaded (``lm_eval_metrics.py``).

The harness is an extra (``pip install 'megatron-replay[eval]'``) and is imported when it is used.
"""

from __future__ import annotations

import glob
import importlib.metadata
import io
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from transformers import AutoTokenizer, PreTrainedModel

from megatron_replay.errors import ConfigError, DataError
from megatron_replay.evaluation.language_model import replaced
from megatron_replay.evaluation.lm_eval_metrics import metric_of_group, metric_of_task
from megatron_replay.files import read_text, require_regular

Result = dict[str, Any]
#: For metrics whose standard error has no formula; a mean's has one.
_BOOTSTRAP_ITERATIONS = 1000
#: A mean of ones may differ from one in its last bit.
_ROUNDING = 1e-9
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
            "the lm-evaluation-harness is not installed, or not completely",
            where="--lm-eval-tasks",
            found=error,
            fix="Run: pip install 'megatron-replay[eval]'",
        ) from error


def task_files(include_path: Path) -> list[Path]:
    """Every file of the directory, and the local data that its YAML files name.

    Raises:
        DataError: there is no YAML file, one is not YAML, or something is not a regular file.
    """
    files = {path for path in _inside(include_path) if "__pycache__" not in path.parts}
    tasks = [path for path in files if path.name.endswith(("yaml", "yml"))]
    if not tasks:
        raise DataError("no task's YAML file here", where=include_path)
    for path in tasks:
        try:
            tree = yaml.compose(read_text(path, DataError))
            names = set(_named_data(tree))
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            raise DataError(f"not YAML: {error}", where=path) from error
        for name in names:
            for found in map(Path, glob.glob(name)):
                files.update(_inside(found))
    return sorted(files)


def _inside(path: Path) -> Iterator[Path]:
    """The file, or every file in the directory; lm-eval would wait for a pipe for ever."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if not file.is_dir():
            require_regular(file, DataError)
            yield file


def _named_data(tree: yaml.Node | None) -> Iterator[str]:
    """Strings under ``_DATA_KEYS``; tags such as ``!function`` are left alone."""
    nodes, seen = [(tree, False)], set()
    while nodes:
        node, below = nodes.pop()
        if (id(node), below) in seen:  # an alias: the whole of it may be beyond counting
            continue
        seen.add((id(node), below))
        if isinstance(node, yaml.MappingNode):
            nodes += [(value, below or key.value in _DATA_KEYS) for key, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            nodes += [(value, below) for value in node.value]
        elif isinstance(node, yaml.ScalarNode) and below:
            yield node.value


def read_metrics(tasks: LmEvalTasks, *, progress: bool) -> dict[str, str]:
    """The metric that is each task's score, decided before a model is loaded.

    Raises:
        ConfigError: the harness is not installed.
        DataError: a task is unknown or cannot be loaded, or its score is not known to be a share.
    """
    with _harness(tasks, progress) as manager:
        found = manager.load([*tasks.general, *tasks.domain])
    metrics = {}
    for name in (*tasks.general, *tasks.domain):
        if name in found["groups"]:
            group = found["groups"][name]
            parts = [_configuration(task) for task in group.get_all_tasks()]
            metrics[name] = metric_of_group(group.to_dict(), parts)
        elif name in found["tasks"]:
            metrics[name] = metric_of_task(*_configuration(found["tasks"][name]))
        else:
            raise DataError(
                "a tag has no score of its own",
                where=f"lm-eval task {name}",
                fix="Name its tasks",
            )
    return metrics


def _configuration(task: Any) -> tuple[Result, Result]:
    """Configuration and directions of a task that is loaded."""
    from lm_eval.api.task import ConfigurableTask

    config = dict(task.dump_config())
    if type(task) is not ConfigurableTask:  # its own class computes its metrics
        config["process_results"] = type(task).__name__
    return config, dict(task.higher_is_better())


def run_tasks(
    model: PreTrainedModel,
    tokenizer: Path,
    tasks: LmEvalTasks,
    metrics: Mapping[str, str],
    *,
    batch_size: int,
    progress: bool,
) -> Result:
    """Score of every task: ``{task: {"score", "metric", "standard_error", …}}``.

    Args:
        metrics: what `read_metrics` decided.

    Raises:
        DataError: a task cannot be run, or has no score.
    """
    with _harness(tasks, progress) as manager:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        backend = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        if model.generation_config.eos_token_id is None:
            # The harness would generate beyond the answer, up to its batch's longest.
            model.generation_config.eos_token_id = backend.eos_token_id
        results = simple_evaluate(
            HFLM(pretrained=model, tokenizer=backend, batch_size=batch_size),
            tasks=list(metrics),
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=_BOOTSTRAP_ITERATIONS,
        )
    return {
        name: task_score(results, name, metric) | {"general": name in tasks.general}
        for name, metric in metrics.items()
    }


@contextmanager
def _harness(tasks: LmEvalTasks, progress: bool) -> Iterator[Any]:
    """lm-eval's TaskManager of the directory, offline; refuses tasks that are not there."""
    names = [*tasks.general, *tasks.domain]
    with ExitStack() as stack:
        stack.enter_context(_offline())
        # Ours is a line a model, and nothing else.
        stack.enter_context(redirect_stdout(sys.stderr if progress else io.StringIO()))
        if not progress:
            stack.enter_context(redirect_stderr(io.StringIO()))
        require_lm_eval()
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        try:
            manager = TaskManager(include_path=str(tasks.include_path), include_defaults=False)
            for name in names:
                if name not in manager.all_tasks:
                    raise DataError(
                        "no such lm-eval task",
                        where=tasks.include_path,
                        expected=" or ".join(sorted(manager.all_tasks)[:8]) or "YAML files",
                        found=name,
                    )
            yield manager
        except DataError:
            raise
        except Exception as error:  # whatever a task's own functions and datasets raise
            raise DataError(
                f"lm-eval cannot run {', '.join(names)}: {type(error).__name__}: {error}",
                where=tasks.include_path,
            ) from error


def task_score(results: Mapping[str, Any], task: str, metric: str) -> Result:
    """One task's entry, from what the harness returned; of several filters the first counts.

    Raises:
        DataError: it has no such metric, or its value is no share.
    """
    where = f"lm-eval task {task}"
    values = results["results"].get(task, {})
    key = next((key for key in values if key.startswith(f"{metric},")), None)
    if key is None:
        raise DataError(
            f"the task gave no {metric}, which it lists first", where=where, found=", ".join(values)
        )
    score = float(values[key])
    if not -_ROUNDING <= score <= 1 + _ROUNDING:
        raise DataError(
            f"{metric} is not the share that it was taken for",
            where=where,
            expected="a number from 0 to 1",
            found=score,
            fix="List another metric first, or let it give a share",
        )
    error = values.get(key.replace(",", "_stderr,", 1))
    return {
        "score": score,
        "metric": key,
        "standard_error": float(error) if isinstance(error, float) else None,
        "questions": values.get("sample_len"),
    }


@contextmanager
def _offline() -> Iterator[None]:
    """Nothing is fetched or kept, whatever was imported before: variables are read only then."""
    import huggingface_hub.constants

    with ExitStack() as stack:
        stack.enter_context(replaced(os.environ, "HF_HUB_OFFLINE", "1"))
        stack.enter_context(replaced(os.environ, "HF_DATASETS_OFFLINE", "1"))
        # Its bootstrap would fork from this process, which has threads, and might never return.
        stack.enter_context(replaced(os.environ, "DISABLE_MULTIPROC", "1"))
        stack.enter_context(replaced(vars(huggingface_hub.constants), "HF_HUB_OFFLINE", True))
        try:
            import datasets.config
        except ImportError:
            pass  # reported by `require_lm_eval`
        else:
            known = vars(datasets.config)
            stack.enter_context(replaced(known, "HF_HUB_OFFLINE", True))
            # Its cache gives yesterday's rows for a local file that has changed since.
            cache = stack.enter_context(TemporaryDirectory(prefix="lm-eval-"))
            stack.enter_context(replaced(known, "HF_DATASETS_CACHE", Path(cache)))
        yield
