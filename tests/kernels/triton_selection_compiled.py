"""What candidate selection's Triton kernel becomes on an H100 (sm_90), for which no GPU is needed.

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

from megatron_replay.kernels.triton import selection as kernels
from megatron_replay.selection.shard_selection import BLOCK


def compiled(dtype: str, *, given: bool, fusion: bool = False) -> Any:
    """As for logits whose address and row stride are multiples of 16."""
    kernel = kernels._rows
    names = kernel.arg_names
    constants = {"GIVEN": given, "BLOCK": BLOCK, "BLOCKS": kernels.BLOCKS, "STEPS": kernels.STEPS}
    types = {"logits": "*" + dtype, "block_maxima": "*fp32", "maxima": "*fp32", "totals": "*i64"}
    source = ASTSource(
        fn=kernel,
        signature={
            name: "constexpr" if name in constants else types.get(name, "i32") for name in names
        },
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(names)
            if name not in constants
        },
    )
    options = {"num_warps": kernels.WARPS, "enable_fp_fusion": fusion}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def machine_code(form: Any, tmp_path: Any) -> Counter[str]:
    """Instructions that the GPU runs, with how many there are of each."""
    (tmp_path / "cubin").write_bytes(form.asm["cubin"])
    command = [knobs.nvidia.nvdisasm.path, "-c", str(tmp_path / "cubin")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return Counter(re.findall(r"^\s+/\*\w+\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", text, re.M))


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_nothing_is_fused(dtype: str, given: bool, tmp_path: Any) -> None:
    found = machine_code(compiled(dtype, given=given), tmp_path)
    elements = kernels.BLOCKS * BLOCK // (32 * kernels.WARPS)
    assert found["FMUL"] == 7 * elements
    assert found["FADD"] == 13 * elements
    for name in found:
        assert not name.startswith("FFMA"), "a sum of a product, rounded once"
        assert ".FTZ" not in name
        assert not name.startswith(("ATOM", "RED")), "the order of sums would be left to chance"
    # 16 bytes at once.
    assert found["LDG.E.128"]


def test_what_is_checked_can_be_otherwise(tmp_path: Any) -> None:
    found = machine_code(compiled("fp32", given=True, fusion=True), tmp_path)
    assert any(name.startswith("FFMA") for name in found)
