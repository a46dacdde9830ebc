"""The restricted head's operators on an emulated NPU, against float64."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from megatron_replay.errors import ConfigError
from megatron_replay.kernels import ascend_operators as ascend
from tests.ascemu import cases

#: Candidates of each position: none, one, as many as a cap of 200 and the label give.
SIZES = [3, 0, 1, 17, 0, 0, 201, 40, 9, 0]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: Candidates of each position, and the vocabulary.
EDGES = [
    ([], 5),  # no positions
    ([0, 0, 0], 5),
    ([1], 1),  # one id
    ([0, 0, 1, 0, 0], 7),
    ([201], 1009),
    ([5] * 64, 5),  # every id everywhere
    ([1] * 300, 2),  # two ids own all pairs, more than a window holds
    ([301] * 2, 301),
    ([16] * 40, 1000),  # shares that end with positions
]


def check(operators, case: cases.Case, *blocks: int) -> None:
    """The operands are the reference's, whatever their dtype: only fp32 arithmetic can differ."""
    first, *others = [cases.run(case, count, operators) for count in blocks]
    for found, reference in zip(first, cases.expected(case), strict=True):
        assert found.shape == reference.shape
        assert cases.error(found, reference) <= 1e-6
    assert all(all(map(torch.equal, first, other)) for other in others), "bits depend on the cores"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 8, 9, 129, 2560, 4097, 8192])
def test_equal_to_float64_and_bitwise_the_same_on_any_number_of_cores(operators, channels, dtype):
    check(operators, cases.make(SIZES, 301, channels).to(dtype), 1, 13, 40)


@pytest.mark.parametrize(("sizes", "vocabulary"), EDGES, ids=str)
def test_shapes_at_the_edges(operators, sizes, vocabulary):
    check(operators, cases.make(sizes, vocabulary, 72), 1, 7, 40)


def test_rows_without_pairs_keep_their_bits(operators):
    case = cases.make([2, 0, 3], 50, 33)
    _, grad_hidden, main_grad = cases.run(case, 5, operators)
    assert not grad_hidden[1].any()
    untouched = torch.ones(50, dtype=torch.bool).index_fill(0, case.ids.long(), False)
    assert (main_grad[untouched] == cases.FOUND).all()


def test_operands_of_any_strides(operators):
    case = cases.make([3, 0, 2], 9, 40)
    apart = torch.zeros(9, 80)[:, ::2].copy_(case.weight_VH)
    check(operators, replace(case, hidden_TH=case.hidden_TH.T.contiguous().T, weight_VH=apart), 5)


def test_nan_stays_in_its_pairs(operators):
    """A row of NaN in the weight, next to others in a tile, spoils its own pairs only."""
    case = cases.make([6, 6, 6], 20, 40)
    spoilt = int(case.ids[8])
    case.weight_VH[spoilt] = torch.nan
    z, grad_hidden, main_grad = cases.run(case, 1, operators)
    assert torch.equal(z.isnan(), case.ids == spoilt)
    hit = [bool((case.ids[6 * t : 6 * t + 6] == spoilt).any()) for t in range(3)]
    assert grad_hidden.isnan().any(1).tolist() == hit
    assert not main_grad.isnan().any()


GOOD = cases.make([2, 1], 5, 8)
TWO = torch.zeros(2, 8)
DOT = {
    "hidden_TH": GOOD.hidden_TH, "weight_VH": GOOD.weight_VH, "ids": GOOD.ids,
    "offsets": GOOD.offsets,
}  # fmt: skip
AXPY = {
    "out_RH": TWO, "source_NH": GOOD.weight_VH, "indices": GOOD.ids, "coefficients": GOOD.dz,
    "offsets": GOOD.offsets,
}  # fmt: skip


@pytest.mark.parametrize(
    ("operator", "change", "message"),
    [
        ("dot", {"hidden_TH": TWO.double()}, "hidden .*float64"),
        ("dot", {"hidden_TH": torch.zeros(8)}, "hidden"),
        ("dot", {"hidden_TH": torch.zeros(2, 8193)}, r"1 to 8192 channels.*\[2, 8193\]"),
        ("dot", {"hidden_TH": torch.zeros(2, 0)}, r"1 to 8192 channels.*\[2, 0\]"),
        ("dot", {"weight_VH": torch.zeros(5, 9)}, r"weight .*\[5, 8\].*\[5, 9\]"),
        ("dot", {"weight_VH": torch.zeros(5, 8).half()}, "weight .*float16"),
        ("dot", {"weight_VH": torch.zeros(5, 8, device="meta")}, "weight .*on meta"),
        ("dot", {"ids": GOOD.ids.long()}, "ids .*int32.*int64"),
        ("dot", {"ids": GOOD.ids[None]}, "ids"),
        ("dot", {"offsets": GOOD.offsets.long()}, "offsets .*int32.*int64"),
        ("dot", {"offsets": GOOD.offsets[1:]}, r"offsets .*\[3\].*\[2\]"),
        ("axpy", {"out_RH": TWO.half()}, "out .*float32.*float16"),
        ("axpy", {"out_RH": torch.zeros(2, 9)}, "out"),
        ("axpy", {"out_RH": torch.zeros(2, 16)[:, ::2]}, "out .*strides"),
        ("axpy", {"out_RH": torch.zeros(3, 8)}, "offsets"),
        ("axpy", {"source_NH": torch.zeros(5, 8).int()}, "source .*int32"),
        ("axpy", {"coefficients": GOOD.dz.half()}, "coefficients .*float16"),
        ("axpy", {"coefficients": GOOD.dz[1:]}, "coefficients"),
        ("axpy", {"rows": torch.tensor([0, 1])}, "rows .*int64"),
        ("axpy", {"rows": torch.tensor([0, 1, 1]).int()}, "offsets"),
    ],
)  # fmt: skip
def test_operands_are_checked(operators, operator, change, message):
    pairs, rows = ascend.PairOperators(operators), change.get("rows")
    good = DOT if operator == "dot" else AXPY
    operands = [change.get(name, good[name]) for name in good]
    call = pairs.gather_dot if operator == "dot" else partial(pairs.segment_axpy_, rows=rows)
    with pytest.raises(ConfigError, match=message):
        call(*operands)


def test_tensors_on_a_cpu_need_an_emulated_module():
    with pytest.raises(ConfigError, match="expected an NPU; found cpu"):
        ascend.PairOperators().gather_dot(*DOT.values())


def test_the_stream_and_all_cores_are_used(operators):
    used = []

    class Recorder:
        vector_cores = staticmethod(operators.vector_cores)

        def gather_dot(self, stream, blocks, *rest):
            used.append((stream, blocks))

    ascend.PairOperators(Recorder()).gather_dot(*DOT.values())
    ascend.PairOperators(Recorder(), 3).gather_dot(*DOT.values())
    assert used == [(0, 40), (0, 3)]
    with pytest.raises(RuntimeError, match="device 5 for its vector cores: ACL error 107001"):
        operators.vector_cores(5)


def test_without_the_operators_the_package_loads_and_the_error_names_the_build(monkeypatch):
    code = (
        "import sys, megatron_replay.kernels as k; sys.exit(k.__name__ + '.ascend' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    monkeypatch.setitem(sys.modules, "megatron_replay.kernels._ascend", None)
    with pytest.raises(ConfigError, match=r"set_env.sh.*pip install"):
        ascend.load()
