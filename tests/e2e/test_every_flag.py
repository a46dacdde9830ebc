"""Every flag of both stages changes what a run does, or is refused. None is without effect.

A run is observed from outside (exit code, metrics, files and what they hold, what is printed) and,
where a flag is to change nothing but the cost, by what the run was built with.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import typing
from typing import Any

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_replay import parallel
from megatron_replay.collection import collector
from megatron_replay.config import Stage0Config, Stage1Config, flag_name
from megatron_replay.training import batches, build, train
from tests import pool, tiny
from tests.e2e import stages

pytestmark = pytest.mark.distributed

#: Of each flag: its value, and what goes along in both runs that are compared.
BOTH: dict[str, list[str]] = {
    "tensor_model_parallel_size": ["2"],
    "pipeline_model_parallel_size": ["2"],
    "platform": ["nonsense"],
    "distributed_timeout_minutes": ["3"],
    "batch_p2p_comm": ["no"],
    "bf16": [""],
    "seq_length": ["40"],
    "long_documents": ["truncate", "--seq-length", "24"],
    "micro_batch_size": ["2"],
    "share_prefixes": ["no"],
    "seed": ["5"],
}
STAGE1: dict[str, list[str]] = {
    **BOTH,
    "sequence_parallel": ["", "--tensor-model-parallel-size", "1"],
    "load": ["OTHER", "--allow-other-store"],
    "data_path": ["TEXT", "--loss", "full"],
    "loss": ["full"],
    "store": ["LOGITS", "--candidate-scope", "document"],
    "allow_other_store": ["", "--load", "OTHER"],
    "candidate_scope": ["document"],
    "tail": ["ghost"],
    "kl_weight": ["0.5", "--store", "LOGITS"],
    "head_backend": ["torch"],
    "optimizer": ["adamw"],
    "lr": ["2e-3"],
    "min_lr": ["1e-3"],
    "lr_decay_style": ["constant"],
    "lr_warmup_iters": ["1"],
    "weight_decay": ["0.5"],
    "clip_grad": ["0.01"],
    "adam_beta1": ["0.5"],
    "adam_beta2": ["0.5"],
    "use_distributed_optimizer": [""],
    "angle_scope": ["tensor"],
    "max_angle": ["1"],
    "obtuse": ["zero", "--lr", "1"],
    "mofo_fraction": ["0.5", "--optimizer", "mofo"],
    "qk_clip_threshold": ["0.01", *"--optimizer muonclip --load LLAMA --allow-other-store".split()],
    "save": ["ELSEWHERE"],
    "global_batch_size": ["1"],
    "pack_documents": ["no"],
    "group_prefixes": ["4"],
    "train_epochs": ["2"],
    "train_iters": ["1"],
    "save_interval": ["1"],
    "keep_last": ["1", "--save-interval", "1"],
    "exit_interval": ["1"],
    "recompute_granularity": ["full"],
    "profile": ["", "--train-iters", "4"],
    "log_interval": ["2"],
    "probe_interval": ["1"],
    "probe_documents": ["2"],
    "general_data_path": ["TEXT"],
}
STAGE0: dict[str, list[str]] = {
    **BOTH,
    "sequence_parallel": [""],
    "load": ["OTHER"],
    "data_path": ["TEXT"],
    "store": ["ELSEWHERE"],
    "coverage": ["0.5"],
    "max_candidates": ["9"],
    "position_strategy": ["all"],
    "position_fraction": ["1"],
    "last_n": ["2", "--position-strategy", "last-token"],
    "store_logits": ["bf16"],
    "documents_per_shard": ["5"],
    "shards": ["0:1", "--documents-per-shard", "5"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    small = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32}
    folder = stages.prepare(tmp_path_factory.mktemp("flags"), documents=12, stems=3, **small)
    tiny.save_corpus(folder / "text", num_documents=12, seed=4)
    tiny.save_qwen3(folder / "other", tied=True, seed=7, **small)
    tiny.save_llama(folder / "llama", tied=True, num_hidden_layers=1)
    logits = ["--store-logits", "fp16", "--position-strategy", "random", "--coverage", 0.6]
    stages.succeed("stage0", *stages.inputs(folder), "--store", folder / "logits", *logits)
    return folder


def observe(rank: int, world_size: int, stage: str, argvs: list[list[str]]) -> list[Any]:
    """Each of several runs in this process, from outside and by what it was built with."""
    return [observe_one(stage, argv) for argv in argvs]


def observe_one(stage: str, argv: list[str]) -> Any:
    built: list[Any] = []

    def noting(owner, name, note):
        call = getattr(owner, name)

        def noted(*args, **kwargs):
            built.append((name, note(*args, **kwargs)))
            return call(*args, **kwargs)

        setattr(owner, name, noted)
        return owner, name, call

    patches = [
        noting(parallel, "build_groups", lambda config, device: config.distributed_timeout_minutes),
        noting(train, "Loader", lambda make, steps, depth: depth),
        noting(build, "load_model", lambda *_, recompute: recompute),
        noting(build, "wrap_for_training", lambda model, **options: sorted(options.items())),
        noting(batches, "pack_batch", lambda corpus, forest, *_, **__: forest.computed),
        noting(batches, "MicroBatch", lambda batch, head, rows: rows is None),
        noting(collector, "pack_batch", lambda corpus, forest, *_, **__: forest.computed),
        noting(collector, "select_candidates", lambda _, labels, **__: len(labels)),
    ]
    try:
        code, out, err = stages.main(0, 1, stage, argv, None)
    finally:
        for owner, name, call in reversed(patches):
            setattr(owner, name, call)
        parallel_state.destroy_model_parallel()  # what a refused run has left
        if dist.is_initialized():
            dist.destroy_process_group()
    printed = (re.sub(r"[\d.,]+", "#", text) for text in (out, err))
    return [code, *printed, repr(sorted(map(repr, built)))]


def held(directory) -> dict[str, Any]:
    """Files by name, and of what they hold what does not depend on time."""
    held = {}
    for path in directory.rglob("*"):
        name = re.sub(r"events\.out.*", "events", str(path.relative_to(directory)))
        if path.name == "metrics.jsonl":
            held[name] = [
                {k: v for k, v in json.loads(line).items() if not k.endswith("seconds")}
                for line in path.read_text().splitlines()
            ]
        elif path.suffix in (".distcp", ".bin", ".idx"):
            held[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.is_file():
            held[name] = None
    return held


def command(stage: str, folder, place, name: str, value: list[str]) -> list[str]:
    """A run in the folder ``place``; ``value``: what the flag gets, None to leave it out."""
    given, *context = value
    argv = stages.inputs(folder)
    if stage == "stage1":
        argv += ["--store", folder / "store", "--save", place / "out", "--lr", 1e-2,
                 "--global-batch-size", 2]  # fmt: skip
        argv += [] if name in ("train_epochs", "train_iters") else ["--train-iters", 3]
    else:
        argv += ["--store", place / "out"]
    flag = flag_name(name)
    changed = [flag.replace("--", "--no-")] if given == "no" else [flag, given] if given else [flag]
    places = {
        "OTHER": folder / "other", "LLAMA": folder / "llama", "TEXT": folder / "text",
        "LOGITS": folder / "logits", "ELSEWHERE": place / "elsewhere",
    }  # fmt: skip
    extra = [] if given is None else changed
    return [str(places.get(x, x)) for x in map(str, [*argv, *context, *extra])]


def observed(stage: str, runs: dict[Any, tuple[Any, list[str]]]) -> dict[Any, list[Any]]:
    """By key: what a run printed and was built with, the files it left, and its exit code."""
    [seen] = pool.run(1, observe, stage, [argv for _, argv in runs.values()])
    return {
        key: [[x.replace(str(place), "PLACE") for x in outside], held(place), code]
        for (key, (place, _)), (code, *outside) in zip(runs.items(), seen, strict=True)
    }


def alone(name: str, value: list[str]) -> tuple[str, ...]:
    """What the run without a flag depends on: flags that share it are compared with one run."""
    return (name if name.startswith("train_") else "", *value[1:])


@pytest.mark.parametrize(("stage", "table"), [("stage1", STAGE1), ("stage0", STAGE0)])
def test_every_flag_changes_something_or_is_refused(folder, tmp_path, stage, table):
    root = {"stage0": Stage0Config, "stage1": Stage1Config}[stage]
    sections = typing.get_type_hints(root).values()
    fields = [field.name for section in sections for field in dataclasses.fields(section)]
    assert sorted(table) == sorted(fields), "the table lacks a flag, or has one too many"
    runs: dict[Any, tuple[Any, list[str]]] = {}
    for name, value in table.items():
        for key, given in ((alone(name, value), [None, *value[1:]]), (name, value)):
            place = tmp_path / f"{len(runs):04d}"
            runs.setdefault(key, (place, command(stage, folder, place, name, given)))
    again = tmp_path / "again"  # a run that is observed twice is the same: else nothing would show
    runs["again"] = again, command(stage, folder, again, "load", [None])
    found = observed(stage, runs)
    assert found["again"] == found[alone("load", [""])]
    for name, value in table.items():
        plain, changed = found[alone(name, value)], found[name]
        assert plain[2] == 0 or name in ("long_documents", "allow_other_store"), (name, plain)
        assert "Traceback" not in changed[0][1], (name, changed)
        assert plain != changed, f"{flag_name(name)} changes nothing"
