"""What the head's Triton kernels become on an H100 (sm_90), for which no GPU is needed.

Run by test_triton_interpreter.py.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_replay.kernels.triton import head as kernels

FORMS = {
    "gather_dot": (kernels._dots, kernels.DOT, {}),
    "segment_axpy_": (kernels._axpys, kernels.AXPY, {"rows": None}),
    "segment_axpy_ into rows": (kernels._axpys, kernels.AXPY, {}),
}
OPERANDS = ("hidden", "weight", "source")
FLOATS = ("z", "out", "coefficients")
LONGS = ("words",)
NUMBERS = ("channels", "tiles", "hidden_row", "weight_row", "source_row", "out_row")


def compiled(
    kernel: Any, options: dict[str, Any], constants: dict[str, Any], *, dtype: str, aligned: bool
) -> Any:
    """As for contiguous columns; ``aligned``: addresses, strides and H are multiples of 16."""
    names = kernel.arg_names
    types = dict.fromkeys(OPERANDS, "*" + dtype)
    types |= dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(LONGS, "*i64")
    types |= dict.fromkeys(NUMBERS, "i32")
    constants = constants | {name: 1 for name in names if name.endswith("_column")}
    constants |= {name: value for name, value in options.items() if name in names}
    source = ASTSource(
        fn=kernel,
        signature={
            name: "constexpr" if name in constants else types.get(name, "*i32") for name in names
        },
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(names)
            if aligned and name not in constants
        },
    )
    options = {"num_warps": options["num_warps"]}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def instructions(form: Any) -> Counter[str]:
    """Instructions of the PTX that ptxas has accepted, with how many there are of each."""
    assert form.asm["cubin"]
    return Counter(re.findall(r"^\s+(?:@\S+ )?([a-z][\w.:]*) ", form.asm["ptx"], re.M))


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", FORMS)
def test_the_kernels_compile_to_what_they_promise(name: str, dtype: str, aligned: bool) -> None:
    found = instructions(compiled(*FORMS[name], dtype=dtype, aligned=aligned))
    assert found["fma.rn.f32"]
    for instruction in found:
        assert not instruction.startswith(("atom", "red.")), "sums in an order left to chance"
        assert not instruction.startswith(("mma", "wgmma")), "a product of fewer bits"
        assert ".ftz" not in instruction, "denormals would be lost"
    # 16 bytes at once where all is aligned; a row of odd length would fault.
    assert ("ld.global.v4.b32" in found) == aligned


def check_strides(form: Any) -> None:
    """That they become 64 bits first: a weight of 151,936 rows of 16,384 is past 2^31."""
    intermediate = compiled(*form, dtype="bf16", aligned=True).asm["ttir"]
    uses = re.findall(r"%\w+ = (\S+) [^\n]*%\w+_row\b", intermediate)
    assert uses == ["arith.extsi"] * 2


@pytest.mark.parametrize("name", FORMS)
def test_strides_are_multiplied_in_64_bits(name: str) -> None:
    check_strides(FORMS[name])
