"""Write a small model of Qwen3's architecture with random weights: what examples start from.

python examples/quickstart/init_base.py --tokenizer DIR --output DIR
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_replay.checkpoint.export import write_random
from megatron_replay.data.tokenizer import load_tokenizer
from megatron_replay.errors import ReplayError
from megatron_replay.model.config import ModelConfig

SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "ffn_hidden_size": 384,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 32,
    "rotary_base": 10_000.0,
    "tie_embeddings": True,
}
#: Qwen3-4B and 8B keep heads and groups, so that their layouts fit, and are 32 times narrower.
QWEN3 = SMALL | {
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "kv_channels": 4,
    "rotary_base": 1e6,
}
SHAPES = {
    "quickstart": SMALL,
    "qwen3-4b": QWEN3 | {"hidden_size": 80, "ffn_hidden_size": 304},
    "qwen3-8b": QWEN3 | {"tie_embeddings": False},
}


def main() -> int:
    """Write the model; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="quickstart")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        config = ModelConfig(
            num_layers=4,
            vocab_size=load_tokenizer(options.tokenizer).vocab_size,
            max_position_embeddings=1024,
            layernorm_epsilon=1e-6,
            **SHAPES[options.shape],
        )
        write_random(
            options.output, config, seed=options.seed, init_std=0.02, tokenizer=options.tokenizer
        )
    except ReplayError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{options.output}: {config.num_parameters():,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
