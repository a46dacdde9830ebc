"""What --dry-run predicts that a layer keeps for backward, against what autograd keeps."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_replay import stage0, stage1
from megatron_replay.config import ParallelConfig
from megatron_replay.data.packing import forest_of, pack_batch
from megatron_replay.errors import ConfigError
from megatron_replay.estimate import layer_activations
from megatron_replay.model.config import ModelConfig
from megatron_replay.platform.devices import NPU
from tests import pool
from tests.tiny import save_corpus, save_qwen3

SEQ_LENGTH = 16384  # every document in one step and micro-batch
SHAPE = {
    "hidden_size": 128,
    "head_dim": 32,
    "intermediate_size": 384,
    "max_position_embeddings": 2048,
}


def kept(rank: int, world_size: int, folder: Path, layers: int, bf16: bool) -> int:
    """Bytes of what a step's forward pass saves, parameters excepted."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storages[tensor.data_ptr()] = tensor.untyped_storage()  # kept: no address comes twice
        return tensor

    model = save_qwen3(folder / f"model{layers}", tied=True, num_hidden_layers=layers, **SHAPE)
    flags = f"--loss full --lr 1e-5 --seq-length {SEQ_LENGTH} --train-iters 1 --global-batch-size 1"
    flags += " --optimizer adamw --probe-interval 0" + " --bf16" * bf16
    arguments = ["--load", str(model), "--data-path", str(folder / "corpus")]
    arguments += ["--save", str(folder / f"run{layers}"), *flags.split()]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert stage1.main(arguments) == 0
    return sum(s.nbytes() for s in {s.data_ptr(): s for s in storages.values()}.values())


@pytest.mark.parametrize(
    ("tied", "layout", "processes", "expected"),
    [
        (True, (1, 1), 1, ""),
        (True, (2, 2), 4, "6"),
        (False, (2, 2), 4, "5"),
        (True, (2, 1), 4, "5"),
    ],
)
def test_each_communicator_of_an_npu_has_two_buffers(
    tmp_path, monkeypatch, capsys, tied, layout, processes, expected
) -> None:
    save_qwen3(tmp_path / "model", tied=tied)
    save_corpus(tmp_path / "corpus", num_documents=4)
    monkeypatch.setenv("HCCL_BUFFSIZE", "1024")
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    tp, pp = map(str, layout)
    printed = {}
    for platform in ("cpu", "npu"):
        argv = ["--load", str(tmp_path / "model"), "--data-path", str(tmp_path / "corpus")]
        argv += ["--store", str(tmp_path / "store"), "--platform", platform, "--dry-run"]
        argv += ["--tensor-model-parallel-size", tp, "--pipeline-model-parallel-size", pp]
        assert stage0.main(argv) == 0
        printed[platform] = capsys.readouterr().out
    assert "communicators" not in printed["cpu"]
    found = re.findall(r"buffers of (\d) communicators +(\d+).00 GiB", printed["npu"])
    assert found == ([(expected, str(2 * int(expected)))] if expected else [])


def test_a_buffer_size_that_is_no_number_is_refused(monkeypatch) -> None:
    for size in ("1G", "0", "-1"):
        monkeypatch.setenv("HCCL_BUFFSIZE", size)
        with pytest.raises(ConfigError, match=rf"HCCL_BUFFSIZE.*{size}"):
            NPU.communicator_bytes()
    monkeypatch.setenv("HCCL_BUFFSIZE", "")
    assert NPU.communicator_bytes() == 400 << 20


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("longest_schema", [0, 1600])
def test_layer_keeps_what_the_estimate_says(
    bf16: bool, longest_schema: int, tmp_path: Path
) -> None:
    """Of documents that share nothing, or a prefix whose keys and masks are a fifth of all."""
    stems = {"stems": 1, "longest_schema": longest_schema} if longest_schema else {}
    corpus = save_corpus(tmp_path / "corpus", num_documents=12, longest=120, **stems)
    [two] = pool.run(1, kept, tmp_path, 2, bf16)
    [four] = pool.run(1, kept, tmp_path, 4, bf16)
    forest = forest_of(corpus, np.arange(12), corpus.lengths, share=True)
    batch = pack_batch(corpus, forest, corpus.lengths, multiple=1)
    shape = ModelConfig.from_hf(tmp_path / "model2")
    expected = layer_activations(shape, ParallelConfig(), batch, 2 if bf16 else 4)
    assert (four - two) / 2 == pytest.approx(expected, rel=0.1)
