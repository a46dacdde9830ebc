"""Runs both stages as on NPUs, in a fresh interpreter: python -m tests.npu_stub.journey FOLDER.

FOLDER holds a checkpoint and a corpus. Every rank is forked after all imports; the guard's findings
go to FOLDER/found.json.
"""

from __future__ import annotations

import collections
import dataclasses
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
from tests.npu_stub import operators, stand_in
from tests.npu_stub.guard import Guard

#: Stage, arguments, and TP and PP.
Job = tuple[str, list[Any], tuple[int, int]]


def _rank(rank: int, world: int, port: int, folder: Path, stage: str, argv: list[str]) -> None:
    from megatron_replay import stage0, stage1

    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)
    guard, code = Guard(), 1
    try:
        with guard:
            code = {"stage0": stage0.main, "stage1": stage1.main}[stage](argv)
    except BaseException:
        traceback.print_exc()
    answer = {"code": code, "found": list(guard.found), "calls": stand_in.calls}
    (folder / f"rank-{rank}.json").write_text(json.dumps(answer))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run(folder: Path, stage: str, argv: list[Any], layout: tuple[int, int]) -> list[dict[str, Any]]:
    """Run one job; return the answer of each rank."""
    tp, pp = layout
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
        context.Process(target=_rank, args=(r, tp * pp, port, folder, stage, flags))
        for r in range(tp * pp)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return [json.loads((folder / f"rank-{r}.json").read_text()) for r in range(tp * pp)]


def jobs(folder: Path) -> list[Job]:
    """Both stages, by TP and by PP, every optimizer, loss, scope and tail, saved and resumed."""
    inputs = ["--load", folder / "model", "--data-path", folder / "corpus", "--seq-length", 64]
    train = [
        *inputs, "--store", folder / "store", "--lr", 1e-3, "--global-batch-size", 2,
        "--probe-interval", 2, "--probe-documents", 4, "--exit-interval", 2,
    ]  # fmt: skip
    bf16 = [*train, "--save", folder / "moclip", "--bf16", "--sequence-parallel"]
    document = ["--candidate-scope", "document", "--tail", "ghost", "--kl-weight", 1]

    def other(name: str) -> list[Any]:
        return [*train, "--save", folder / name, "--optimizer", name]

    return [
        ("stage0", [*inputs, "--store", folder / "one"], (1, 1)),
        ("stage0", [*inputs, "--store", folder / "store", "--store-logits", "fp16"], (2, 1)),
        ("stage1", bf16, (2, 1)),
        ("stage1", [*bf16, "--exit-interval", 3], (2, 1)),
        ("stage1", [*other("adamw"), *document], (1, 2)),
        ("stage1", [*other("mofo"), "--loss", "full", "--bf16"], (2, 1)),
        ("stage1", other("muonclip"), (2, 1)),
        ("stage1", other("adamuon"), (2, 1)),
        ("stage1", [*other("tam"), "--head-backend", "union"], (1, 1)),
    ]


class _Misplaced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        return weight + 1

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        assert grad.device.type == "npu"
        return grad * torch.ones(4)


def misdeeds() -> list[str]:
    """The guard's findings for mistakes made on purpose."""
    with Guard() as guard:
        there = torch.ones(4, device="npu:0")
        there.cpu().numpy()
        there.numpy()
        there + torch.ones(4)
        there + 1 + torch.ones(())
        there.to("cpu") + torch.ones(4)
        there.topk(2, sorted=False)
        there.int().sort()
        there.long().topk(2)
        there.int() << 1
        there.int().bitwise_right_shift_(1)
        there.int().cumsum(0, dtype=torch.int32)  # this one is none
        there.int().cumsum(0)
        torch.searchsorted(there, there)
        there.unique()
        there.double()
        # In backward: the gradient of a product is a product with the other operand.
        _Misplaced.apply(torch.ones(4, device="npu", requires_grad=True)).sum().backward()
    return [rule for rule, _ in guard.found]


#: A model that takes no time.
NARROW = {
    "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 8,
    "num_query_groups": 4, "kv_channels": 16, "vocab_size": 512,
}  # fmt: skip


def layers() -> tuple[list[Any], list[tuple[str, str]]]:
    """The findings of tools/doctor.py --compare-gradients, and the guard's."""
    from megatron_replay.training import layer_errors

    def run(device: str, folder: Path) -> int:
        if device == "cpu":
            return layer_errors.in_new_process(device, folder)
        with guard:
            layer_errors.run_on(device, folder)
        return 0

    guard, shape = Guard(), dataclasses.replace(layer_errors.SHAPE, **NARROW)
    found = list(layer_errors.compare(select("npu"), shape, run=run))
    return [(f.subject, f.status, f.found) for f in found], list(guard.found)


def doctor() -> list[Any]:
    """The findings of tools/doctor.py about two NPUs, the head on one, and compiled kernels."""
    from tools.doctor import collective, compiled_kernels, head_smoke

    npu = select("npu")
    with Guard() as guard:
        found = [collective(npu, method="fork"), head_smoke(npu)]
    found += compiled_kernels(npu)
    assert not guard.found, guard.found
    return [(finding.status, finding.found, finding.subject) for finding in found]


def main() -> None:
    folder = Path(sys.argv[1])
    warnings.simplefilter("ignore")  # as in a run
    select("npu").prepare(0)
    import megatron_replay.collection.run
    import megatron_replay.training.train  # noqa: F401
    from megatron_replay.kernels import ascend_selection

    sys.modules["megatron_replay.kernels._ascend"] = operators.module()
    ascend_selection.backend = operators.compared_selection
    total: collections.Counter[tuple[str, str]] = collections.Counter()
    codes, calls = [], collections.Counter[str]()
    for stage, argv, layout in jobs(folder):
        for answer in run(folder, stage, argv, layout):
            codes.append(answer["code"])
            calls.update(answer["calls"])
            total.update(map(tuple, answer["found"]))
    examined = doctor()  # first: it forks, and the other leaves threads
    compared, found = layers()
    total.update(found)
    answer = {
        "codes": codes,
        "calls": calls,
        "found": sorted(total),
        "doctor": examined,
        "misdeeds": misdeeds(),
        "layers": compared,
        "mindspeed": [name for name in sys.modules if "mindspeed" in name],
    }
    (folder / "found.json").write_text(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
