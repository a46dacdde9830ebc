"""Compares each layer's activations and gradients on a device with those of the CPU in fp32.

A model as wide as Qwen3-4B takes one micro-batch forward and backward three times: on the CPU in
fp32, the reference; the same with what each module returns rounded to bf16, which shows the error
of rounding alone (many CPUs multiply bf16 a hundred times as slowly); on the device in bf16.
Weights and tokens are the same. Each device has a process of its own, since megatron-core can be
prepared for one only.

Shapes: T rows of the micro-batch, N rows with a loss.
"""

from __future__ import annotations

import multiprocessing
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_replay import parallel
from megatron_replay.checkpoint.export import write_random
from megatron_replay.config import ModelConfigSource, ParallelConfig
from megatron_replay.data.forest import Forest
from megatron_replay.data.packing import PackedBatch, to_device
from megatron_replay.kernels.packed_attention import Documents
from megatron_replay.loss.candidate_sets import CandidateSets
from megatron_replay.model.config import ModelConfig
from megatron_replay.platform import Platform, select
from megatron_replay.platform.examination import Finding

#: Qwen3-4B with a ninth of its layers and a small vocabulary: 0.45 billion parameters.
SHAPE = ModelConfig(
    num_layers=4,
    hidden_size=2560,
    ffn_hidden_size=9728,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=8192,
    max_position_embeddings=1024,
    rotary_base=1e6,
    layernorm_epsilon=1e-6,
    tie_embeddings=False,
)
#: Three documents of 48 positions, of which two begin with 24 of the one before.
_FOREST = Forest(np.arange(3), np.full(3, 48), np.array([0, 24, 24]))
#: Positions at the end of each document with a loss, and candidates of each beside its label.
_LABELS, _CANDIDATES = 16, 64
#: A device may differ from the reference by so many times what rounding alone does, since it may
#: round more often; a wrong kernel differs by orders of magnitude.
_TOLERANCE = 4.0
#: Numbers compared of a parameter's gradient, evenly spaced.
_SAMPLE = 1 << 16


class Pass(NamedTuple):
    """What one pass computed, by part (embedding, layer 0, ..., head), on the host in fp32.

    Attributes:
        activations: what each part returned.
        gradients: those of each part's parameters.
    """

    activations: dict[str, Tensor]
    gradients: dict[str, list[Tensor]]


class Errors(NamedTuple):
    """|x - reference| / |reference| of a part: of its activations, and its parameters' largest."""

    activation: float
    gradient: float


def in_new_process(device: str, folder: Path) -> int:
    """The passes on ``device`` in a fresh process, which must not be a fork: its exit code."""
    process = multiprocessing.get_context("spawn").Process(target=run_on, args=(device, folder))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def compare(
    platform: Platform,
    shape: ModelConfig = SHAPE,
    *,
    run: Callable[[str, Path], int] = in_new_process,
) -> Iterator[Finding]:
    """A finding for each part of a model of ``shape``; an error where a device is off.

    Of the CPU it shows the errors of rounding alone. ``run`` runs ``run_on`` somewhere.
    """
    devices = dict.fromkeys(["cpu", platform.name])
    passes: list[Pass] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "no tokenizer").mkdir()
        write_random(
            folder / "model",
            shape,
            seed=0,
            init_std=0.02,
            tokenizer=folder / "no tokenizer",
            dtype=torch.bfloat16,  # so that all passes have equal weights
        )
        for device in devices:
            if (code := run(device, folder)) != 0:
                advice = "Its error is printed above"
                found = f"the pass on {device} failed (exit code {code})"
                yield Finding("layers", "error", found, advice)
                return
            passes += torch.load(folder / device, weights_only=False)
    reference, *others = (Pass(*found) for found in passes)
    yield from judge(*(errors_of(found, reference) for found in others), device=platform.name)


def errors_of(found: Pass, reference: Pass) -> dict[str, Errors]:
    """The errors of each part."""
    return {
        part: Errors(
            _distance(found.activations[part], reference.activations[part]),
            max(map(_distance, found.gradients[part], gradients)),
        )
        for part, gradients in reference.gradients.items()
    }


def _distance(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


def judge(
    rounding: dict[str, Errors], device_errors: dict[str, Errors] | None = None, *, device: str
) -> Iterator[Finding]:
    """Compare a device's errors, if there is one, with those of rounding alone."""
    for part, usual in rounding.items():
        found = (device_errors or rounding)[part]
        text = f"activations {found.activation:.1e}, gradients {found.gradient:.1e}"
        if device_errors is None:
            text = f"rounding to bf16: {text}"
        else:
            text = f"{device} in bf16: {text}; rounding alone {usual.activation:.1e}, "
            text += f"{usual.gradient:.1e}"
        # Written so that NaN fails.
        if all(x <= _TOLERANCE * y for x, y in zip(found, usual, strict=True)):
            yield Finding(part, "ok", text)
        else:
            advice = "Do not train: an operator before this part, or after it in backward, is wrong"
            yield Finding(part, "error", text, advice)


def run_on(device: str, folder: Path) -> None:
    """Run the passes of ``folder``'s model on ``device``; write them into a file of its name."""
    groups = parallel.initialize(ParallelConfig(), select(device))
    if device == "cpu":
        passes = [_one_pass(folder / "model", groups, is_rounded=x) for x in (False, True)]
    else:
        passes = [_one_pass(folder / "model", groups, bf16=True)]
    torch.save([tuple(found) for found in passes], folder / device)
    parallel.shutdown()


class _Round(torch.autograd.Function):
    """x in bf16's precision, and its gradient too."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.bfloat16().float()

    @staticmethod
    def backward(_: Any, grad: Tensor) -> Tensor:
        return grad.bfloat16().float()


def _round_output(_: Any, __: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (_round_output(_, __, output[0]), *output[1:])
    is_hidden = isinstance(output, Tensor) and output.is_floating_point()
    return _Round.apply(output) if is_hidden else output  # type: ignore[no-untyped-call]


def _one_pass(
    model: Path, groups: parallel.Parallel, *, bf16: bool = False, is_rounded: bool = False
) -> Pass:
    # Only now: megatron-core may be imported once the platform is prepared, not before.
    from megatron_replay.checkpoint.load import load_model
    from megatron_replay.forward import forward_backward
    from megatron_replay.training.step import wrap_for_training

    source = ModelConfigSource(load=str(model), bf16=bf16)
    loaded = load_model(source, ParallelConfig(), groups)
    if is_rounded:
        for module in loaded.module.modules():
            module.register_forward_hook(_round_output)
    activations: dict[str, Tensor] = {}

    def keep(part: str, _: Any, __: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        activations[part] = hidden.detach().float().cpu()

    for name, module in loaded.module.named_modules():
        if re.fullmatch(r"embedding|decoder\.layers\.\d+|decoder\.final_layernorm", name):
            module.register_forward_hook(partial(keep, _part(name)))
    wrapped = wrap_for_training(loaded)
    wrapped.zero_grad_buffer()
    weight = loaded.module.output_weight()
    forward_backward(wrapped, [_micro_batch(loaded.shape.vocab_size, weight, groups)])
    gradients: dict[str, list[Tensor]] = {part: [] for part in activations}
    for name, parameter in loaded.module.named_parameters():
        gradient = parameter.main_grad.flatten()
        # An odd step, so that rows of a matrix are not all sampled in the same columns.
        sample = gradient[:: len(gradient) // _SAMPLE | 1]
        gradients[_part(name)].append(sample.cpu())
    return Pass(activations, gradients)


def _part(name: str) -> str:
    """The part of a module or parameter: decoder.layers.3.mlp -> layer 3."""
    layer = re.match(r"decoder\.layers\.(\d+)", name)
    return f"layer {layer[1]}" if layer else "embedding" if name.startswith("emb") else "head"


def _micro_batch(vocab_size: int, weight: Tensor, groups: parallel.Parallel) -> Any:
    """Random documents that share prefixes, and the restricted loss of their last positions."""
    from megatron_replay import kernels
    from megatron_replay.forward import MicroBatch
    from megatron_replay.model import heads
    from megatron_replay.model.selected_rows import SelectedRows

    random = np.random.default_rng(0)
    own_D, shared_D = _FOREST.own_D, _FOREST.shared_D
    stop_D = np.cumsum(own_D)
    token_T = torch.from_numpy(random.integers(0, vocab_size, stop_D[-1]))
    label_T = torch.from_numpy(random.integers(0, vocab_size, stop_D[-1]))
    rows_N = torch.from_numpy(np.concatenate([np.arange(x - _LABELS, x) for x in stop_D]))
    position_T = np.concatenate(
        [np.arange(s, s + own) for s, own in zip(shared_D, own_D, strict=True)]
    )
    batch = PackedBatch(
        forest=_FOREST,
        first_row_D=stop_D - _FOREST.positions_D,
        token_T=token_T,
        label_T=label_T,
        loss_mask_T=torch.zeros(len(token_T), dtype=torch.bool).index_fill(0, rows_N, True),
        position_T=torch.from_numpy(position_T.astype(np.int32)),
        documents=Documents.of(own_D.tolist(), shared_D.tolist()),
    )
    labels_N = label_T[rows_N].numpy()
    chosen = [
        np.union1d(random.integers(0, vocab_size, _CANDIDATES), label).astype(np.int32)
        for label in labels_N
    ]
    offsets = np.append(0, np.cumsum([len(ids) for ids in chosen]))
    sets = CandidateSets.of(np.concatenate(chosen), offsets, labels_N, vocab_size=vocab_size)
    backend = kernels.HEAD.choose("auto", weight)
    if backend.reads_transpose:
        sets = sets.with_transpose()
    rows = SelectedRows.of(
        rows_N, batch.documents, len(token_T), groups.tp_group, sequence_parallel=False
    ).to(groups.device)
    sets = sets.moved(partial(to_device, device=groups.device))
    head = heads.restricted_loss(rows.rows_N, sets, groups, backend=backend)
    return MicroBatch(batch.to(groups.device), head, rows)
