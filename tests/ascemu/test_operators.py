"""The restricted head's operators on an emulated NPU, against float64."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from megatron_replay.errors import ConfigError
from megatron_replay.kernels.ascend import operators as ascend
from tests.ascemu import cases

#: Candidates of each position: none, one, as many as a cap of 200 and the label give.
SIZES = [3, 0, 1, 17, 0, 0, 201, 40, 9, 0]
VOCABULARY = 301
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 8, 9, 64, 129, 2560, 4096, 4097, 8192])
def test_equal_to_float64_and_bitwise_the_same_on_any_number_of_cores(operators, channels, dtype):
    case = cases.make(SIZES, VOCABULARY, channels).to(dtype)
    found = [cases.run(case, blocks, operators) for blocks in (1, 13, 40)]
    for one, reference in zip(found[0], cases.expected(case), strict=True):
        # The operands are the reference's, whatever their dtype: what is left is fp32 arithmetic.
        assert cases.error(one, reference) <= 1e-6
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_operands_of_16_bits_are_near_those_of_32(operators, dtype):
    case = cases.make(SIZES, VOCABULARY, 2560)
    for found, reference in zip(
        cases.run(case.to(dtype), 13, operators), cases.expected(case), strict=True
    ):
        assert 1e-5 < cases.error(found, reference) <= 1e-2


@pytest.mark.parametrize(
    ("sizes", "vocabulary"),
    [
        ([], 5),  # no positions
        ([0], 5),
        ([0, 0, 0], 5),
        ([1], 5),
        ([1], 1),  # one id
        ([0, 0, 1, 0, 0], 7),
        ([201], 1009),
        ([5] * 64, 5),  # every id everywhere
        ([1] * 300, 2),  # two ids own all pairs, more than a window holds
        ([301] * 2, 301),
        ([16] * 40, 1000),  # shares that end with positions
    ],
    ids=str,
)
def test_shapes_at_the_edges(operators, sizes, vocabulary):
    case = cases.make(sizes, vocabulary, 72)
    found = [cases.run(case, blocks, operators) for blocks in (1, 7, 40)]
    for one, reference in zip(found[0], cases.expected(case), strict=True):
        assert one.shape == reference.shape
        assert cases.error(one, reference) <= 1e-6
    assert all(all(map(torch.equal, found[0], other)) for other in found[1:])


def test_rows_that_no_pair_names_keep_their_bits(operators):
    case = cases.make([2, 0, 3], 50, 33)
    _, grad_hidden, main_grad = cases.run(case, 5, operators)
    assert not grad_hidden[1].any()
    untouched = torch.ones(50, dtype=torch.bool).index_fill(0, case.ids.long(), False)
    assert untouched.sum() > 40
    assert (main_grad[untouched] == cases.FOUND).all()


def test_what_is_not_finite_stays_in_its_pairs(operators):
    """A row of NaN in the weight, next to others in a tile, spoils nothing but its own pairs."""
    case = cases.make([6, 6, 6], 20, 40)
    spoilt = int(case.ids[8])
    case.weight_VH[spoilt] = torch.nan
    z, grad_hidden, main_grad = cases.run(case, 1, operators)
    assert torch.equal(z.isnan(), case.ids == spoilt)
    hit = [bool((case.ids[6 * t : 6 * t + 6] == spoilt).any()) for t in range(3)]
    assert grad_hidden.isnan().any(1).tolist() == hit
    assert not main_grad.isnan().any()


def test_all_cores_are_used_unless_told_otherwise(operators):
    used = []

    class Recorder:
        vector_cores = staticmethod(operators.vector_cores)

        def gather_dot(self, stream, blocks, *rest):
            used.append((stream, blocks))

    case = cases.make([2], 5, 8)
    operands = (case.hidden_TH, case.weight_VH, case.ids, case.offsets)
    ascend.gather_dot(*operands, operators=Recorder())
    ascend.gather_dot(*operands, blocks=3, operators=Recorder())
    assert used == [(0, 40), (0, 3)]


GOOD = cases.make([2, 1], 5, 8)
TWO = torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_TH": TWO.double()}, "unusable hidden .*float64"),
        ({"hidden_TH": torch.zeros(8, 2).T}, r"unusable hidden .*strides \(1, 2\)"),
        ({"hidden_TH": torch.zeros(8)}, "unusable hidden"),
        ({"hidden_TH": torch.zeros(2, 8193)}, r"1 to 8192 channels.*\[2, 8193\]"),
        ({"hidden_TH": torch.zeros(2, 0)}, r"1 to 8192 channels.*\[2, 0\]"),
        ({"weight_VH": torch.zeros(5, 9)}, r"unusable weight .*\[5, 8\].*\[5, 9\]"),
        ({"weight_VH": torch.zeros(5, 8).half()}, "unusable weight .*float16"),
        ({"weight_VH": torch.zeros(5, 8, device="meta")}, "unusable weight .*on meta"),
        ({"ids": GOOD.ids.long()}, "unusable ids .*int32.*int64"),
        ({"ids": GOOD.ids[None]}, "unusable ids"),
        ({"offsets": GOOD.offsets.long()}, "unusable offsets .*int32.*int64"),
        ({"offsets": GOOD.offsets[1:]}, r"unusable offsets .*\[3\].*\[2\]"),
    ],
)
def test_gather_dot_refuses(operators, change, message):
    case = replace(GOOD, **change)
    operands = (case.hidden_TH, case.weight_VH, case.ids, case.offsets)
    with pytest.raises(ConfigError, match=message):
        ascend.gather_dot(*operands, operators=operators)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_RH": TWO.half()}, "unusable out .*float32.*float16"),
        ({"out_RH": torch.zeros(2, 9)}, "unusable out"),
        ({"out_RH": torch.zeros(2, 16)[:, ::2]}, "unusable out .*strides"),
        ({"out_RH": torch.zeros(3, 8)}, "unusable offsets"),
        ({"source_NH": torch.zeros(5, 8).int()}, "unusable source .*int32"),
        ({"coefficients": GOOD.dz.half()}, "unusable coefficients .*float16"),
        ({"coefficients": GOOD.dz[1:]}, "unusable coefficients"),
        ({"rows": torch.tensor([0, 1])}, "unusable rows .*int64"),
        ({"rows": torch.tensor([0, 1, 1]).int()}, "unusable offsets"),
    ],
)
def test_segment_axpy_refuses(operators, change, message):
    tensors = {
        "out_RH": TWO,
        "source_NH": GOOD.weight_VH,
        "indices": GOOD.ids,
        "coefficients": GOOD.dz,
        "offsets": GOOD.offsets,
    }
    with pytest.raises(ConfigError, match=message):
        ascend.segment_axpy_(**(tensors | change), operators=operators)


def test_tensors_on_a_cpu_need_an_emulated_module():
    operands = (GOOD.hidden_TH, GOOD.weight_VH, GOOD.ids, GOOD.offsets)
    with pytest.raises(ConfigError, match="expected an NPU; found cpu"):
        ascend.gather_dot(*operands)


def test_an_operator_that_was_not_built_says_how_to_build_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron_replay.kernels._ascend", None)
    with pytest.raises(ConfigError, match=r"cannot be loaded .*set_env.sh.*pip install"):
        ascend.load()


def test_a_device_that_does_not_answer(operators):
    with pytest.raises(RuntimeError, match="device 5 for its vector cores: ACL error 107001"):
        operators.vector_cores(5)


def test_the_package_loads_without():
    code = (
        "import sys, megatron_replay.kernels as k; sys.exit(k.__name__ + '.ascend' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
