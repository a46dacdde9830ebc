"""What only the operators of NPUs refuse and read; tests/kernels/test_pair_operators.py has the
rest.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from megatron_replay.errors import ConfigError
from megatron_replay.kernels import ascend_head as ascend
from megatron_replay.kernels import ascend_selection
from tests.ascemu import cases

GOOD = cases.make([2, 1], 5, 8)
TWO = torch.zeros(2, 8)
DOT = {
    "hidden_NH": GOOD.hidden_TH, "weight_VH": GOOD.weight_VH, "ids": GOOD.ids,
    "offsets": GOOD.offsets,
}  # fmt: skip
AXPY = {
    "out_RH": TWO, "source_MH": GOOD.weight_VH, "indices": GOOD.ids, "coefficients": GOOD.dz,
    "offsets": GOOD.offsets,
}  # fmt: skip


@pytest.mark.parametrize(
    ("operator", "change", "message"),
    [
        ("dot", {"hidden_NH": TWO.double()}, "hidden .*float64"),
        ("dot", {"hidden_NH": torch.zeros(8)}, "hidden"),
        ("dot", {"hidden_NH": torch.zeros(2, 8193)}, r"1 to 8192 channels.*\[2, 8193\]"),
        ("dot", {"hidden_NH": torch.zeros(2, 0)}, r"1 to 8192 channels.*\[2, 0\]"),
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
        ("axpy", {"source_MH": torch.zeros(5, 8).int()}, "source .*int32"),
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


@pytest.mark.parametrize(
    ("logits_TV", "max_T", "message"),
    [
        (TWO.double(), None, "logits .*float64"),
        (torch.zeros(1, 1).expand(1, 2**22 + 1), None, r"at most 4194304 ids.*\[1, 4194305\]"),
        (TWO, torch.zeros(2).half(), "max_T .*float32.*float16"),
        (TWO, torch.zeros(3), r"max_T .*\[2\].*\[3\]"),
        (TWO, torch.zeros(2, device="meta"), "max_T .*on meta"),
    ],
)
def test_logits_and_maxima_are_checked(operators, logits_TV, max_T, message):
    shard_tokens = ascend_selection.backend(operators).shard_tokens
    with pytest.raises(ConfigError, match=message):
        shard_tokens(logits_TV, max_T, vocab_start=0, count=2)


def test_sums_of_the_largest_vocabulary_and_of_equal_logits_fit(operators):
    """Each of 2^22 masses is 2^38, the largest, in sums of 32 bits."""
    logits_TV = torch.zeros(1, 2**22, dtype=torch.float16)
    found = ascend_selection.backend(operators).shard_tokens(
        logits_TV, None, vocab_start=0, count=2
    )
    assert found.total_T.tolist() == [2**60]


def test_tensors_on_a_cpu_need_an_emulated_module():
    with pytest.raises(ConfigError, match="expected an NPU; found cpu"):
        ascend.PairOperators().gather_dot(*DOT.values())
    with pytest.raises(ConfigError, match="expected an NPU; found cpu"):
        ascend_selection.backend().shard_tokens(TWO, None, vocab_start=0, count=2)


def test_the_stream_and_all_cores_are_used(operators):
    used = []

    class Recorder:
        vector_cores = staticmethod(operators.vector_cores)

        def gather_dot(self, stream, blocks, *rest):
            used.append((stream, blocks))

    ascend.PairOperators(Recorder()).gather_dot(*DOT.values())
    assert used == [(0, 40)]
    with pytest.raises(RuntimeError, match="device 5 for its vector cores: ACL error 107001"):
        operators.vector_cores(5)
