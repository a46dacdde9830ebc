"""What the Triton kernels become on an H100 (sm_90), for which no GPU is needed.

Run by test_triton_interpreter.py.
"""

from __future__ import annotations

import re
from collections import Counter

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_replay.kernels.triton import optimizer as kernels

FORMS = {
    "dot_products": (kernels._dots, {"COLUMNS": 3, "SUMS": 3}),
    "square_sums": (kernels._dots, {"COLUMNS": 2, "SUMS": 1}),
    **{
        f"momentum_step, bounded {bounded}, copies {copies}, one row {stride == 0}": (
            kernels._step,
            {"COLUMNS": 5 + copies, "SUMS": 1, "BOUNDED": bounded, "COPIES": copies}
            | {"STRIDE": stride},
        )
        for bounded in (True, False)
        for copies, stride in ((True, 0), (False, 10))
    },
}
TYPES = {"table": "*i64", "tasks": "*i32", "partial": "*fp32", "coefficients": "*fp32"}


def instructions(form: str, *, aligned: bool) -> Counter[str]:
    """Instructions of the PTX that ptxas has accepted, with how many there are of each."""
    kernel, options = FORMS[form]
    constants = options | {"ALIGNED": aligned, "BLOCK": kernels.BLOCK}
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={
            name: "constexpr" if name in constants else TYPES.get(name, "i32") for name in names
        },
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    options = {"num_warps": kernels.WARPS}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.asm["cubin"]
    return Counter(re.findall(r"^\s+(?:@\S+ )?([a-z][\w.:]*) ", compiled.asm["ptx"], re.M))


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_the_kernels_compile_to_what_they_promise(form, aligned):
    found = instructions(form, aligned=aligned)
    assert found["fma.rn.f32"]
    for name in found:
        assert not name.startswith(("atom", "red.")), "the order of sums would be left to chance"
        assert ".ftz" not in name, "denormals would be lost"
        assert "approx" not in name
        assert not name.startswith("div.full")
    # 16 bytes at once where the caller vouches for the alignment, and nowhere else.
    assert ("ld.global.v4.b32" in found) == aligned
    if "momentum_step" in form:
        assert found["sqrt.rn.f32"] == found["div.rn.f32"] == kernels.BLOCK // 32 // kernels.WARPS
        assert any(name.startswith("cvt.rn.bf16") for name in found) == ("copies True" in form)
