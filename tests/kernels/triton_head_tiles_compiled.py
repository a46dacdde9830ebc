"""What the head's tiled Triton kernels become on an H100 (sm_90), for which no GPU is needed.

Run by test_triton_interpreter.py.
"""

from __future__ import annotations

import pytest

from megatron_replay.kernels.triton import head_tiles as kernels
from tests.kernels.triton_head_compiled import check_strides, compiled, instructions

FORMS = {
    "gather_dot": (kernels._tile_dots, kernels.DOT, {}),
    "segment_axpy_": (kernels._tile_axpys, kernels.AXPY, {"rows": None}),
    "segment_axpy_ into rows": (kernels._tile_axpys, kernels.AXPY, {}),
}


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("name", FORMS)
def test_they_use_the_matrix_units(name: str, aligned: bool) -> None:
    found = instructions(compiled(*FORMS[name], dtype="bf16", aligned=aligned))
    products = [name for name in found if name.startswith("wgmma.mma_async")]
    assert products
    assert all(name.endswith("f32.bf16.bf16") for name in products), "a sum of fewer bits"
    assert found["popc.b64"], "the bits below a bit, counted in a dozen instructions"
    assert not any(name.startswith(("atom", "red.")) for name in found)
    # Rows arrive 16 bytes at a time, behind the products of those before them.
    assert ("cp.async.cg.shared.global" in found) == aligned


@pytest.mark.parametrize("name", FORMS)
def test_strides_are_multiplied_in_64_bits(name: str) -> None:
    check_strides(FORMS[name])
