"""Run a program's main function on forked ranks, as torchrun would run the program."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# The stages import these when they run: here once, and not in every rank.
import megatron.core.dist_checkpointing.strategies.filesystem_async
import megatron.core.dist_checkpointing.strategies.torch  # noqa: F401
import numpy.ma  # noqa: F401
import torch._dynamo  # noqa: F401 - by the first optimizer: a second

import megatron_replay.collection.run
import megatron_replay.training.train  # noqa: F401
from megatron_replay import stage0, stage1
from megatron_replay.checkpoint import training
from megatron_replay.collection.run import COST_FILE
from megatron_replay.locks import LOCK_FILE
from megatron_replay.training.metrics import read_metrics
from tests import pool
from tools import convert_checkpoint

MAINS: dict[str, Callable[[Sequence[str]], int]] = {"stage0": stage0.main, "stage1": stage1.main}


def _main(
    rank: int, world_size: int, stage: str, argv: list[str], before: Callable[[int], None] | None
) -> tuple[int, str, str]:
    if before is not None:
        before(rank)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = MAINS[stage](argv)
    return code, out.getvalue(), err.getvalue()


def run(
    stage: str,
    *argv: object,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    before: Callable[[int], None] | None = None,
) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each rank; ``before(rank)`` runs first in each."""
    layout = ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]
    return pool.run(tp * pp * dp, _main, stage, [*map(str, argv), *layout], before)


def succeed(stage: str, *argv: object, **layout: Any) -> str:
    """Run, insist on success, return everything the ranks wrote."""
    results = run(stage, *argv, **layout)
    assert [code for code, _, _ in results] == [0] * len(results), results
    return "".join(out + err for _, out, err in results)


def fail(stage: str, *argv: object, code: int, **layout: Any) -> str:
    """Run, insist that every rank leaves with ``code``, return rank 0's one line of error."""
    results = run(stage, *argv, **layout)
    assert [c for c, _, _ in results] == [code] * len(results), results
    lines = [line for line in results[0][2].splitlines() if line.startswith("error")]
    assert len(lines) == 1, results[0][2]
    assert "Traceback" not in results[0][2], results[0][2]
    return lines[0]


def _convert(rank: int, world_size: int, argv: list[str]) -> int:
    sys.argv = ["convert_checkpoint", *argv]
    return convert_checkpoint.main()


def convert(load: Path, save: Path, *argv: object) -> None:
    """Convert a checkpoint on one process, and insist on success."""
    assert pool.run(1, _convert, list(map(str, ["--load", load, "--save", save, *argv]))) == [0]


def inputs(folder: Path) -> list[object]:
    """Flags of both stages for the checkpoint and the corpus of conftest.py's folder."""
    return ["--load", folder / "model", "--data-path", folder / "corpus", "--seq-length", 64]


def argv(folder: Path, save: Path, *extra: object) -> list[object]:
    """Flags of Stage 1 for that folder with its store."""
    probe = [] if "--probe-interval" in extra else ["--probe-interval", 3, "--probe-documents", 8]
    return [
        *inputs(folder), "--store", folder / "store", "--save", save, "--lr", 1e-3,
        "--global-batch-size", 4, *probe, *extra,
    ]  # fmt: skip


def weights(save: Path) -> dict[str, bytes]:
    """Files of the newest checkpoint that hold tensors, by name."""
    iteration = training.latest_iteration(save)
    assert iteration is not None
    newest = training.iteration_directory(save, iteration)
    return {p.name: p.read_bytes() for p in newest.iterdir() if p.suffix == ".distcp"}


def losses(save: Path) -> list[float]:
    """The losses that a run logged, in order."""
    return [line["loss"] for line in read_metrics(save / "metrics.jsonl") if "loss" in line]


def same_tree(ours: Path, theirs: Path) -> None:
    """Assert that two directories hold the same files with the same bytes; times may differ."""
    ours_held, held = _held(ours), _held(theirs)
    assert ours_held.keys() == held.keys()
    for name, content in held.items():
        assert ours_held[name] == content, name


def _held(directory: Path) -> dict[str, bytes]:
    files = (
        p for p in directory.rglob("*") if p.is_file() and p.name not in (COST_FILE, LOCK_FILE)
    )
    return {str(p.relative_to(directory)): p.read_bytes() for p in files}
