"""Candidate selection's Triton form against the torch form, in Triton's interpreter on a CPU.

Run by test_triton_interpreter.py.
"""

from __future__ import annotations

import math

import pytest
import torch

from megatron_replay.kernels.triton import selection as kernels
from megatron_replay.kernels.triton.selection import selection
from tests.kernels.selection_cases import DTYPES, Case, cases, logits, same

# The interpreter is numpy, which warns of -inf - -inf in rows that are left open.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def small_programs(monkeypatch):
    """Two blocks at once, and sums of three steps: 1000 ids need three of them."""
    monkeypatch.setattr(kernels, "BLOCKS", 2)
    monkeypatch.setattr(kernels, "STEPS", 3)


def test_every_case_has_the_bits_of_torch():
    sizes = (1, 65, 128, 511, 4097)
    assert [
        found for case in cases(T=1, sizes=sizes) for found in case.differences(selection)
    ] == []


@pytest.mark.usefixtures("small_programs")
def test_a_row_of_many_steps():
    sizes = (129, 1000)
    assert [
        found for case in cases(T=1, sizes=sizes) for found in case.differences(selection)
    ] == []


def test_masses_of_every_size():
    """The sum of a row's is exact, so that one wrong in its last unit is seen."""
    x = -torch.cat([torch.logspace(-9, math.log10(29), 6000), torch.arange(0, 29, 0.0078125)])
    logits_TV = x[:9600].reshape(16, 600)
    assert Case("masses", logits_TV, torch.zeros(16), 0, 2).differences(selection) == []


def test_chosen_tokens_in_chunks(monkeypatch):
    monkeypatch.setattr(kernels, "_CHUNK_ENTRIES", 2 * 20 * 64)
    case = Case("chunks", logits("tied", 5, 1500, torch.Generator().manual_seed(1)), None, 3, 20)
    assert case.differences(selection) == []


def test_logits_may_lie_anywhere():
    around = logits("gauss", 4, 500, torch.Generator().manual_seed(2))
    for dtype in DTYPES:
        memory = around.to(dtype)
        for part in (memory[:, 3:403], memory[::2, 7:], memory[:, ::3], memory[:0]):
            assert Case("a view", part, None, 5, 20).differences(selection) == []


@pytest.mark.parametrize("nan", [math.nan, -math.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_anywhere_makes_the_maximum_infinite(nan, dtype):
    for place in (0, 63, 64, 129):
        logits_TV = torch.zeros(3, 130, dtype=dtype)
        logits_TV[1, place] = nan
        logits_TV[2, place] = -math.inf
        expected = torch.tensor([0.0, math.inf, 0.0])
        assert same(selection.row_maxima(logits_TV), expected)
        assert same(selection.shard_tokens(logits_TV, None, vocab_start=0, count=9).max_T, expected)
