"""What a set of ranks does for the layout tests: compare one layout with transformers' numbers."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_replay import parallel
from megatron_replay.checkpoint.hf import HFReader, load_hf_weights
from megatron_replay.checkpoint.load import LoadedModel, load_model
from megatron_replay.config import ModelConfigSource, OptimizerConfig, ParallelConfig
from megatron_replay.data.corpus import Corpus
from megatron_replay.data.packing import PackedBatch, pack_batch
from megatron_replay.data.replay import full_targets
from megatron_replay.data.sampler import GlobalBatches
from megatron_replay.forward import MicroBatch, forward_backward, forward_only
from megatron_replay.model import heads
from megatron_replay.model.selected_rows import SelectedRows
from megatron_replay.optim.build import build_optimizer
from megatron_replay.training.step import train_step, wrap_for_training

SEQ_LENGTH, GLOBAL_BATCH_SIZE = 64, 4
LR, STEPS = 3e-4, 3


@dataclasses.dataclass(frozen=True)
class Layout:
    """A grid of processes, and what may vary on it."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    bf16: bool = False
    micro_batch_size: int = 1

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def config(self) -> ParallelConfig:
        return ParallelConfig(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            sequence_parallel=self.sequence_parallel,
        )

    def __str__(self) -> str:
        return (
            f"TP{self.tp}PP{self.pp}DP{self.dp}{'SP' * self.sequence_parallel}{'bf16' * self.bf16}"
            f"MBS{self.micro_batch_size}"
        )


def join_groups(layout: Layout) -> parallel.Parallel:
    """Megatron's groups for ``layout``; the ones of an earlier layout are left first."""
    logging.getLogger("megatron").setLevel(logging.ERROR)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    return parallel.build_groups(layout.config(), torch.device("cpu"))


def build(layout: Layout, groups: parallel.Parallel, checkpoint: Path) -> LoadedModel:
    source = ModelConfigSource(load=str(checkpoint), bf16=layout.bf16)
    return load_model(source, layout.config(), groups)


def micro_batches(
    groups: parallel.Parallel, corpus: Corpus, k: int = 0, *, size: int = 1
) -> list[Any]:
    batches = GlobalBatches(
        corpus.lengths,
        seq_length=SEQ_LENGTH,
        global_batch_size=GLOBAL_BATCH_SIZE,
        micro_batch_size=size,
        seed=1,
        epochs=4,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
    )
    return [
        pack_batch(corpus, packs, SEQ_LENGTH, corpus.lengths) for packs in batches.micro_batches(k)
    ]


def compare(
    layout: Layout, checkpoint: Path, corpus_prefix: Path, expected: Path
) -> dict[str, Any]:
    """Distances of one layout from the reference saved in ``expected``; called on every rank."""
    groups = join_groups(layout)
    corpus = Corpus(corpus_prefix)
    model = build(layout, groups, checkpoint)
    reference = torch.load(expected / "reference.pt")
    batches = micro_batches(groups, corpus, size=layout.micro_batch_size)
    report: dict[str, Any] = {"logits": 0.0, "loss": 0.0, "gradients": (0.0, "")}
    _check_sequence_shards(layout, model)
    outputs = forward_only(
        model.module, [MicroBatch(batch, lambda h, w: h.all() @ w.T) for batch in batches]
    )
    for batch, logits_TV in zip(batches, outputs, strict=False):
        rows = logits_TV.shape[1]
        columns = groups.tp_rank * rows + torch.arange(rows)
        for document, reference_NV in reference["logits"].items():
            rows = (batch.document_BS.flatten() == document).nonzero().squeeze(1)
            if len(rows):
                error = (logits_TV[rows].float() - reference_NV[:, columns]).abs().max().item()
                report["logits"] = max(report["logits"], error)
    ddp = wrap_for_training(model)
    sums = forward_backward(ddp, _work(layout, groups, batches))
    if sums is not None:
        dist.all_reduce(sums, group=groups.dp_group)
        report["loss"] = abs(sums[0] / sums[1] - reference["loss"]).item()
    report["gradients"] = worst_gradient(model, ddp, groups, expected / "gradients")
    settings = OptimizerConfig(
        optimizer="adamw", lr=LR, weight_decay=0.01, clip_grad=1.0, lr_decay_style="constant"
    )
    optimizer = build_optimizer(settings, model, ddp, groups)
    losses = []
    for k in range(STEPS):
        batches = micro_batches(groups, corpus, k, size=layout.micro_batch_size)
        work = _work(layout, groups, batches, last_layer_at_selected=k % 2 == 1)
        result = train_step(ddp, optimizer, work, groups, lr=LR)
        losses.append(result.loss)
        if k == 0:
            report["grad_norm"] = result.grad_norm
    report["losses"] = losses
    return report


def _check_sequence_shards(layout: Layout, model: LoadedModel) -> None:
    """Sequence parallelism that is silently off would pass every comparison: look at the shapes."""
    length = SEQ_LENGTH // (layout.tp if layout.sequence_parallel else 1)

    def check(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert inputs[0].shape[0] == length, (str(layout), inputs[0].shape)

    for layer in model.module.decoder.layers:
        layer.input_layernorm.register_forward_pre_hook(check)


def _work(
    layout: Layout,
    groups: parallel.Parallel,
    batches: list[PackedBatch],
    *,
    last_layer_at_selected: bool = True,
) -> list[MicroBatch]:
    work = []
    for batch in batches:
        rows_N, labels_N = full_targets(batch)
        rows = SelectedRows.of(
            rows_N,
            batch.segments,
            SEQ_LENGTH,
            groups.tp_group,
            sequence_parallel=layout.sequence_parallel,
        )
        head = heads.full_loss(rows.rows_N, labels_N, groups)
        work.append(MicroBatch(batch, head, rows if last_layer_at_selected else None))
    return work


def worst_gradient(
    model: LoadedModel, ddp: torch.nn.Module, groups: parallel.Parallel, directory: Path
) -> tuple[float, str]:
    """Largest error of any gradient, relative to its tensor's largest entry, and its name."""
    gradients: dict[str, Tensor] = {
        name: torch.empty(p.shape, dtype=torch.float32)
        for name, p in model.module.named_parameters()
    }
    load_hf_weights(
        gradients.items(),
        HFReader(directory),
        model.shape,
        tp_rank=groups.tp_rank,
        tp_size=groups.tp_size,
        layer_offset=model.layer_offset,
    )
    worst = (0.0, "")
    for name, parameter in model.module.named_parameters():
        error = (parameter.main_grad - gradients[name]).abs().max() / gradients[name].abs().max()
        worst = max(worst, (error.item(), name))
    return worst
