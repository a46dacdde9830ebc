"""Nothing as large as the vocabulary's weights is made in a training step: peak memory, measured.

Shapes: V vocabulary, H hidden channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_replay.data.corpus import Corpus
from megatron_replay.data.packing import pack_batch
from megatron_replay.data.replay import join_candidates
from megatron_replay.forward import MicroBatch, forward_backward
from megatron_replay.kernels import HEAD
from megatron_replay.loss.sharded import cross_entropy_of_sets
from megatron_replay.model import heads
from megatron_replay.model.selected_rows import HiddenStates
from megatron_replay.store import CandidateBatch, DocumentCandidates
from megatron_replay.training.step import wrap_for_training
from tests import pool
from tests.distributed.layouts import Layout, build, join_groups
from tests.tiny import save_corpus, save_qwen3

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
    ),
]

V, H = 400_000, 64
WEIGHT_MIB = V * H * 4 / 2**20  # 98
#: What a step of the rest of this model takes at its peak, with room.
OTHERS_MIB = 12


class Sets:
    """Every position that carries loss, with 50 ids over the vocabulary and the label."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus

    def read(self, document_ids: list[int], *, logits: bool) -> CandidateBatch:
        return CandidateBatch.of([self._document(document) for document in document_ids])

    def _document(self, document: int) -> DocumentCandidates:
        tokens, loss_mask = self.corpus[document].tokens, self.corpus[document].loss_mask
        positions = np.flatnonzero(loss_mask[1:]).astype(np.int32)
        spread = np.linspace(1000, V - 1, 50).astype(np.int32)
        sets = [np.unique(np.append(spread, tokens[position + 1])) for position in positions]
        return DocumentCandidates(
            positions=positions,
            offsets=np.concatenate([[0], np.cumsum([len(ids) for ids in sets])]),
            ids=np.concatenate(sets).astype(np.int32),
            lse=np.zeros(len(positions), np.float32),
            label_logprob=np.zeros(len(positions), np.float32),
            tail_mass=np.zeros(len(positions), np.float32),
            logits=None,
        )


def resident_mib(which: str) -> float:
    """Resident memory: VmRSS now, VmHWM at its highest since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024


def step_on(
    rank: int, world_size: int, layout: Layout, checkpoint: Path, prefix: Path, scope: str,
    dense: bool,
) -> dict[str, Any]:  # fmt: skip
    """MiB that the second step's peak is above where it began; the first one warms up."""
    groups = join_groups(layout)
    model = build(layout, groups, checkpoint)
    ddp = wrap_for_training(model)
    corpus = Corpus(prefix)
    batch = pack_batch(corpus, [np.arange(2)], 64, corpus.lengths)
    targets = join_candidates(batch, Sets(corpus), vocab_size=V, scope=scope)
    rows, backend = V // layout.tp, HEAD.choose("auto", torch.empty(0))
    sets = targets.sets.shard(groups.tp_rank * rows, rows)
    head = heads.restricted_loss(
        targets.rows_N, sets, groups, backend=backend, tail_logit_N=targets.tail_logit_N
    )

    def head_with_dense_gradient(hidden: HiddenStates, weight_VH: Tensor) -> Tensor:
        return cross_entropy_of_sets(
            hidden[targets.rows_N], weight_VH, sets, backend=backend, tail_logit_N=None,
            tp_group=groups.tp_group, reduce_hidden_grad=False, weight_grad_out=None,
        )  # fmt: skip

    work = [MicroBatch(batch, head_with_dense_gradient if dense else head)]
    forward_backward(ddp, work)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    before = resident_mib("VmRSS")
    forward_backward(ddp, work)
    return {
        "mib": resident_mib("VmHWM") - before,
        "moved": bool(model.module.output_weight().main_grad.any()),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    for name, tied in (("tied", True), ("untied", False)):
        save_qwen3(folder / name, tied=tied, vocab_size=V, num_hidden_layers=1)
    save_corpus(folder / "corpus", num_documents=2)
    return folder


@pytest.mark.parametrize("scope", ["position", "document"])
@pytest.mark.parametrize("weights", ["tied", "untied"])
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2)], ids=str)
def test_no_dense_weight_gradient(folder: Path, layout: Layout, weights: str, scope: str) -> None:
    paths = folder / weights, folder / "corpus"
    for found in pool.run(layout.tp, step_on, layout, *paths, scope, False):
        assert found["moved"]
        assert found["mib"] < OTHERS_MIB


def test_the_measure_sees_a_dense_one(folder: Path) -> None:
    paths = folder / "untied", folder / "corpus"
    [found] = pool.run(1, step_on, Layout(), *paths, "position", True)
    assert found["mib"] > 0.9 * WEIGHT_MIB
