"""Runs both stages as on NPUs, in a fresh interpreter: python -m tests.npu_stub.journey FOLDER.

FOLDER holds a checkpoint and a corpus. NPU_STUB_ALL=1 adds the optimizers that are compared with.
Every rank is forked once all is imported; what the guard finds goes to FOLDER/found.json.
"""

from __future__ import annotations

import collections
import json
import multiprocessing
import os
import socket
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

from megatron_replay.platform import select

#: Stage, arguments, and TP and PP.
Job = tuple[str, list[Any], tuple[int, int]]


def _rank(rank: int, world: int, port: int, folder: Path, stage: str, argv: list[str]) -> None:
    from megatron_replay import stage0, stage1
    from tests.npu_stub.guard import Guard

    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)
    guard, code = Guard(), 1
    try:
        with guard.everywhere():
            code = {"stage0": stage0.main, "stage1": stage1.main}[stage](argv)
    except BaseException:
        traceback.print_exc()
    found = [[rule, place, count] for (rule, place), count in guard.found.items()]
    answer = {"code": code, "found": found, "calls": torch.npu.calls}  # type: ignore[attr-defined]
    (folder / f"rank-{rank}.json").write_text(json.dumps(answer))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run(folder: Path, stage: str, argv: list[Any], layout: tuple[int, int]) -> list[dict[str, Any]]:
    """What each rank found."""
    tp, pp = layout
    world = tp * pp
    assert os.listdir("/proc/self/task") == [str(os.getpid())], "a fork beside threads may hang"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    flags = [
        *map(str, argv), "--platform", "npu", "--tensor-model-parallel-size", str(tp),
        "--pipeline-model-parallel-size", str(pp),
    ]  # fmt: skip
    ranks = [
        context.Process(target=_rank, args=(r, world, port, folder, stage, flags))
        for r in range(world)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return [json.loads((folder / f"rank-{r}.json").read_text()) for r in range(world)]


def jobs(folder: Path) -> list[Job]:
    """Both stages, by TP and by PP, two optimizers, two scopes, every tail, saved and resumed."""
    inputs = ["--load", folder / "model", "--data-path", folder / "corpus", "--seq-length", 64]
    train = [
        *inputs, "--store", folder / "store", "--lr", 1e-3, "--global-batch-size", 2,
        "--probe-interval", 2, "--probe-documents", 4, "--exit-interval", 2,
    ]  # fmt: skip
    bf16 = ["--save", folder / "moclip", "--bf16", "--sequence-parallel"]
    bf16 += ["--tail", "ghost"]
    document = ["--candidate-scope", "document", "--tail", "ghost", "--kl-weight", 1]
    chosen: list[Job] = [
        ("stage0", [*inputs, "--store", folder / "one"], (1, 1)),
        ("stage0", [*inputs, "--store", folder / "store", "--store-logits", "fp16"], (2, 1)),
        ("stage1", [*train, *bf16], (2, 1)),
        ("stage1", [*train, *bf16, "--exit-interval", 3], (2, 1)),
        ("stage1", [*train, *document, "--save", folder / "adamw", "--optimizer", "adamw"], (1, 2)),
    ]
    if os.environ.get("NPU_STUB_ALL"):
        more = [["--optimizer", name] for name in ("mofo", "tam", "adamuon", "muonclip")]
        for flags in (*more, ["--loss", "full"]):
            chosen.append(("stage1", [*train, *flags, "--save", folder / flags[1]], (2, 1)))
    return chosen


def misdeeds() -> list[str]:
    """What the guard finds where it is known what there is to find."""
    from tests.npu_stub.guard import Guard

    guard = Guard()
    with guard.everywhere():
        there = torch.ones(4, device="npu:0")
        there.cpu().numpy()
        there.numpy()
        there + torch.ones(4)
        there + 1 + torch.ones(())
        there.to("cpu") + torch.ones(4)
        there.topk(2, sorted=False)
        # In backward: the gradient of a product is a product with the other operand.
        weight = torch.ones(4, device="npu", requires_grad=True)
        _Misplaced.apply(weight).sum().backward()
    return [rule for rule, _ in guard.found]


class _Misplaced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        return weight + 1

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        assert grad.device.type == "npu"
        return grad * torch.ones(4)


def wrong_calls() -> list[str]:
    """What torch.npu answers to calls it has not."""
    npu, names = torch.get_device_module("npu"), []
    for call in (
        lambda: npu.no_such_function(), lambda: npu.set_device(), lambda: npu.manual_seed(1, 2),
    ):  # fmt: skip
        try:
            call()
        except Exception as error:
            names.append(type(error).__name__)
    return names


def doctor() -> list[tuple[str, str]]:
    """What tools/doctor.py says of two NPUs, and of the head on one."""
    from tests.npu_stub.guard import Guard
    from tools.doctor import collective, head_smoke

    guard, npu = Guard(), select("npu")
    with guard.everywhere():
        found = [collective(npu, method="fork"), head_smoke(npu)]
    return [(finding.status, finding.found) for finding in found] + list(guard.found)


def main() -> int:
    """Run them all."""
    folder = Path(sys.argv[1])
    warnings.simplefilter("ignore")  # as in a run: deprecations are not a user's affair
    select("npu").prepare(0)
    import megatron_replay.collection.run
    import megatron_replay.training.loop  # noqa: F401
    from tests.npu_stub import operators

    sys.modules["megatron_replay.kernels._ascend"] = operators.module()

    total: collections.Counter[tuple[str, str]] = collections.Counter()
    codes, calls = [], collections.Counter()
    for stage, argv, layout in jobs(folder):
        for answer in run(folder, stage, argv, layout):
            codes.append(answer["code"])
            calls.update(answer["calls"])
            for rule, place, count in answer["found"]:
                total[rule, place] += count
    found = [[rule, place, count] for (rule, place), count in sorted(total.items())]
    answer = {
        "codes": codes,
        "found": found,
        "calls": calls,
        "doctor": doctor(),
        "misdeeds": misdeeds(),
        "wrong_calls": wrong_calls(),
        "modules": [name for name in sys.modules if "mindspeed" in name],
    }
    (folder / "found.json").write_text(json.dumps(answer, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
