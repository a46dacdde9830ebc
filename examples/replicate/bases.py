"""The base models: two sizes of Qwen3's architecture, competent in the domains or ignorant."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_replay.checkpoint.export import write_random
from megatron_replay.data.tokenizer import load_tokenizer
from megatron_replay.model.config import ModelConfig

KNOWLEDGE = ("competent", "ignorant")
#: Tokens of a document that the base learns from; longer ones are cut into pieces.
SEQ_LENGTH = 128


@dataclass(frozen=True, kw_only=True)
class Size:
    """A shape, and how long and how fast its base is trained."""

    hidden_size: int
    num_layers: int
    num_attention_heads: int
    train_iters: int
    lr: float


SIZES = {
    "small": Size(hidden_size=128, num_layers=4, num_attention_heads=4, train_iters=1100, lr=4e-3),
    "large": Size(hidden_size=192, num_layers=6, num_attention_heads=6, train_iters=1300, lr=3e-3),
}


def write_init(directory: Path, size: Size, *, tokenizer: Path) -> None:
    """Random weights."""
    shape = ModelConfig(
        num_layers=size.num_layers,
        hidden_size=size.hidden_size,
        ffn_hidden_size=3 * size.hidden_size,
        num_attention_heads=size.num_attention_heads,
        num_query_groups=size.num_attention_heads // 2,
        kv_channels=32,
        vocab_size=load_tokenizer(tokenizer).vocab_size,
        max_position_embeddings=1024,
        layernorm_epsilon=1e-6,
        rotary_base=10_000.0,
        tie_embeddings=True,
    )
    write_random(directory, shape, seed=0, init_std=0.02, tokenizer=tokenizer)


def pretraining(size: Size, *, init: Path, corpus: Path, save: Path) -> list[str]:
    """Stage 1's flags for a base: full softmax on all tokens."""
    # fmt: off
    return [
        "--load", str(init), "--data-path", str(corpus), "--save", str(save),
        "--loss", "full", "--optimizer", "adamw", "--seq-length", str(SEQ_LENGTH),
        "--micro-batch-size", "16", "--global-batch-size", "16",
        "--train-iters", str(size.train_iters),
        "--lr", str(size.lr), "--min-lr", str(size.lr / 100), "--lr-decay-style", "linear",
        "--lr-warmup-iters", "50", "--weight-decay", "0.1",
        "--save-interval", "200", "--keep-last", "1", "--probe-interval", "0",
    ]
    # fmt: on
