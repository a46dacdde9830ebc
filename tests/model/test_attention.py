"""The measurement of the largest attention logits, against float64, one pair at a time."""

from __future__ import annotations

import math

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_replay.config import ParallelConfig
from megatron_replay.kernels.layers import Rotation
from megatron_replay.kernels.packed_attention import Documents
from megatron_replay.model.attention import PackedAttention, PackedDocuments, largest_logits
from megatron_replay.model.config import ModelConfig
from megatron_replay.model.gpt import transformer_config
from tests.loss.references import seen_rows

#: (own rows, positions shared with the document before) of documents by themselves, and of some
#: that begin alike, one of them with all its positions. Two rows of padding follow.
FORESTS = [([4, 3, 1, 8], [0, 0, 0, 0]), ([4, 3, 1, 0, 8], [0, 2, 4, 1, 1])]
LENGTH = 18
HEADS, GROUPS, CHANNELS = 6, 2, 4


def heads_of(number: int, length: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, number, CHANNELS, generator=generator)


def one_by_one(query: Tensor, key: Tensor, seen: list[list[int]], scale: float) -> Tensor:
    query, key, largest = query.double(), key.double(), []
    for head in range(query.shape[1]):
        group = head // (query.shape[1] // key.shape[1])
        logits = [
            scale * float(query[s, head] @ key[r, group])
            for s, rows in enumerate(seen)
            for r in rows
        ]
        largest.append(max(logits))
    return torch.tensor(largest)


@pytest.mark.parametrize("forest", FORESTS, ids=["alone", "shared"])
@pytest.mark.parametrize("rows", [1, 3, 4, 256])
@pytest.mark.parametrize("together", [1, 7, 256])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_largest_logits(rows, together, groups, forest):
    query, key = heads_of(HEADS, LENGTH), heads_of(groups, LENGTH, seed=1)
    query[sum(forest[0]) :] *= 100  # padding, which must not count
    documents = Documents.of(*forest, together=together)
    for dtype in (torch.float32, torch.bfloat16):  # accumulated in fp32
        query, key = query.to(dtype), key.to(dtype)
        ours = largest_logits(query, key, documents, scale=0.3, rows=rows)
        assert ours.dtype == torch.float32
        theirs = one_by_one(query, key, seen_rows(*forest), 0.3)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    padding = largest_logits(query, key, Documents.of([], []), scale=1.0)
    assert padding.tolist() == [-math.inf] * HEADS


class LargestTensor(TorchDispatchMode):
    """Elements of the largest floating-point tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point():
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("forest", [([512], [0]), ([384, 128], [0, 384])], ids=["alone", "shared"])
def test_no_more_logits_in_memory_than_a_block_of_rows(forest):
    """Each over the 512 keys of the longest document."""
    rows, keys = 32, 512
    query, key = heads_of(HEADS, 512), heads_of(GROUPS, 512, seed=1)
    with LargestTensor() as seen:
        largest_logits(query, key, Documents.of(*forest), scale=1.0, rows=rows)
    assert seen.elements == HEADS * rows * keys


@pytest.mark.parametrize("forest", FORESTS, ids=["alone", "shared"])
def test_recording_over_micro_batches_with_gradients_changes_nothing(monkeypatch, forest):
    shape = ModelConfig(
        num_layers=1, hidden_size=24, ffn_hidden_size=8, num_attention_heads=HEADS,
        num_query_groups=GROUPS, kv_channels=CHANNELS, vocab_size=8, max_position_embeddings=16,
        rotary_base=1e4, layernorm_epsilon=1e-6, tie_embeddings=True, qk_layernorm=False,
    )  # fmt: skip
    config = transformer_config(shape, ParallelConfig())
    attention = PackedAttention(config, 1, AttnMaskType.causal, "self")
    documents = PackedDocuments(Documents.of(*forest), None, LENGTH)
    documents.rotation = Rotation.of(torch.zeros(LENGTH, CHANNELS // 2), torch.float32)

    def run(seed: int) -> tuple[Tensor, Tensor]:
        """Output and expected maxima of one micro-batch."""
        numbers = enumerate((HEADS, GROUPS, GROUPS))
        query, key, value = (heads_of(n, LENGTH, seed=10 * seed + i) for i, n in numbers)
        operands = query.requires_grad_(), key, value
        out = attention(*(x[:, None] for x in operands), packed_seq_params=documents)
        return out, one_by_one(query.detach(), key, seen_rows(*forest), CHANNELS**-0.5)

    with monkeypatch.context() as patch:
        patch.setattr("megatron_replay.model.attention.largest_logits", None)  # would raise
        plain, _ = run(0)
    assert attention.max_logits is None
    attention.record_max_logits = True
    recorded, maxima = run(0)
    assert torch.equal(plain, recorded)
    expected = torch.stack([maxima, run(1)[1], run(2)[1]]).amax(0)
    with torch.no_grad():  # a probe, or the first pass of a layer that will be recomputed
        for seed in range(3, 6):
            run(seed)
    torch.testing.assert_close(attention.max_logits, expected, rtol=1e-6, atol=1e-6)
    assert not attention.max_logits.requires_grad
    assert attention.state_dict() == {}
