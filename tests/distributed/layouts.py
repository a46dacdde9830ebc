"""What tests do on a grid of ranks: join it, build a model on it, compare its gradients."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import torch
from megatron.core import parallel_state
from safetensors.torch import save_file
from torch import Tensor

from megatron_replay import parallel
from megatron_replay.checkpoint.hf import HFReader
from megatron_replay.checkpoint.load import LoadedModel, load_model
from megatron_replay.config import ModelConfigSource, ParallelConfig
from megatron_replay.data.corpus import Corpus
from megatron_replay.data.forest import Forest, plant
from megatron_replay.data.loader import GlobalBatches
from megatron_replay.data.packing import PackedBatch, pack_batch
from megatron_replay.data.replay import full_targets
from megatron_replay.forward import MicroBatch
from megatron_replay.model import heads
from megatron_replay.model.selected_rows import SelectedRows
from tests.tiny import VOCAB_SIZE

SEQ_LENGTH = 64


@dataclasses.dataclass(frozen=True)
class Layout:
    """A grid of processes, and what may vary on it."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    bf16: bool = False

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
        switches = "SP" * self.sequence_parallel + "bf16" * self.bf16
        return f"TP{self.tp}PP{self.pp}DP{self.dp}{switches}"


def join_groups(layout: Layout) -> parallel.Parallel:
    """Megatron's groups for ``layout``; the ones of an earlier layout are left first."""
    logging.getLogger("megatron").setLevel(logging.ERROR)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    return parallel.build_groups(layout.config(), torch.device("cpu"))


def build(layout: Layout, groups: parallel.Parallel, checkpoint: Path) -> LoadedModel:
    source = ModelConfigSource(load=str(checkpoint), bf16=layout.bf16)
    return load_model(source, layout.config(), groups)


def global_batch(corpus: Corpus, k: int = 0) -> Forest:
    """The documents of global batch ``k``."""
    batches = GlobalBatches(
        corpus.lengths, seq_length=SEQ_LENGTH, global_batch_size=4, seed=1, epochs=4
    )
    return plant(corpus, batches.documents(k), corpus.lengths)


def micro_batches(groups: parallel.Parallel, corpus: Corpus, k: int = 0) -> list[PackedBatch]:
    """This rank's micro-batches of global batch ``k``."""
    parts = global_batch(corpus, k).balanced_cut(SEQ_LENGTH, groups.dp_size)
    own = parts[groups.dp_rank :: groups.dp_size]
    return [pack_batch(corpus, part, corpus.lengths, multiple=groups.tp_size) for part in own]


def save_tensors(tensors: dict[str, Tensor], like: Path, directory: Path) -> None:
    """Write tensors under Hugging Face's names as a directory like that of the model ``like``."""
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_bytes((like / "config.json").read_bytes())


def fill(
    tensors: dict[str, Tensor], model: LoadedModel, groups: parallel.Parallel, directory: Path
) -> None:
    """Copy this rank's part of a directory's tensors into ``tensors``, by parameter name."""
    reader = HFReader(directory)
    for name, tensor in tensors.items():
        reader.fill(tensor, model.mapping(name), groups.tp_rank, groups.tp_size)


def full_loss_work(
    layout: Layout,
    groups: parallel.Parallel,
    batches: list[PackedBatch],
    *,
    vocab_size: int = VOCAB_SIZE,
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
            rows_N, batch.documents, len(batch.token_T), groups.tp_group,
            sequence_parallel=layout.sequence_parallel,
        )  # fmt: skip
        head = heads.full_loss(rows.rows_N, labels_N, groups, vocab_size=vocab_size)
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
