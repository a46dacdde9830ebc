"""What a set of ranks does for the layout tests: compare one layout with transformers' numbers."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from megatron.core import parallel_state
from safetensors.torch import save_file
from torch import Tensor

from megatron_replay import parallel
from megatron_replay.checkpoint.hf import HFReader, load_hf_weights
from megatron_replay.checkpoint.load import LoadedModel, load_model
from megatron_replay.config import ModelConfigSource, OptimizerConfig, ParallelConfig
from megatron_replay.data.corpus import Corpus
from megatron_replay.data.loader import GlobalBatches
from megatron_replay.data.packing import PackedBatch, pack_batch
from megatron_replay.data.replay import full_targets
from megatron_replay.forward import MicroBatch, forward_backward, forward_only
from megatron_replay.model import heads
from megatron_replay.model.selected_rows import SelectedRows
from megatron_replay.optim.build import build_optimizer
from megatron_replay.training.step import train_step, wrap_for_training
from tests import tiny

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


def global_batches(
    corpus: Corpus, *, dp_rank: int = 0, dp_size: int = 1, size: int = 1
) -> GlobalBatches:
    return GlobalBatches(
        corpus.lengths, seq_length=SEQ_LENGTH, global_batch_size=GLOBAL_BATCH_SIZE,
        micro_batch_size=size, seed=1, epochs=4, dp_rank=dp_rank, dp_size=dp_size,
    )  # fmt: skip


def micro_batches(
    groups: parallel.Parallel, corpus: Corpus, k: int = 0, *, size: int = 1
) -> list[PackedBatch]:
    share = {"dp_rank": groups.dp_rank, "dp_size": groups.dp_size, "size": size}
    return [
        pack_batch(corpus, packs, SEQ_LENGTH, corpus.lengths)
        for packs in global_batches(corpus, **share).micro_batches(k)
    ]


def save_tensors(tensors: dict[str, Tensor], like: Path, directory: Path) -> None:
    """Write tensors under Hugging Face's names as a directory like that of the model ``like``."""
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_bytes((like / "config.json").read_bytes())


def fill(
    tensors: dict[str, Tensor], model: LoadedModel, groups: parallel.Parallel, directory: Path
) -> None:
    """Copy this rank's part of a directory's tensors into ``tensors``, by parameter name."""
    load_hf_weights(
        tensors.items(), HFReader(directory), model.shape, tp_rank=groups.tp_rank,
        tp_size=groups.tp_size, layer_offset=model.layer_offset,
    )  # fmt: skip


def save_reference(checkpoint: Path, corpus: Corpus, directory: Path) -> None:
    """What transformers computes, one document at a time, so that nothing can leak between two."""
    model = tiny.load_reference(checkpoint)
    logits, losses = {}, []
    for number in (int(d) for pack in global_batches(corpus).global_batch(0) for d in pack):
        document = corpus[number]
        tokens = torch.tensor(document.tokens).long()
        out = model(tokens[None, :-1]).logits[0]
        mask = torch.tensor(document.loss_mask[1:])
        losses.append(F.cross_entropy(out[mask], tokens[1:][mask], reduction="none"))
        logits[number] = out.detach()
    loss = torch.cat(losses).mean()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    norm = torch.cat([g.flatten() for g in gradients.values()]).double().norm().item()
    save_tensors(gradients, checkpoint, directory / "gradients")
    torch.save({"logits": logits, "loss": loss.detach(), "norm": norm}, directory / "reference.pt")


def compare(layout: Layout, folder: Path) -> dict[str, Any]:
    """Distances of one layout from ``folder``'s reference; called on every rank."""
    groups = join_groups(layout)
    corpus, reference = Corpus(folder / "corpus"), torch.load(folder / "expected" / "reference.pt")
    model = build(layout, groups, folder / "model")
    batches = micro_batches(groups, corpus, size=layout.micro_batch_size)
    report: dict[str, Any] = {"logits": 0.0, "loss": 0.0}
    _check_sequence_shards(layout, model)
    outputs = forward_only(
        model.module, [MicroBatch(batch, lambda h, w: h.all() @ w.T) for batch in batches]
    )
    for batch, logits_TV in zip(batches, outputs, strict=False):
        columns = groups.tp_rank * logits_TV.shape[1] + torch.arange(logits_TV.shape[1])
        for document, reference_NV in reference["logits"].items():
            rows = (batch.document_BS.flatten() == document).nonzero().squeeze(1)
            if len(rows):
                error = (logits_TV[rows].float() - reference_NV[:, columns]).abs().max().item()
                report["logits"] = max(report["logits"], error)
    ddp = wrap_for_training(model)
    sums = forward_backward(ddp, full_loss_work(layout, groups, batches))
    if sums is not None:
        dist.all_reduce(sums, group=groups.dp_group)
        report["loss"] = abs(sums[0] / sums[1] - reference["loss"]).item()
    report["gradients"] = worst_gradient(model, ddp, groups, folder / "expected" / "gradients")
    settings = OptimizerConfig(
        optimizer="adamw", lr=LR, weight_decay=0.01, clip_grad=1.0, lr_decay_style="constant"
    )
    optimizer = build_optimizer(settings, model, ddp, groups)
    results = []
    for k in range(STEPS):
        batches = micro_batches(groups, corpus, k, size=layout.micro_batch_size)
        work = full_loss_work(layout, groups, batches, last_layer_at_selected=k % 2 == 1)
        results.append(train_step(ddp, optimizer, work, groups, lr=LR))
    report["grad_norm"] = abs(results[0].grad_norm / reference["norm"] - 1)
    report["losses"] = [result.loss for result in results]
    return report


def _check_sequence_shards(layout: Layout, model: LoadedModel) -> None:
    """Sequence parallelism that is silently off would pass every comparison: look at the shapes."""
    length = SEQ_LENGTH // (layout.tp if layout.sequence_parallel else 1)

    def check(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert inputs[0].shape[0] == length, (str(layout), inputs[0].shape)

    for layer in model.module.decoder.layers:
        layer.input_layernorm.register_forward_pre_hook(check)


def full_loss_work(
    layout: Layout,
    groups: parallel.Parallel,
    batches: list[PackedBatch],
    *,
    last_layer_at_selected: bool = True,
    empty: int | None = None,
) -> list[MicroBatch]:
    """Micro-batches under the full loss; of number ``empty`` the positions are left out."""
    work = []
    for number, batch in enumerate(batches):
        rows_N, labels_N = full_targets(batch)
        if number == empty:
            rows_N, labels_N = rows_N[:0], labels_N[:0]
        rows = SelectedRows.of(
            rows_N, batch.segments, SEQ_LENGTH, groups.tp_group,
            sequence_parallel=layout.sequence_parallel,
        )  # fmt: skip
        head = heads.full_loss(rows.rows_N, labels_N, groups)
        work.append(MicroBatch(batch, head, rows if last_layer_at_selected else None))
    return work


def worst_gradient(
    model: LoadedModel, ddp: torch.nn.Module, groups: parallel.Parallel, directory: Path
) -> tuple[float, str]:
    """Largest error of any gradient, relative to its tensor's largest entry, and its name."""
    parameters = dict(model.module.named_parameters())
    gradients = {name: torch.empty(p.shape) for name, p in parameters.items()}
    fill(gradients, model, groups, directory)
    errors = [(0.0, "")]
    for name, parameter in parameters.items():
        error = (parameter.main_grad - gradients[name]).abs().max() / gradients[name].abs().max()
        errors.append((error.item(), name))
    return max(errors)
