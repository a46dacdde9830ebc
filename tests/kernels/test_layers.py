"""Norm, activation and rotation against float64 and against each other: torch's, and those of NPUs
on stand-ins for the operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from torch import Tensor

from megatron_replay.config import ParallelConfig
from megatron_replay.kernels import LAYERS
from megatron_replay.kernels.layers import TORCH_LAYERS, LayerBackend, Rotation
from megatron_replay.model.config import ModelConfig
from megatron_replay.model.gpt import transformer_config
from tests.loss.references import error
from tests.npu_stub import fused, layers
from tests.npu_stub.stand_in import calls

ROWS, HEADS, CHANNELS, EPS = 40, 6, 32, 1e-5
#: Of the largest number: fp32's rounding, and three roundings to bf16, each of at most 2^-8.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 3 * 2**-8}
#: Positions of rows that share prefixes are in no order.
ANGLES = torch.outer(
    torch.randint(0, 4000, (ROWS,), generator=torch.Generator().manual_seed(1)).float(),
    1e4 ** -(torch.arange(0, CHANNELS, 2) / CHANNELS),
)


@pytest.fixture(params=["torch", "ascend"])
def backend(request: pytest.FixtureRequest) -> Iterator[LayerBackend]:
    if request.param == "torch":
        yield TORCH_LAYERS
        return
    calls.clear()
    with fused.chosen():
        yield LAYERS.choose("auto", torch.zeros(1))
    assert len(calls) == 1, "no stand-in was called"


def operands(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def check(inputs: list[Tensor], found: Tensor, formula: Callable[..., Tensor]) -> None:
    """Value and gradients are those of ``formula`` in float64."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = formula(*exact)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)).to(found)
    bound = BOUNDS[found.dtype]
    assert error(found, expected) <= bound
    ours = torch.autograd.grad(found, inputs, upstream)
    theirs = torch.autograd.grad(expected, exact, upstream.double())
    for x, our_grad, their_grad in zip(inputs, ours, theirs, strict=True):
        assert our_grad.dtype is x.dtype
        assert error(our_grad, their_grad) <= bound


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(ROWS, 1, CHANNELS), (ROWS, 1, HEADS, CHANNELS)])
def test_rms_norm(backend, dtype, shape):
    x, weight = inputs = operands(shape, (CHANNELS,), dtype=dtype)

    def formula(x: Tensor, weight: Tensor) -> Tensor:
        return x / ((x * x).mean(-1, keepdim=True) + EPS).sqrt() * weight

    check(inputs, backend.rms_norm(x, weight, EPS), formula)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_swiglu_has_its_gate_first(backend, dtype):
    [x] = inputs = operands((ROWS, 1, 2 * CHANNELS), dtype=dtype)

    def formula(x: Tensor) -> Tensor:
        gate, linear = x[..., :CHANNELS], x[..., CHANNELS:]
        return gate / (1 + torch.exp(-gate)) * linear

    check(inputs, backend.swiglu(x), formula)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("rows", [slice(None), slice(5, 30, 3)])
def test_rotation(backend, dtype, rows):
    """As of complex numbers, whose parts are channels i and i + D / 2."""
    angles = ANGLES[rows]
    [x] = inputs = operands((len(angles), 1, HEADS, CHANNELS), dtype=dtype)
    rotation = Rotation.of(ANGLES, dtype).at(torch.arange(ROWS)[rows])

    def formula(x: Tensor) -> Tensor:
        turn = torch.polar(torch.ones_like(angles, dtype=torch.double), angles.double())
        turned = torch.complex(*x.chunk(2, -1)) * turn[:, None, None]
        return torch.cat([turned.real, turned.imag], -1)

    check(inputs, backend.rotate(x, rotation), formula)


def test_the_rotation_is_megatron_cores_to_the_bit():
    shape = ModelConfig(
        num_layers=1, hidden_size=24, ffn_hidden_size=8, num_attention_heads=HEADS,
        num_query_groups=HEADS, kv_channels=CHANNELS, vocab_size=8, max_position_embeddings=16,
        rotary_base=1e4, layernorm_epsilon=EPS, tie_embeddings=True, qk_layernorm=False,
    )  # fmt: skip
    config = transformer_config(shape, ParallelConfig())
    angles = torch.cat([ANGLES, ANGLES], -1)[:, None, None]
    for dtype in BOUNDS:
        [x] = operands((ROWS, 1, HEADS, CHANNELS), dtype=dtype)
        theirs = apply_rotary_pos_emb(x, angles, config, cp_group=object())
        assert torch.equal(TORCH_LAYERS.rotate(x, Rotation.of(ANGLES, dtype)), theirs)


def test_a_rotation_on_npus_keeps_its_angles_and_not_its_input():
    [x] = operands((ROWS, 1, HEADS, CHANNELS), dtype=torch.float32)
    rotation, kept = Rotation.of(ANGLES, torch.float32), []
    with fused.chosen(), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
        LAYERS.choose("auto", x).rotate(x, rotation)
    assert {saved.data_ptr() for saved in kept} == {part.data_ptr() for part in rotation}


@pytest.mark.parametrize(
    ("operator", "arguments", "message"),
    [
        ("npu_rms_norm", (torch.ones(2, 8), torch.ones(8).bfloat16()), "bfloat16"),
        ("npu_rms_norm", (torch.ones(2, 8), torch.ones(4)), "gamma"),
        ("npu_swiglu", (torch.ones(2, 9),), "odd"),
        ("npu_swiglu", (torch.ones(8, 2).T,), "contiguous"),
        ("npu_rotary_mul", (torch.ones(5, 2, 8), *[torch.ones(5, 1, 1, 8)] * 2), "four"),
        ("npu_rotary_mul", (torch.ones(5, 1, 2, 7), *[torch.ones(5, 1, 1, 7)] * 2), "7"),
        ("npu_rotary_mul", (torch.ones(5, 1, 2, 8), *[torch.ones(1, 1, 5, 8)] * 2), "S11D"),
        ("npu_rotary_mul", (torch.ones(5, 1, 2, 8), *[torch.full((5, 1, 1, 8), 3.0)] * 2), "cos"),
    ],
)
def test_stand_ins_refuse_what_the_documentation_rules_out(operator, arguments, message):
    with pytest.raises(RuntimeError, match=f"{operator}.*{message}"):
        getattr(layers, operator)(*arguments)
