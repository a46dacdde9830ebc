"""The Triton kernels compiled for an H100 (sm_90), without a GPU: what the instructions promise.

Run by test_triton_interpreter.py.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from typing import Any

import pytest
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_replay.kernels import triton_head as head
from megatron_replay.kernels import triton_optimizer as optimizer
from megatron_replay.kernels import triton_selection as selection
from megatron_replay.selection.shard_selection import BLOCK


def compiled(
    kernel: Any, constants: dict[str, Any], types: dict[str, str], aligned: bool = True,
    **options: Any,
) -> Any:  # fmt: skip
    """``types`` of the arguments that are not i32; ``aligned``: all are multiples of 16."""
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={
            name: "constexpr" if name in constants else types.get(name, "i32") for name in names
        },
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(names)
            if aligned and name not in constants
        },
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def instructions(form: Any) -> Counter[str]:
    """Instructions of the PTX that ptxas has accepted, with how many there are of each."""
    assert form.asm["cubin"]
    found = Counter(re.findall(r"^\s+(?:@\S+ )?([a-z][\w.:]*) ", form.asm["ptx"], re.M))
    for name in found:
        assert not name.startswith(("atom", "red.")), "the order of sums would be left to chance"
        assert ".ftz" not in name, "denormals would be lost"
        assert not name.startswith(("mma", "wgmma")), "a product of fewer bits"
    return found


STEPS = {
    "dot_products": (optimizer._dots, {"COLUMNS": 3, "SUMS": 3}),
    "square_sums": (optimizer._dots, {"COLUMNS": 2, "SUMS": 1}),
    **{
        f"momentum_step, bounded {bounded}, copies {copies}, one row {stride == 0}": (
            optimizer._step,
            {"COLUMNS": 5 + copies, "SUMS": 1, "BOUNDED": bounded, "COPIES": copies}
            | {"STRIDE": stride},
        )
        for bounded in (True, False)
        for copies, stride in ((True, 0), (False, 10))
    },
}


@pytest.mark.parametrize(
    ("name", "aligned"),
    [*((name, True) for name in STEPS), *((name, False) for name in [*STEPS][:3])],
)
def test_the_optimizers_passes(name: str, aligned: bool) -> None:
    kernel, constants = STEPS[name]
    constants = constants | {"ALIGNED": aligned, "BLOCK": optimizer.BLOCK}
    types = {"table": "*i64", "tasks": "*i32", "partial": "*fp32", "coefficients": "*fp32"}
    warps = optimizer.WARPS
    found = instructions(compiled(kernel, constants, types, aligned=False, num_warps=warps))
    assert found["fma.rn.f32"]
    for instruction in found:
        assert "approx" not in instruction
        assert not instruction.startswith("div.full")
    # 16 bytes at once where the caller vouches for the alignment, and nowhere else.
    assert ("ld.global.v4.b32" in found) == aligned
    if "momentum_step" in name:
        assert found["sqrt.rn.f32"] == found["div.rn.f32"] == optimizer.BLOCK // 32 // warps
        assert any(x.startswith("cvt.rn.bf16") for x in found) == ("copies True" in name)


HEADS = {
    "gather_dot": (head._dots, head.DOT, {}),
    "segment_axpy_": (head._axpys, head.AXPY, {"rows": None}),
    "segment_axpy_ into rows": (head._axpys, head.AXPY, {}),
}


@pytest.mark.parametrize(
    ("dtype", "aligned"), [("fp32", True), ("bf16", True), ("bf16", False), ("fp16", True)]
)
@pytest.mark.parametrize("name", HEADS)
def test_the_heads_operators(name: str, dtype: str, aligned: bool) -> None:
    """As for contiguous columns."""
    kernel, options, constants = HEADS[name]
    numbers = {"channels", "hidden_row", "weight_row", "source_row", "out_row"}
    types = {name: "*i32" for name in kernel.arg_names if name not in numbers}
    types |= dict.fromkeys(("hidden", "weight", "source"), "*" + dtype)
    types |= dict.fromkeys(("z", "out", "coefficients"), "*fp32")
    constants = constants | {x: 1 for x in kernel.arg_names if x.endswith("_column")}
    constants |= {x: value for x, value in options.items() if x in kernel.arg_names}
    form = compiled(kernel, constants, types, aligned, num_warps=options["num_warps"])
    found = instructions(form)
    assert found["fma.rn.f32"]
    # 16 bytes at once where all is aligned; a row of odd length would fault.
    assert ("ld.global.v4.b32" in found) == aligned
    # Strides are 64 bits before they multiply: a weight of 151,936 rows of 16,384 is past 2^31.
    uses = re.findall(r"%\w+ = (\S+) [^\n]*%\w+_row\b", form.asm["ttir"])
    assert uses == ["arith.extsi"] * 2


def selection_code(tmp_path: Any, dtype: str, *, given: bool, fusion: bool = False) -> Counter[str]:
    """Machine instructions, with how many there are of each."""
    constants = {"GIVEN": given, "BLOCK": BLOCK, "BLOCKS": selection.BLOCKS}
    constants |= {"STEPS": selection.STEPS}
    types = {"logits": "*" + dtype, "block_maxima": "*fp32", "maxima": "*fp32", "totals": "*i64"}
    form = compiled(
        selection._rows, constants, types, num_warps=selection.WARPS, enable_fp_fusion=fusion
    )
    (tmp_path / "cubin").write_bytes(form.asm["cubin"])
    command = [knobs.nvidia.nvdisasm.path, "-c", str(tmp_path / "cubin")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return Counter(re.findall(r"^\s+/\*\w+\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", text, re.M))


@pytest.mark.parametrize(
    ("dtype", "given"), [("fp32", True), ("bf16", True), ("fp16", True), ("fp32", False)]
)
def test_selection_rounds_every_operation(dtype: str, given: bool, tmp_path: Any) -> None:
    found = selection_code(tmp_path, dtype, given=given)
    elements = selection.BLOCKS * BLOCK // (32 * selection.WARPS)
    assert found["FMUL"] == 7 * elements
    assert found["FADD"] == 13 * elements
    for name in found:
        assert not name.startswith("FFMA"), "a sum of a product, rounded once"
        assert ".FTZ" not in name
        assert not name.startswith(("ATOM", "RED")), "the order of sums would be left to chance"
    assert found["LDG.E.128"]  # 16 bytes at once


def test_with_fusion_selection_would_not_round_every_operation(tmp_path: Any) -> None:
    found = selection_code(tmp_path, "fp32", given=True, fusion=True)
    assert any(name.startswith("FFMA") for name in found)
