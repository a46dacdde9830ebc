"""In a step of Stage 1 the host waits for the device where it logs, and nowhere else of ours.

A CPU waits for nothing; what would make it wait on a device is known by name: methods of a tensor
that hand its numbers to Python, operators whose result has a size that depends on the numbers, and
tensors made of Python's numbers, which are copied from memory that is not pinned.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import megatron_replay.training.build as build
import megatron_replay.training.train as train
from megatron_replay.loss.pairs import pair_backend
from tests.e2e import stages

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
READING = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
COPYING = ("tensor", "as_tensor")
SIZED_BY_VALUES = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::bincount",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
#: The finite check and the norm; the loss; what MoClip did.
OURS = {
    "tolist in optim/rule.py UpdateRule._finish": 1,
    "tolist in optim/rule.py UpdateRule.report": 1,
    "tolist in training/step.py _global_mean": 1,
}
#: A branch on the number of positions; the state of a generator; both once in a while.
MEGATRON = {
    "__bool__ in megatron/core/distributed/finalize_model_grads.py finalize_model_grads",
    "item in megatron/core/tensor_parallel/random.py CudaRNGStatesTracker.fork",
}
#: Adam's count of steps, which is a tensor on the host.
ON_HOST = {"__int__ in optim/groups.py CheckedAdamW._batches"}
CASES: dict[str, tuple[list[object], dict[str, int]]] = {
    "TP2 SP": (["--sequence-parallel", "--bf16", "--tail", "ghost"], {"tp": 2}),
    "DP2 ZeRO-1": (["--use-distributed-optimizer", "--bf16"], {"dp": 2}),
    "PP2": ([], {"pp": 2}),
    "TP2 document": (
        ["--candidate-scope", "document", "--tail", "ghost", "--kl-weight", "1"],
        {"tp": 2},
    ),
}


def caller() -> str:
    """File and function of the innermost frame of the package or of megatron-core."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_qualname
        if file.startswith(f"{ROOT}/megatron_replay/"):
            return f"{Path(file).relative_to(ROOT / 'megatron_replay')} {name}"
        if "/megatron/core/" in file:
            return f"megatron/core/{file.rpartition('/megatron/core/')[2]} {name}"
        frame = frame.f_back
    return "elsewhere"


class _Operators(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = function._schema.name, kwargs or {}
        if _waits(name, args, kwargs):
            self._found[f"{name} in {caller()}"] += 1
        return function(*args, **kwargs)


def _waits(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name == "aten::repeat_interleave":
        return kwargs.get("output_size") is None
    if name in ("aten::index", "aten::index_put", "aten::index_put_"):
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return name in SIZED_BY_VALUES


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often each (what, where) happens in the block."""
    found: Counter[str] = Counter()
    thread = threading.get_ident()

    def recorded(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread:  # the loader's may read what it likes
                found[f"{name} in {caller()}"] += 1
            with _disable_current_modes():  # and counted once
                return original(*args, **kwargs)

        return call

    with contextlib.ExitStack() as patches:
        for owner, names in ((torch.Tensor, READING), (torch, COPYING)):
            for name in names:
                call = recorded(name, getattr(owner, name))
                patches.enter_context(mock.patch.object(owner, name, call))
        patches.enter_context(_Operators(found))
        yield found


def gather_dot(hidden_NH: Tensor, weight_VH: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    return (hidden_NH[_owners(offsets, ids)].float() * weight_VH[ids].float()).sum(1)


def segment_axpy_(
    out_RH: Tensor, source_MH: Tensor, indices: Tensor, coefficients: Tensor, offsets: Tensor,
    *, rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    owners = _owners(offsets, indices)
    moves = coefficients[:, None] * source_MH[indices].float()
    return out_RH.index_add_(0, owners if rows is None else rows[owners], moves)


def _owners(offsets: Tensor, pairs: Tensor) -> Tensor:
    segments = torch.arange(len(offsets) - 1)
    return segments.repeat_interleave(offsets.diff().long(), output_size=len(pairs))


#: As the backends of devices, which read nothing: pairs in position scope, dense products in
#: document scope.
DEVICE_BACKEND = pair_backend(gather_dot, segment_axpy_)


def count(rank: int, directory: Path) -> None:
    """What is counted in each step of the run, and the rows of its micro-batches, to a file of each
    rank.
    """
    builder, train_step, steps = build.BatchBuilder, train.train_step, []

    def make(*args: Any) -> Any:
        return dataclasses.replace(builder(*args), backend=DEVICE_BACKEND)

    def counted_step(model: Any, optimizer: Any, work: Any, *args: Any, **kwargs: Any) -> Any:
        with counted() as found:
            result = train_step(model, optimizer, work, *args, **kwargs)
        steps.append((found, [len(micro_batch.batch.token_T) for micro_batch in work]))
        (directory / f"{rank}.json").write_text(json.dumps(steps))
        return result

    build.BatchBuilder, train.train_step = make, counted_step  # type: ignore[misc,assignment]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("reads")
    return stages.prepare(directory, "--store-logits", "fp16", documents=40, stems=3)


@pytest.mark.parametrize("case", CASES)
def test_the_host_waits_to_log_and_for_nothing_else(folder, tmp_path, case):
    flags, layout = CASES[case]
    argv = stages.argv(folder, tmp_path / "save", "--probe-interval", 0, "--exit-interval", 2)
    stages.succeed("stage1", *argv, *flags, **layout, before=partial(count, directory=tmp_path))
    for rank in range(2):
        steps = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(steps) == 2
        expected = dict(OURS)
        if case == "PP2" and rank == 0:  # without the loss
            del expected["tolist in training/step.py _global_mean"]
        for found, lengths in steps[1:]:  # in the first, what is made once
            assert len(set(lengths)) > 1, "stages would know the shapes anyway"
            ours = {k: n for k, n in found.items() if k not in MEGATRON | ON_HOST}
            assert ours == expected, f"rank {rank}"
