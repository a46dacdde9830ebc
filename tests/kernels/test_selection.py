"""Compiled candidate selection has the bits of torch's: on every level of the processor, for any
number of threads, and for any strides of the logits.

test_triton_interpreter.py runs this file for Triton, in its interpreter.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import pytest
import torch

from megatron_replay.errors import ConfigError
from megatron_replay.functional import SelectedCandidates, select_candidates
from megatron_replay.kernels.cpu_selection import selection
from megatron_replay.selection.shard_selection import TORCH_SELECTION, SelectionBackend
from tests.kernels.levels import LEVELS, at_level
from tests.kernels.selection_cases import COUNTS, DTYPES, SIZES, Case, cases, logits, same
from tests.kernels.threads import in_threads

IN_TRITON = os.environ.get("TRITON_INTERPRET") == "1"
#: Sizes of the interpreter's cases, which are slower: with programs as on a GPU, and with programs
#: so small that 1000 ids take three of them.
TRITON = {"triton": (1, 65, 128, 511, 4097), "triton, small programs": (129, 1000)}
# The interpreter is numpy, which warns of -inf - -inf in rows that are left open.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(params=TRITON if IN_TRITON else LEVELS)
def kernel(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SelectionBackend]:
    if not IN_TRITON:
        with at_level(request.param):
            yield selection
        return
    from megatron_replay.kernels import triton_selection as module

    if request.param != "triton":
        monkeypatch.setattr(module, "BLOCKS", 2)
        monkeypatch.setattr(module, "STEPS", 3)
        monkeypatch.setattr(module, "CHUNK_ENTRIES", 2 * 20 * 64)
    yield module.selection


def test_every_case_has_the_bits_of_torch(kernel, request):
    sizes = TRITON.get(request.node.callspec.params["kernel"], SIZES)
    every = cases(T=1 if IN_TRITON else 3, sizes=sizes)
    assert [found for case in every for found in case.differences(kernel)] == []


@pytest.mark.cpu_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vocabulary_of_a_real_model(kernel, dtype):
    generator = torch.Generator().manual_seed(1)
    for kind in ("gauss", "tied", "masked", "equal"):
        logits_TV = logits(kind, 2, 151_936, generator).to(dtype)
        assert Case(kind, logits_TV, None, 0, 200).differences(kernel) == []


def test_masses_of_every_size(kernel):
    """Sums are exact, so one that is wrong in its last unit is seen."""
    x = -torch.cat([torch.logspace(-9, math.log10(29), 6000), torch.arange(0, 29, 0.0078125)])
    many = x[:9600].reshape(16, 600)
    assert Case("many", many, torch.zeros(16), 0, 2).differences(kernel) == []
    if not IN_TRITON:  # a row each
        alone = torch.stack([x, torch.zeros_like(x)], 1)
        assert Case("alone", alone, None, 0, 2).differences(kernel) == []


def test_chosen_tokens_in_chunks(kernel):
    tied = logits("tied", 5, 1500, torch.Generator().manual_seed(1))
    assert Case("chunks", tied, None, 3, 20).differences(kernel) == []


@pytest.mark.cpu_backend
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_bits_do_not_depend_on_threads(threads):
    generator = torch.Generator().manual_seed(2)
    case = Case("threads", logits("tied", 7, 3000, generator), None, 0, 200)
    assert in_threads(threads, lambda: case.differences(selection)) == []


def test_logits_of_any_strides(kernel):
    generator = torch.Generator().manual_seed(3)
    around = (
        logits("gauss", 4, 500, generator) if IN_TRITON else logits("gauss", 8, 1300, generator)
    )
    for dtype in DTYPES:
        memory = around.to(dtype)
        for part in (memory[:, 3:403], memory[::2, 7:], memory.T, memory[:, ::3], memory[:0]):
            assert Case("a view", part, None, 5, 20).differences(kernel) == []


@pytest.mark.parametrize("nan", [math.nan, -math.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_anywhere_makes_the_maximum_infinite(kernel, nan, dtype):
    for place in (0, 1, 63, 64, 100, 129):
        logits_TV = torch.zeros(3, 130, dtype=dtype)
        logits_TV[1, place] = nan
        logits_TV[2, place] = -math.inf
        expected = torch.tensor([0.0, math.inf, 0.0])
        assert same(kernel.row_maxima(logits_TV), expected)
        assert same(kernel.shard_tokens(logits_TV, None, vocab_start=0, count=9).max_T, expected)


def test_a_row_without_a_finite_maximum_leaves_the_others_right(kernel):
    logits_TV = torch.tensor([[math.inf, 0.0, 1.0], [-math.inf] * 3, [0.0, -math.inf, 2.0]])
    found = kernel.shard_tokens(logits_TV, None, vocab_start=0, count=2)
    assert found.max_T.tolist() == [math.inf, -math.inf, 2.0]
    alone = TORCH_SELECTION.shard_tokens(logits_TV[2:], None, vocab_start=0, count=2)
    assert same(found.keys_TK[2:], alone.keys_TK)
    assert same(found.total_T[2:], alone.total_T)


def sets_differ(kernel: SelectionBackend, *, rows: int, kind: str, dtype: torch.dtype) -> list[str]:
    """The fields in which a backend's sets differ from those of torch."""
    generator = torch.Generator().manual_seed(4)
    logits_TV = logits(kind, rows, 700, generator).to(dtype)
    # Labels of every rank: some are among the first tokens.
    labels_T = logits_TV.argsort(1, descending=True).gather(
        1, torch.randint(300, (rows, 1), generator=generator)
    )[:, 0]
    logits_TV[torch.arange(rows), labels_T] = logits_TV[torch.arange(rows), labels_T].clamp(min=-9)
    wrong = []
    for count in COUNTS:
        for coverage in (1e-9, 0.5, 0.95, 1.0):
            options = {"coverage": coverage, "max_candidates": count}
            plain, compiled = (
                select_candidates(logits_TV, labels_T, **options, backend=form)
                for form in (TORCH_SELECTION, kernel)
            )
            for name in SelectedCandidates.__dataclass_fields__:
                if not same(getattr(plain, name), getattr(compiled, name)):
                    wrong.append(f"count {count}, coverage {coverage}: {name}")
    return wrong


@pytest.mark.cpu_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["gauss", "peaked", "tied", "masked", "equal"])
def test_sets_are_the_same_byte_for_byte(kernel, kind, dtype):
    assert sets_differ(kernel, rows=9, kind=kind, dtype=dtype) == []


@pytest.mark.cpu_backend
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_sets_do_not_depend_on_threads(threads):
    """Enough rows for every thread to cut some."""
    differing = in_threads(
        threads, lambda: sets_differ(selection, rows=200, kind="tied", dtype=torch.float32)
    )
    assert differing == []


def test_no_positions_have_no_sets(kernel):
    none = torch.zeros(0, dtype=torch.int64)
    sets = select_candidates(torch.zeros(0, 5), none, backend=kernel)
    assert sets.offsets.tolist() == [0]
    assert len(sets.ids) == 0


def test_the_given_maxima_are_not_written_to(kernel):
    max_T = torch.ones(2)
    kernel.shard_tokens(torch.zeros(2, 5), max_T, vocab_start=0, count=2)
    assert max_T.tolist() == [1.0, 1.0]


@pytest.mark.cpu_backend
def test_other_logits_are_refused():
    for wrong in (torch.zeros(2, 5).double(), torch.zeros(2, 5, device="meta")):
        with pytest.raises(ConfigError, match="unusable logits"):
            selection.row_maxima(wrong)
        with pytest.raises(ConfigError, match="unusable logits"):
            selection.shard_tokens(wrong, None, vocab_start=0, count=2)
