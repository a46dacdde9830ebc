"""Hugging Face directory -> training checkpoint, and the comparison of logits for both ways."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_replay.checkpoint.hf import HFReader, require_same
from megatron_replay.checkpoint.load import LoadedModel, base_fingerprint, load_model
from megatron_replay.checkpoint.model_files import fingerprints, keep_model_files
from megatron_replay.checkpoint.names import hf_tensor_shapes
from megatron_replay.checkpoint.staging import publish, staging_directory, start_directory
from megatron_replay.checkpoint.training import CONVERTED_FROM, TrainState, save_checkpoint
from megatron_replay.config import ModelConfigSource, ParallelConfig
from megatron_replay.data.forest import Forest
from megatron_replay.data.packing import PackedBatch
from megatron_replay.errors import CheckpointError
from megatron_replay.forward import MicroBatch, forward_only
from megatron_replay.kernels.packed_attention import Documents
from megatron_replay.parallel import Parallel

#: Largest difference of logits, relative to the largest one: rounding, by a wide margin.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_VERIFIED_TOKENS = 32


def write_mcore(
    model: LoadedModel,
    target: Path,
    groups: Parallel,
    source: ModelConfigSource,
    config: ParallelConfig,
    *,
    overwrite: bool,
    verify: bool,
) -> None:
    """Write a training checkpoint; ``verify`` first loads it into another model and compares.

    Collective over the world.

    Raises:
        CheckpointError: a weight or the logits differ from the model's.
        OutputError: ``target`` cannot be written.
    """
    staged = staging_directory(target)
    groups.on_rank_zero(lambda: start_directory(target, overwrite=overwrite))
    groups.on_rank_zero(lambda: keep_model_files(model.files, staged))
    is_exact = _held_exactly(model, torch.bfloat16 if source.bf16 else torch.float32)
    origin = groups.from_rank_zero(lambda: base_fingerprint(source.load) if is_exact else "")
    identity = {CONVERTED_FROM: origin} if origin else {}
    state = TrainState(0, 0, 0, identity, model_files=fingerprints(model.files))
    save_checkpoint(staged, state, model.module, None, groups)
    if verify:
        written = load_model(dataclasses.replace(source, load=str(staged)), config, groups)
        groups.agreed(lambda: _require_same_weights(written, model))
        require_logits(written, Path(source.load), groups, torch.float32)
    groups.on_rank_zero(lambda: publish(staged, target, overwrite=overwrite))


def _held_exactly(model: LoadedModel, dtype: torch.dtype) -> bool:
    """Whether no weight of the Hugging Face directory is rounded by ``dtype``, as it is stored."""
    reader = HFReader(model.files)
    stored = {reader.stored[name].torch_dtype() for name in hf_tensor_shapes(model.shape)}
    return all(torch.promote_types(one, dtype) is dtype for one in stored)


def _require_same_weights(written: LoadedModel, model: LoadedModel) -> None:
    expected = dict(model.module.named_parameters())
    for name, found in written.module.named_parameters():
        require_same(name, found.detach(), expected[name].detach(), written.files.parent)


@torch.no_grad()
def require_logits(
    model: LoadedModel, hf_directory: Path, groups: Parallel, dtype: torch.dtype
) -> None:
    """Compare this model's logits with those transformers computes from ``hf_directory``.

    ``dtype`` is the one that the directory's weights were rounded to.

    Raises:
        CheckpointError: they differ by more than rounding.
    """
    generator = torch.Generator().manual_seed(0)
    length = _VERIFIED_TOKENS
    token_T = torch.randint(model.shape.vocab_size, (length,), generator=generator)
    batch = PackedBatch(
        forest=Forest(*np.array([[0], [length], [0]])),
        first_row_D=np.array([0]),
        token_T=token_T,
        label_T=torch.zeros_like(token_T),
        loss_mask_T=torch.zeros(length, dtype=torch.bool),
        position_T=torch.arange(length, dtype=torch.int32),
        documents=Documents.of([length], [0]),
    ).to(groups.device)
    outputs = forward_only(
        model.module, [MicroBatch(batch, lambda hidden, weight: hidden.all() @ weight.T)]
    )

    if outputs:  # the last pipeline stage
        padding = model.shape.vocabulary_rows(groups.tp_size) - outputs[0].shape[1]
        logits = torch.nn.functional.pad(outputs[0], (0, padding)).contiguous()
        shards = [torch.empty_like(logits) for _ in range(groups.tp_size)]
        dist.all_gather(shards, logits, group=groups.tp_group)

    def compare() -> None:
        if not outputs or groups.tp_rank or groups.dp_rank:
            return
        from transformers import AutoModelForCausalLM

        computed = outputs[0].dtype
        reference = AutoModelForCausalLM.from_pretrained(hf_directory, dtype=computed).eval()
        expected_TV = reference(token_T[None]).logits[0].float()
        found_TV = torch.cat(shards, 1)[:, : model.shape.vocab_size].float().cpu()
        difference_TV = found_TV - expected_TV
        error = (difference_TV.abs().max() / expected_TV.abs().max()).item()
        tolerance = max(_TOLERANCE[computed], _TOLERANCE[dtype])
        if not error <= tolerance:
            raise CheckpointError(
                "the converted model's logits differ from transformers'",
                where=hf_directory,
                expected=f"a relative error of at most {tolerance}",
                found=f"{error:.2e}",
            )
        print(f"verified: logits equal transformers' within {error:.1e} of the largest")

    groups.agreed(compare)
