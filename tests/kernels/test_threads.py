"""Results of the compiled passes have the same bits for any number of threads, in every run."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.levels import in_threads
from tests.kernels.reference import Problem, bits, problem
from tests.kernels.test_momentum_step import USUAL, pack

SIZES = [100_003, 5, 0, 32_768, 65_537]


def all_passes(kernels, one: Problem) -> list[torch.Tensor]:
    """Their sums, and what ``one`` is after the step."""
    dots = kernels.dot_products(one.exp_avgs, one.grads)
    squares = kernels.square_sums(one.grads)
    sums = one.step_with(kernels, pack(USUAL), bounded=True)
    return [dots, squares, sums, *one.parts()]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_bits_do_not_depend_on_threads(compiled, threads):
    expected = all_passes(compiled, problem(SIZES))
    for _ in range(3):
        found = in_threads(threads, lambda: all_passes(compiled, problem(SIZES)))
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(found, expected, strict=True))


def test_the_bits_do_not_depend_on_where_a_tensor_lies(compiled):
    expected = all_passes(compiled, problem(SIZES))
    for offset in (1, 2, 3, 7, 8):
        shifted = problem(SIZES)
        for part in (shifted.params, shifted.grads, shifted.exp_avgs, shifted.exp_avg_sqs):
            for i, tensor in enumerate(part):
                memory = torch.empty(tensor.numel() + offset)
                part[i] = memory[offset:].copy_(tensor)
        found = all_passes(compiled, shifted)
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(found, expected, strict=True))
