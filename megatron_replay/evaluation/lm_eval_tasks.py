"""Tasks of the lm-evaluation-harness: from local YAML files, on local data, without a network.

    score(task) = the first metric of the YAML file's metric_list, behind its first filter
    score(task without a list) = the first of lm-eval's defaults
    score(group) = the first metric that it aggregates

Scores are compared as percentages of the base's, so a score must be a share from 0 to 1, where more
is better. That is decided from the task's configuration before a model is loaded, never from a
score: 0.8 may be 80 % or 0.8 %. A metric is known to be a share where the harness itself computes
it (no ``process_results``, no function or hf_evaluate in ``metric_list``) and it is one of
``_SHARES``; of any other, the task's YAML file must declare it: ``metadata: {share: true}``.

The harness is an extra (``pip install 'megatron-replay[eval]'``) and is imported when it is used.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from megatron_replay.errors import ConfigError, DataError
from megatron_replay.evaluation.inputs import Inputs, Settings
from megatron_replay.evaluation.language_model import replaced

Result = dict[str, Any]
_MEANS = ("mean", "nanmean", "median")
#: The harness's own metrics in [0, 1], with the aggregations that keep them there
#: (lm_eval/api/metrics.py and ConfigurableTask.process_results of 0.4.13): a question is right or
#: wrong, and sklearn's f1.
_SHARES = {
    "acc": _MEANS, "acc_norm": _MEANS, "acc_bytes": _MEANS, "acc_mutual_info": _MEANS,
    "exact_match": _MEANS, "f1": ("f1",),
}  # fmt: skip
#: For metrics whose standard error has no formula; a mean's has one.
_BOOTSTRAP_ITERATIONS = 1000
#: A mean of ones may differ from one in its last bit.
_ROUNDING = 1e-9


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


def read_metrics(inputs: Inputs) -> dict[str, str]:
    """The metric that is each task's score, decided before a model is loaded.

    Raises:
        ConfigError: the harness is not installed.
        DataError: a task is unknown or cannot be loaded, or its score is not known to be a share.
    """
    with _harness(inputs) as manager:
        found = manager.load(list(inputs.tasks))
    metrics = {}
    for name in inputs.tasks:
        if name in found["groups"]:
            group = found["groups"][name]
            parts = [_configuration(task) for task in group.get_all_tasks()]
            metrics[name] = share_metric(name, parts, group.to_dict())
        elif name in found["tasks"]:
            metrics[name] = share_metric(name, [_configuration(found["tasks"][name])])
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


def share_metric(
    name: str,
    tasks: Sequence[tuple[Mapping[str, Any], Mapping[str, bool]]],
    group: Mapping[str, Any] | None = None,
) -> str:
    """The metric that is the score of a task or group, once it is known to be a share.

    Args:
        tasks: each one's ``dump_config()``, and its ``higher_is_better()`` in the order of its
            metric_list; the task itself, or those of the group.
        group: its ``to_dict()``.

    Raises:
        DataError: it has no metric, or the metric is no share in one of its tasks.
    """
    where = f"lm-eval task {name}"
    if group is None:
        metric = next(iter(tasks[0][1]), None)
    else:
        metric = (group.get("aggregate_metric_list") or [{}])[0].get("metric")
    having = [task for task in tasks if metric in task[1]]
    if metric is None or not having:
        names = ",".join(str(config.get("task")) for config, _ in tasks)
        raise DataError(
            f"no task of this group has {metric}" if metric else "it has no score of its own",
            where=where,
            expected="a metric_list, or for a group an aggregate_metric_list",
            fix=f"Name its tasks: {names}" if group else None,
        )
    for config, directions in having:
        is_share = _is_declared(group or {}, where) or _is_declared(config, where)
        why = "better when lower" if not directions[metric] else "not known to be a share"
        if directions[metric] and (is_share or _is_known(config, metric)):
            continue
        raise DataError(
            f"{metric} is {why}, so no percentage of it can be kept",
            where=f"lm-eval task {config.get('task')}",
            expected="a share from 0 to 1, where more is better",
            fix="If it is one, add `metadata: {share: true}` to the task's YAML file; if not, list "
            "another metric first",
        )
    return metric


def _is_declared(config: Mapping[str, Any], where: str) -> bool:
    """Whether the metadata declares the score to be a share."""
    metadata = config.get("metadata")
    share = metadata.get("share", False) if isinstance(metadata, Mapping) else False
    if not isinstance(share, bool):
        raise DataError(
            "cannot read the metadata's 'share'", where=where, expected="true or false", found=share
        )
    return share


def _is_known(config: Mapping[str, Any], name: str) -> bool:
    """Whether the harness itself computes the metric, and it is one of its shares."""
    if config.get("process_results") is not None or name not in _SHARES:
        return False
    if (listed := config.get("metric_list")) is None:  # the harness's defaults
        return True
    entries = [entry for entry in listed if entry.get("metric") == name]
    aggregations = (None, *_SHARES[name])  # None: the harness's own for it
    return bool(entries) and all(
        entry.get("aggregation") in aggregations and not entry.get("hf_evaluate")
        for entry in entries
    )


def run_tasks(
    model: PreTrainedModel,
    tokenizer: Path,
    inputs: Inputs,
    metrics: Mapping[str, str],
    settings: Settings,
) -> Result:
    """Score of every task: ``{task: {"score", "metric", "standard_error", …}}``.

    Args:
        metrics: what `read_metrics` decided.
        settings: a chat template and a BOS token that it does not decide are the harness's matter:
            no template, and the tokenizer's BOS.

    Raises:
        DataError: a task cannot be run, or has no score.
    """
    with _harness(inputs) as manager:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        backend = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        if model.generation_config.eos_token_id is None:
            # The harness would generate beyond the answer, up to its batch's longest.
            model.generation_config.eos_token_id = backend.eos_token_id
        results = simple_evaluate(
            HFLM(
                pretrained=model,
                tokenizer=backend,
                batch_size=settings.batch_size,
                add_bos_token=settings.add_bos,
            ),
            tasks=list(metrics),
            apply_chat_template=bool(settings.chat_template),
            system_instruction=settings.system_prompt if settings.chat_template else None,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=_BOOTSTRAP_ITERATIONS,
        )
    return {
        name: task_score(results, name, metric) | {"general": name in inputs.lm_eval_tasks}
        for name, metric in metrics.items()
    }


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
def _harness(inputs: Inputs) -> Iterator[Any]:
    """lm-eval's TaskManager of the directory, offline; refuses tasks that are not there."""
    # Standard output is ours: a line a model, and nothing else.
    with _offline(), redirect_stdout(sys.stderr):
        require_lm_eval()
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        try:
            manager = TaskManager(
                include_path=str(inputs.lm_eval_include_path), include_defaults=False
            )
            for name in inputs.tasks:
                if name not in manager.all_tasks:
                    raise DataError(
                        "no such lm-eval task",
                        where=inputs.lm_eval_include_path,
                        expected=" or ".join(sorted(manager.all_tasks)[:8]) or "YAML files",
                        found=name,
                    )
            yield manager
        except DataError:
            raise
        except Exception as error:  # whatever a task's own functions and datasets raise
            raise DataError(
                f"lm-eval cannot run {', '.join(inputs.tasks)}: {type(error).__name__}: {error}",
                where=inputs.lm_eval_include_path,
            ) from error


@contextmanager
def _offline() -> Iterator[None]:
    """Nothing is fetched or kept, whatever was imported before: variables are read only then."""
    import huggingface_hub.constants

    # DISABLE_MULTIPROC: its bootstrap would fork from this process, which has threads, and might
    # never return.
    variables = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "DISABLE_MULTIPROC": "1"}
    with ExitStack() as stack:
        stack.enter_context(replaced(os.environ, **variables))
        stack.enter_context(replaced(vars(huggingface_hub.constants), HF_HUB_OFFLINE=True))
        try:
            import datasets.config
        except ImportError:
            pass  # reported by `require_lm_eval`
        else:
            # Its cache gives yesterday's rows for a local file that has changed since.
            cache = Path(stack.enter_context(TemporaryDirectory(prefix="lm-eval-")))
            known = vars(datasets.config)
            stack.enter_context(replaced(known, HF_HUB_OFFLINE=True, HF_DATASETS_CACHE=cache))
        yield
