"""What an lm-eval task's score means: which metric it is, and whether that is a share of one.

Decided from the task's configuration, before any model is measured, and never from a score: 0.8
may be 80 % or 0.8 %. A metric is known to be a share where the harness itself computes it (no
``process_results``, no function or hf_evaluate in ``metric_list``) and it is one of ``_SHARES``; of
any other, the task's YAML file says so:

    metadata: {share: true}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_replay.errors import DataError

_MEANS = ("mean", "nanmean", "median")
#: The harness's own metrics that lie in [0, 1], with the aggregations that keep them there
#: (lm_eval/api/metrics.py and ConfigurableTask.process_results of 0.4.13): a question is right or
#: wrong, and sklearn's f1.
_SHARES = {
    "acc": _MEANS, "acc_norm": _MEANS, "acc_bytes": _MEANS, "acc_mutual_info": _MEANS,
    "exact_match": _MEANS, "f1": ("f1",),
}  # fmt: skip
#: A mean of ones may differ from one in its last bit.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Metric:
    """The metric that is a task's score.

    Attributes:
        name: without the filter.
        share: it lies in [0, 1], and more is better.
        higher_is_better: as the task says.
        declared: the task's YAML file says whether it is a share.
    """

    name: str
    share: bool
    higher_is_better: bool
    declared: bool


def metric_of_task(
    config: Mapping[str, Any], directions: Mapping[str, bool], name: str | None = None
) -> Metric:
    """Decide about one metric of a task.

    Args:
        config: the task's ``dump_config()``.
        directions: its ``higher_is_better()``, in the order of its metric_list.
        name: of the metric; None: the first.

    Raises:
        DataError: it has no metric, or its metadata's ``share`` is neither true nor false.
    """
    where = f"lm-eval task {config.get('task')}"
    if not directions:
        raise DataError("the task has no metric", where=where, expected="a metric_list")
    name = name or next(iter(directions))
    declared = _declared(config.get("metadata"), where)
    share = _is_known(config, name) if declared is None else declared
    better = bool(directions.get(name, True))
    return Metric(name, share and better, better, declared is not None)


def metric_of_group(
    group: Mapping[str, Any], tasks: Sequence[tuple[Mapping[str, Any], Mapping[str, bool]]]
) -> Metric:
    """Decide about the first metric that a group aggregates.

    Args:
        group: its ``to_dict()``.
        tasks: configuration and directions of each of its tasks.

    Raises:
        DataError: it aggregates none, none of its tasks has it, or they disagree in its direction.
    """
    where = f"lm-eval task {group.get('group')}"
    names = ",".join(str(config.get("task")) for config, _ in tasks)
    aggregated = group.get("aggregate_metric_list")
    if not aggregated:
        raise DataError(
            "the group has no score of its own", where=where, fix=f"Name its tasks: {names}"
        )
    name = aggregated[0]["metric"]
    metrics = [metric_of_task(*task, name) for task in tasks if name in task[1]]
    if not metrics:
        raise DataError(f"none of the group's tasks has {name}", where=where)
    if len({metric.higher_is_better for metric in metrics}) > 1:
        raise DataError(
            f"of the group's tasks, {name} is better when lower in some only",
            where=where,
            fix=f"Name its tasks: {names}",
        )
    declared = _declared(group.get("metadata"), where)
    share = all(metric.share for metric in metrics) if declared is None else declared
    better = metrics[0].higher_is_better
    return Metric(name, share and better, better, declared is not None)


def require_share(task: str, metric: Metric) -> None:
    """Raise DataError unless what is kept of the score can be a percentage of the base's."""
    if metric.share:
        return
    why = "better when lower"
    if metric.higher_is_better:
        why = "not known to be a share from 0 to 1"
        if metric.declared:
            why = "no share from 0 to 1, by its metadata"
    raise DataError(
        f"{metric.name} is {why}, so no percentage of it can be kept",
        where=f"lm-eval task {task}",
        fix="If it is one, add `metadata: {share: true}` to the task's YAML file; if not, list "
        "another metric first, or give the task as --lm-eval-domain-tasks, which shows the metric "
        "by itself, outside the domain's mean",
    )


def require_within(task: str, metric: Metric, score: float) -> None:
    """Raise DataError if a share is not one, which shows only now."""
    if metric.share and not -_ROUNDING <= score <= 1 + _ROUNDING:
        raise DataError(
            f"{metric.name} is not the share that it was taken for",
            where=f"lm-eval task {task}",
            expected="a number from 0 to 1",
            found=score,
            fix="Say `metadata: {share: false}` in the task's YAML file, or let it give a share",
        )


def _declared(metadata: Any, where: str) -> bool | None:
    """What the metadata says, None where nothing."""
    share = metadata.get("share") if isinstance(metadata, Mapping) else None
    if share is not None and not isinstance(share, bool):
        raise DataError(
            "cannot read the metadata's 'share'", where=where, expected="true or false", found=share
        )
    return share


def _is_known(config: Mapping[str, Any], name: str) -> bool:
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
