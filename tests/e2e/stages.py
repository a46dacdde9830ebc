"""Run a program's main function on forked ranks, as torchrun would run the program."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# The stages import these when they run: here once, and not in every rank.
import megatron.core.dist_checkpointing.strategies.filesystem_async
import megatron.core.dist_checkpointing.strategies.torch  # noqa: F401
import numpy.ma  # noqa: F401
import torch._dynamo  # noqa: F401 - by the first optimizer: a second

from megatron_replay import stage0, stage1
from megatron_replay.checkpoint import directories
from megatron_replay.collection.run import COST_FILE
from megatron_replay.locks import LOCK_FILE
from megatron_replay.run_log import read_metrics
from megatron_replay.training import train
from tests import pool, tiny
from tools import convert_checkpoint

MAINS: dict[str, Callable[[Sequence[str]], int]] = {"stage0": stage0.main, "stage1": stage1.main}


def main(
    rank: int, world_size: int, stage: str, argv: list[str], before: Callable[[int], None] | None
) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a stage in this process."""
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
    return pool.run(tp * pp * dp, main, stage, [*map(str, argv), *layout], before)


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


def _convert(
    rank: int, world_size: int, before: Callable[[], None] | None, argv: list[str]
) -> tuple[int, str]:
    if before is not None:
        before()
    sys.argv, err = ["convert_checkpoint", *argv], io.StringIO()
    with contextlib.redirect_stderr(err):
        return convert_checkpoint.main(), err.getvalue()


def convert(load: Path, save: Path, *argv: object) -> None:
    """Convert a checkpoint on one process, and insist on success."""
    command = list(map(str, ["--load", load, "--save", save, *argv]))
    [(code, err)] = pool.run(1, _convert, None, command)
    assert code == 0, err


def refused_conversion(
    load: Path, save: Path, *argv: object, before: Callable[[], None] | None = None
) -> str:
    """The one line of error of a conversion that is refused; ``before()`` runs first."""
    command = list(map(str, ["--load", load, "--save", save, *argv]))
    [(code, err)] = pool.run(1, _convert, before, command)
    assert code in (2, 4, 6)
    [line] = [line for line in err.splitlines() if line.startswith("error")]
    return line


def prepare(
    folder: Path, *stage0: object, documents: int = 70, longest: int = 24, stems: int = 0,
    store: bool = True, **model: Any,
) -> Path:  # fmt: skip
    """Make ``folder``'s tied checkpoint, corpus and, by Stage 0 with flags ``stage0``, store."""
    tiny.save_corpus(folder / "corpus", num_documents=documents, longest=longest, stems=stems)
    tiny.save_qwen3(folder / "model", **{"tied": True, "num_hidden_layers": 2, **model})
    if store:
        succeed("stage0", *inputs(folder), "--store", folder / "store", *stage0)
    return folder


def inputs(folder: Path) -> list[object]:
    """Flags of both stages for the checkpoint and the corpus of ``folder``."""
    return ["--load", folder / "model", "--data-path", folder / "corpus", "--seq-length", 64]


def argv(folder: Path, save: Path, *extra: object) -> list[object]:
    """Flags of Stage 1 for ``folder``; a flag in ``extra`` replaces one given here."""
    store = ["--store", folder / "store"] if (folder / "store").exists() else []
    probe = ["--probe-interval", 3, "--probe-documents", 8] if store else ["--probe-interval", 0]
    return [
        *inputs(folder), *store, "--save", save, "--lr", 1e-3, "--global-batch-size", 4,
        *([] if "--probe-interval" in extra else probe), *extra,
    ]  # fmt: skip


def replace_step(step: Callable[..., Any]) -> None:
    """In this process call ``step(number, take_step, model, optimizer, work, groups)`` instead."""
    take_step, numbers = train.train_step, itertools.count(1)

    def replaced(*arguments: Any, **options: Any) -> Any:
        return step(next(numbers), partial(take_step, **options), *arguments)

    train.train_step = replaced


def with_loss(work: list[Any], change: Callable[[Any], Any]) -> list[Any]:
    """Micro-batches of which the first has ``change(loss)`` for its loss."""
    head = work[0].head
    return [work[0]._replace(head=lambda hidden, weight: change(head(hidden, weight))), *work[1:]]


def poison(rank: int, first: int, last: int = 999, what: str = "both", on: int = 0) -> None:
    """In steps ``first`` to ``last`` of rank ``on``, loss, gradient or both are NaN."""

    def gradient(loss: Any) -> Any:
        loss.register_hook(lambda grad: grad * math.nan)
        return loss

    changes = {
        "both": lambda loss: loss * math.nan, "loss": lambda loss: loss + math.nan,
        "gradient": gradient,
    }  # fmt: skip

    def step(number, take_step, model, optimizer, work, *rest):
        if rank == on and first <= number <= last:
            work = with_loss(work, changes[what])
        return take_step(model, optimizer, work, *rest)

    replace_step(step)


def weights(save: Path) -> dict[str, bytes]:
    """Files of the newest checkpoint that hold tensors, by name."""
    iteration = directories.latest_iteration(save)
    assert iteration is not None
    newest = directories.iteration_directory(save, iteration)
    return {p.name: p.read_bytes() for p in newest.iterdir() if p.suffix == ".distcp"}


def dry_run(capsys: Any, stage: str, *argv: object) -> dict[str, str]:
    """What ``--dry-run`` prints in this process: values by name."""
    assert MAINS[stage]([*map(str, argv), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    return dict(line.strip().split("  ", 1) for line in lines)


def metrics(save: Path) -> list[dict[str, Any]]:
    """The lines that a run logged."""
    return read_metrics(save / "metrics.jsonl")


def steps(save: Path) -> list[dict[str, Any]]:
    """The lines that a run logged of its steps."""
    return [line for line in metrics(save) if "loss" in line]


def losses(save: Path) -> list[float]:
    """The losses that a run logged, in order."""
    return [line["loss"] for line in steps(save)]


def same_tree(ours: Path, theirs: Path) -> None:
    """Assert that two directories hold the same files with the same bytes; times may differ."""
    found, expected = held(ours), held(theirs)
    assert found.keys() == expected.keys()
    for name, content in expected.items():
        assert found[name] == content, name


def held(directory: Path) -> dict[str, bytes]:
    """Content by name of a directory's files, without its lock and the costs of a run."""
    files = (
        p for p in directory.rglob("*") if p.is_file() and p.name not in (COST_FILE, LOCK_FILE)
    )
    return {str(p.relative_to(directory)): p.read_bytes() for p in files}
