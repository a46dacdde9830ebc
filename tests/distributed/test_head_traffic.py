"""What the head sends over TP, collective by collective, and that rows arrive where they belong.

Shapes: T rows of a micro-batch, N selected positions, V vocabulary, H hidden channels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_replay import kernels
from megatron_replay.model import heads
from megatron_replay.model.selected_rows import HiddenStates
from tests import pool
from tests.distributed.layouts import Layout, join_groups
from tests.loss.references import HeadCase, error, head_case

pytestmark = pytest.mark.distributed

T, V, H = 32, 40, 8
LAYOUTS = [
    Layout(tp=2), Layout(tp=4), Layout(tp=2, sequence_parallel=True),
    Layout(tp=4, sequence_parallel=True),
]  # fmt: skip


class Traffic(TorchDispatchMode):
    """Every collective of torch's process groups: its name, and the numbers that it moves."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[int], torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensor = args[0][0] if isinstance(args[0], list) else args[0]
            name = func.overloadpacket.__name__.strip("_")
            self.seen.append((name, list(tensor.shape), tensor.dtype))
        return func(*args, **(kwargs or {}))


def case_of(scope: str) -> tuple[HeadCase, Tensor]:
    """Eleven positions, most of them at the beginning: some sequence shards have none."""
    rows_N = torch.tensor([0, 1, 2, 3, 5, 9, 10, 16, 17, 18, 21])
    case = head_case(T=len(rows_N), V=V, H=H, seed=3, scale=0.4)
    if scope == "document":
        case.group_offsets, case.mask_GV = torch.tensor([0, 6, 11]), case.mask_GV[:2].clone()
        case.mask_GV[torch.tensor([0] * 6 + [1] * 5), case.labels_T] = True
    return case, rows_N


def head_on(rank: int, world_size: int, layout: Layout, scope: str, backend: str) -> dict[str, Any]:
    """One forward and backward of the head on this layout, recorded."""
    groups = join_groups(layout)
    case, rows_N = case_of(scope)
    hidden_T1H = torch.randn(T, 1, H, generator=torch.Generator().manual_seed(1))
    hidden_T1H[rows_N, 0] = case.hidden_TH
    if layout.sequence_parallel:
        hidden_T1H = hidden_T1H.chunk(layout.tp)[groups.tp_rank].clone()
    hidden_T1H.requires_grad_()
    weight_VH = case.weight_VH.chunk(layout.tp)[groups.tp_rank].clone().requires_grad_()
    weight_VH.main_grad = torch.zeros_like(weight_VH, requires_grad=False)
    num_rows = V // layout.tp
    sets = case.sets(groups.tp_rank * num_rows, (groups.tp_rank + 1) * num_rows)
    head = heads.restricted_loss(
        rows_N, sets, groups,
        backend=kernels.HEAD.choose(backend, weight_VH), tail_logit_N=case.upstream_T,
    )  # fmt: skip
    hidden = HiddenStates(hidden_T1H, groups.tp_group, sequence_parallel=layout.sequence_parallel)
    with Traffic() as forward:
        loss_N = head(hidden, weight_VH)
    with Traffic() as backward:
        (loss_N * case.upstream_T).sum().backward()
    assert weight_VH.grad is None
    assert hidden_T1H.grad is not None
    return {
        "loss": loss_N.detach(),
        "hidden_grad": hidden_T1H.grad,
        "weight_grad": weight_VH.main_grad,
        "forward": forward.seen,
        "backward": backward.seen,
    }


@pytest.mark.parametrize("backend", ["union", "cpu"])
@pytest.mark.parametrize("scope", ["position", "document"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_three_small_collectives_and_the_right_numbers(
    layout: Layout, scope: str, backend: str
) -> None:
    case, rows_N = case_of(scope)
    ranks = pool.run(layout.tp, head_on, layout, scope, backend)
    N, fp32 = len(rows_N), torch.float32
    most = max(torch.bincount(rows_N // (T // layout.tp)).tolist())
    for found in ranks:
        sums = [("allreduce", [N], fp32), ("allreduce", [2, N], fp32)]
        if layout.sequence_parallel:
            gathered = ("allgather_base", [layout.tp * most, H], fp32)
            assert found["forward"] == [gathered, *sums]
            assert found["backward"] == [("reduce_scatter_base", [most, H], fp32)]
        else:
            assert found["forward"] == sums
            assert found["backward"] == [("allreduce", [N, H], fp32)]
    loss_N, dense_hidden_grad, dense_weight_grad = case.dense(case.upstream_T)
    expected_T1H = torch.zeros(T, 1, H, dtype=torch.float64)
    expected_T1H[rows_N, 0] = dense_hidden_grad
    for rank, found in enumerate(ranks):
        assert error(found["loss"], loss_N) < 1e-6
        shard = expected_T1H.chunk(layout.tp)[rank] if layout.sequence_parallel else expected_T1H
        assert error(found["hidden_grad"], shard, floor=float(expected_T1H.abs().max())) < 1e-6
    weight_grad = torch.cat([found["weight_grad"] for found in ranks])
    assert error(weight_grad, dense_weight_grad) < 1e-6


def rows_on(rank: int, world_size: int, layout: Layout) -> tuple[Tensor, list[int], Tensor]:
    """All rows; and of a micro-batch without a position, the shape of its rows and the gradient."""
    groups = join_groups(layout)
    hidden_T1H = torch.arange(T * H).view(T, 1, H).float()
    if layout.sequence_parallel:
        hidden_T1H = hidden_T1H.chunk(layout.tp)[groups.tp_rank]
    hidden_T1H.requires_grad_()
    hidden = HiddenStates(hidden_T1H, groups.tp_group, sequence_parallel=layout.sequence_parallel)
    none_NH = hidden[torch.empty(0, dtype=torch.int64)]
    none_NH.sum().backward()  # no rank may wait for another
    assert hidden_T1H.grad is not None
    return hidden.all().detach(), list(none_NH.shape), hidden_T1H.grad


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_all_rows_are_in_their_order_and_no_position_gets_no_gradient(layout: Layout) -> None:
    expected = torch.arange(T * H).view(T, H).float()
    for found, shape, gradient in pool.run(layout.tp, rows_on, layout):
        assert torch.equal(found, expected)
        assert shape == [0, H]
        assert not gradient.any()
