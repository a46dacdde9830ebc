"""Compiled candidate selection has the bits of torch's: on every level of the processor, for any
number of threads or of emulated NPU cores, and for any strides of the logits.

test_triton_interpreter.py runs this file for Triton, in its interpreter.

Shapes: T positions, V ids of a shard.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_replay.errors import ConfigError
from megatron_replay.functional import SelectedCandidates, select_candidates
from megatron_replay.kernels import SELECTION
from megatron_replay.selection.shard_selection import TORCH_SELECTION, SelectionBackend
from tests.ascemu import cases
from tests.kernels.levels import LEVELS, at_level, in_threads

IN_TRITON = os.environ.get("TRITON_INTERPRET") == "1"
#: Around every size of a block, and a vocabulary of many blocks.
SIZES = (1, 2, 63, 64, 65, 127, 128, 129, 511, 1000, 4097)
#: Sizes of the interpreter's cases, which are slower: with programs as on a GPU, and with programs
#: so small that 1000 ids take three of them.
TRITON = {"triton": (1, 65, 128, 511, 4097), "triton, small programs": (129, 1000)}
#: Cores of an emulated NPU, in turn.
CORES = (1, 2, 40)
COUNTS = (1, 2, 20, 64, 200, 255)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("gauss", "peaked", "wide", "tied", "equal", "masked", "zeros of both signs", "edges")
# The interpreter is numpy, which warns of -inf - -inf in rows that are left open.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(params=TRITON if IN_TRITON else (*LEVELS, "ascend"))
def kernel(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SelectionBackend]:
    if request.param == "ascend":
        from megatron_replay.kernels import ascend_selection

        module = cases.on_cores(request.getfixturevalue("operators"), *CORES)
        monkeypatch.setattr(ascend_selection, "CHUNK_ENTRIES", 2 * 20 * 64)
        yield ascend_selection.backend(module)
        return
    if not IN_TRITON:
        with at_level(request.param):
            yield SELECTION.choose("cpu", torch.empty(0))
        return
    from megatron_replay.kernels import triton_selection as module

    if request.param != "triton":
        monkeypatch.setattr(module, "BLOCKS", 2)
        monkeypatch.setattr(module, "STEPS", 3)
        monkeypatch.setattr(module, "CHUNK_ENTRIES", 2 * 20 * 64)
    yield module.backend()


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def differences(
    kernel: SelectionBackend,
    logits_TV: Tensor,
    max_T: Tensor | None = None,
    *,
    start: int = 0,
    count: int,
) -> list[str]:
    """What a backend finds otherwise than torch's."""
    expected, found = (
        (
            *backend.shard_tokens(logits_TV, max_T, vocab_start=start, count=count),
            backend.row_maxima(logits_TV),
        )
        for backend in (TORCH_SELECTION, kernel)
    )
    names = ("max_T", "total_T", "values_TK", "ids_TK", "row_maxima")
    return [x for x, *pair in zip(names, expected, found, strict=True) if not same(*pair)]


def logits(kind: str, T: int, V: int, generator: torch.Generator) -> Tensor:
    """Logits that could part a backend from torch's, in one bit."""
    values_TV = torch.randn(T, V, generator=generator) * 2
    if kind == "peaked":
        values_TV[:, V // 2] += 20
    elif kind == "wide":  # differences beyond -28, and of every size below
        values_TV *= 40 * torch.rand(T, V, generator=generator) ** 4
    elif kind == "tied":
        values_TV = values_TV.round()
    elif kind == "equal":
        values_TV[:] = -3.25
    elif kind == "masked":
        values_TV[torch.rand(T, V, generator=generator) < 0.97] = -math.inf
        values_TV[:, V // 3] = 1.0
    elif kind == "zeros of both signs":
        values_TV = -values_TV.abs().round()
        values_TV *= torch.where(torch.rand(T, V, generator=generator) < 0.5, 0.0, 1.0)
    elif kind == "edges":  # denormals of every dtype, and what their sizes hide from each other
        numbers = [0.0, -0.0, 1e-45, -1e-41, 3e-8, -6e-8, 1e-5, 6e4, -6e4, 1.0, -27.9, -28.1]
        drawn = torch.randint(len(numbers), (T, V), generator=generator)
        values_TV = torch.tensor(numbers)[drawn]
    return values_TV


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_bits_of_torch(kernel, request, kind):
    """With every size and dtype; counts, shards and maxima of other shards in turn."""
    sizes = TRITON.get(request.node.callspec.params["kernel"], SIZES)
    generator = torch.Generator().manual_seed(0)
    first = KINDS.index(kind) * len(SIZES) * len(DTYPES)
    for number, (V, dtype) in enumerate(itertools.product(sizes, DTYPES), first):
        logits_TV = logits(kind, 1 if IN_TRITON else 3, V, generator).to(dtype)
        above = (None, 0.0, 5.5, 13.0, 40.0)[number % 5]
        max_T = None if above is None else logits_TV.float().amax(1) + above
        start, count = (0, 77, (1 << 24) - V)[number % 3], COUNTS[number % len(COUNTS)]
        wrong = differences(kernel, logits_TV, max_T, start=start, count=count)
        assert not wrong, f"V {V}, {dtype}, count {count}, above {above}, start {start}"


@pytest.mark.cpu_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vocabulary_of_a_real_model(kernel, dtype):
    generator = torch.Generator().manual_seed(1)
    for kind in ("gauss", "tied", "masked", "equal"):
        logits_TV = logits(kind, 2, 151_936, generator).to(dtype)
        assert differences(kernel, logits_TV, count=200) == []


def test_masses_of_every_size(kernel):
    """Sums are exact, so one that is wrong in its last unit is seen."""
    x = -torch.cat([torch.logspace(-9, math.log10(29), 6000), torch.arange(0, 29, 0.0078125)])
    assert differences(kernel, x[:9600].reshape(16, 600), torch.zeros(16), count=2) == []
    if not IN_TRITON:  # a row each
        assert differences(kernel, torch.stack([x, torch.zeros_like(x)], 1), count=2) == []


def test_logits_of_any_strides_and_in_chunks(kernel):
    generator = torch.Generator().manual_seed(3)
    T, V = (4, 500) if IN_TRITON else (8, 1300)
    around = logits("gauss", T, V, generator)
    for dtype in DTYPES:
        memory = around.to(dtype)
        columns = memory[:, :30].T
        for part in (memory[:, 3:403], memory[::2, 7:], columns, memory[:, ::3], memory[:0]):
            assert differences(kernel, part, start=5, count=20) == []
    assert differences(kernel, logits("tied", 5, 1500, generator), start=3, count=20) == []


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
    assert same(found.values_TK[2:], alone.values_TK)
    assert same(found.ids_TK[2:], alone.ids_TK)
    assert same(found.total_T[2:], alone.total_T)


def test_the_given_maxima_are_not_written_to(kernel):
    max_T = torch.ones(2)
    kernel.shard_tokens(torch.zeros(2, 5), max_T, vocab_start=0, count=2)
    assert max_T.tolist() == [1.0, 1.0]


def sets_differ(kernel: SelectionBackend, *, rows: int, kind: str, dtype: torch.dtype) -> list[str]:
    """The fields in which a backend's sets differ from those of torch."""
    generator = torch.Generator().manual_seed(4)
    logits_TV = logits(kind, rows, 700, generator).to(dtype)
    # Labels of every rank: some are among the first tokens.
    drawn = torch.randint(300, (rows, 1), generator=generator)
    labels_T = logits_TV.argsort(1, descending=True).gather(1, drawn)[:, 0]
    logits_TV[torch.arange(rows), labels_T] = logits_TV[torch.arange(rows), labels_T].clamp(min=-9)
    wrong = []
    for count, coverage in itertools.product(COUNTS, (1e-9, 0.5, 0.95, 1.0)):
        options = {"coverage": coverage, "max_candidates": count}
        plain, compiled = (
            select_candidates(logits_TV, labels_T, **options, backend=backend)
            for backend in (TORCH_SELECTION, kernel)
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
@pytest.mark.parametrize("kernel", LEVELS, indirect=True)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_neither_tokens_nor_sets_depend_on_threads(kernel, threads):
    """There are rows enough for every thread to cut some."""
    tied = logits("tied", 7, 3000, torch.Generator().manual_seed(2))
    assert in_threads(threads, lambda: differences(kernel, tied, count=200)) == []
    options = {"rows": 200, "kind": "tied", "dtype": torch.float32}
    assert in_threads(threads, lambda: sets_differ(kernel, **options)) == []


def test_no_positions_have_no_sets(kernel):
    none = torch.zeros(0, dtype=torch.int64)
    sets = select_candidates(torch.zeros(0, 5), none, backend=kernel)
    assert sets.offsets.tolist() == [0]
    assert len(sets.ids) == 0


@pytest.mark.cpu_backend
@pytest.mark.parametrize("kernel", LEVELS, indirect=True)
@pytest.mark.parametrize("wrong", [torch.zeros(2, 5).double(), torch.zeros(2, 5, device="meta")])
def test_other_logits_are_refused(kernel, wrong):
    for call in (kernel.row_maxima, lambda x: kernel.shard_tokens(x, None, vocab_start=0, count=2)):
        with pytest.raises(ConfigError, match="candidate selection: the cpu backend cannot run"):
            call(wrong)
