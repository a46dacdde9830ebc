"""Which metric is an lm-eval task's score, and whether it is a share from 0 to 1.

Scores are compared as percentages of the base's, so a score must be a share from 0 to 1, where more
is better. That is decided from the task's configuration before a model is loaded, never from a
score: 0.8 may be 80 % or 0.8 %. A metric is known to be a share where the harness itself computes
it (no ``process_results``, no function or hf_evaluate in ``metric_list``) and it is one of
``_SHARES``; of any other, the task's YAML file must declare it: ``metadata: {share: true}``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_replay.errors import DataError

_MEANS = ("mean", "nanmean", "median")
#: The harness's own metrics in [0, 1], with the aggregations that keep them there
#: (lm_eval/api/metrics.py and ConfigurableTask.process_results of 0.4.13): a question is right or
#: wrong, and sklearn's f1.
_SHARES = {
    "acc": _MEANS, "acc_norm": _MEANS, "acc_bytes": _MEANS, "acc_mutual_info": _MEANS,
    "exact_match": _MEANS, "f1": ("f1",),
}  # fmt: skip


def metric_of_task(
    config: Mapping[str, Any], directions: Mapping[str, bool], name: str | None = None
) -> str:
    """The metric that is a task's score, once it is known to be a share.

    Args:
        config: the task's ``dump_config()``.
        directions: its ``higher_is_better()``, in the order of its metric_list.
        name: the metric; None: the first.

    Raises:
        DataError: it has no metric, or the metric is better when lower or not known to be a share.
    """
    where = f"lm-eval task {config.get('task')}"
    if not directions:
        raise DataError("the task has no metric", where=where, expected="a metric_list")
    name = name or next(iter(directions))
    why = "not known to be a share from 0 to 1"
    if not directions.get(name, True):
        why = "better when lower"
    elif _is_declared(config, where) or _is_known(config, name):
        return name
    raise DataError(
        f"{name} is {why}, so no percentage of it can be kept",
        where=where,
        fix="If it is a share, add `metadata: {share: true}` to the task's YAML file; if not, list "
        "another metric first",
    )


def metric_of_group(
    group: Mapping[str, Any], tasks: Sequence[tuple[Mapping[str, Any], Mapping[str, bool]]]
) -> str:
    """The first metric that a group aggregates, once it is known to be a share in all its tasks.

    Args:
        group: its ``to_dict()``.
        tasks: configuration and directions of each of its tasks.

    Raises:
        DataError: it aggregates none, none of its tasks has it, or it is no share in one of them.
    """
    where = f"lm-eval task {group.get('group')}"
    if not (aggregated := group.get("aggregate_metric_list")):
        names = ",".join(str(config.get("task")) for config, _ in tasks)
        raise DataError(
            "the group has no score of its own", where=where, fix=f"Name its tasks: {names}"
        )
    name: str = aggregated[0]["metric"]
    if not any(name in directions for _, directions in tasks):
        raise DataError(f"none of the group's tasks has {name}", where=where)
    declared = {"metadata": {"share": True}} if _is_declared(group, where) else {}
    for config, directions in tasks:
        if name in directions:
            metric_of_task({**config, **declared}, directions, name)
    return name


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
