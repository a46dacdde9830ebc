"""The head's two operators against float64: those of the emulated NPU, and in the process of
test_triton_interpreter.py those of Triton. test_head.py tests the heads that are made of them.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.ascemu import cases

IN_TRITON = os.environ.get("TRITON_INTERPRET") == "1"
#: Candidates of each position: none, one, as many as a cap of 200 and the label give; in Triton
#: more than a position's programs read at once.
SIZES = [3, 0, 1, 41, 9, 0] if IN_TRITON else [3, 0, 1, 17, 0, 0, 201, 40, 9, 0]
CHANNELS = [1, 8, 513] if IN_TRITON else [1, 8, 9, 129, 2560, 4097, 8192]
SHORT = [torch.float16, torch.bfloat16]
ROWS = [(H, torch.float32) for H in CHANNELS]
ROWS += itertools.product([100] if IN_TRITON else CHANNELS, SHORT)
#: Candidates of each position, and the vocabulary.
EDGES = [
    ([], 5),  # no positions
    ([0, 0, 0], 5),
    ([1], 1),  # one id
    ([0, 0, 1, 0, 0], 7),
    ([5] * 8, 5),  # every id everywhere
    ([201], 1009),
]
LONG_EDGES = [
    ([5] * 64, 5),
    ([1] * 300, 2),  # two ids own all pairs, more than a window holds
    ([301] * 2, 301),
    ([16] * 40, 1000),  # shares that end with positions
]


@pytest.fixture
def on_cores(request: pytest.FixtureRequest) -> Any:
    """The operators by a number of cores; Triton's order of programs stands in for theirs."""
    if not IN_TRITON:
        from megatron_replay.kernels.ascend_head import PairOperators

        module = request.getfixturevalue("operators")
        return lambda count: PairOperators(cases.on_cores(module, count))
    from triton.runtime import interpreter

    from megatron_replay.kernels import triton_head

    forwards = interpreter.InterpreterBuilder.set_grid_idx

    def backwards(builder: Any, *place: int) -> None:
        last = (int(size) - 1 for size in builder.grid_dim)
        forwards(builder, *(end - at for end, at in zip(last, place, strict=True)))

    def ordered(count: int) -> Any:
        order = forwards if count == 1 else backwards
        patch = request.getfixturevalue("monkeypatch")
        patch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", order)
        return triton_head

    return ordered


def check(on_cores: Any, case: cases.Case, *counts: int) -> None:
    first, *others = [cases.run(case, on_cores(count)) for count in counts]
    cases.require_right(first, case)
    assert all(all(map(torch.equal, first, other)) for other in others), "bits depend on the cores"


@pytest.mark.parametrize(("channels", "dtype"), ROWS, ids=str)
def test_equal_to_float64_and_bitwise_the_same_on_any_number_of_cores(on_cores, channels, dtype):
    counts = (1, 2) if IN_TRITON else (1, 13, 40)
    check(on_cores, cases.make(SIZES, 301, channels).to(dtype), *counts)


@pytest.mark.parametrize(("sizes", "vocabulary"), EDGES + LONG_EDGES * (not IN_TRITON), ids=str)
def test_shapes_at_the_edges(on_cores, sizes, vocabulary):
    check(on_cores, cases.make(sizes, vocabulary, 72), 1, 7)


def test_long_rows(on_cores):
    check(on_cores, cases.make([2, 0, 9], 12, 8192), 1)


def test_operands_of_any_strides(on_cores):
    case = cases.make([3, 0, 2], 9, 40)
    apart = torch.zeros(9, 80)[:, ::2].copy_(case.weight_VH)
    check(on_cores, replace(case, hidden_TH=case.hidden_TH.T.contiguous().T, weight_VH=apart), 5)


def test_nan_stays_in_its_pairs(on_cores):
    """A row of NaN in the weight, next to others in a tile, spoils its own pairs only."""
    case = cases.make([6, 6, 6], 20, 40)
    spoilt = int(case.ids[8])
    case.weight_VH[spoilt] = torch.nan
    z, grad_hidden, main_grad = cases.run(case, on_cores(1))
    assert torch.equal(z.isnan(), case.ids == spoilt)
    hit = [bool((case.ids[6 * t : 6 * t + 6] == spoilt).any()) for t in range(3)]
    assert grad_hidden.isnan().any(1).tolist() == hit
    assert not main_grad.isnan().any()


def test_rows_without_pairs_keep_their_bits(on_cores):
    case = cases.make([2, 0, 3], 50, 33)
    _, grad_hidden, main_grad = cases.run(case, on_cores(5))
    assert not grad_hidden[1].any()
    untouched = torch.ones(50, dtype=torch.bool).index_fill(0, case.ids.long(), False)
    assert (main_grad[untouched] == cases.FOUND).all()


if IN_TRITON:

    def test_only_the_rows_of_the_output_are_written(on_cores):
        """To -0.0, whose bits change also where 0.0 is added."""
        memory = torch.full((11, 33), -0.0)
        out_RH, rows = memory[1::2, 2:-1], torch.tensor([4, 1, 2]).int()
        indices, offsets = torch.tensor([3, 5, 5]).int(), torch.tensor([0, 0, 2, 3]).int()
        source_MH = torch.full((7, 30), torch.nan).index_fill(0, torch.tensor([3, 5]), 1.0)
        on_cores(1).segment_axpy_(out_RH, source_MH, indices, torch.ones(3), offsets, rows=rows)
        assert (out_RH[1] == 2).all()
        assert (out_RH[2] == 1).all()
        assert (memory.view(torch.int32) != -(2**31)).sum() == 2 * 30

    def test_memory_longer_than_32_bits(on_cores):
        """Rows 2^30 elements apart; the pages between are never touched, so never allocated."""
        case = cases.make([2], 3, 8).to(torch.bfloat16)
        weight_VH = torch.empty(2**31 + 8, dtype=torch.bfloat16).as_strided((3, 8), (2**30, 1))
        check(on_cores, replace(case, weight_VH=weight_VH.copy_(case.weight_VH)), 1)
