"""Write the quick start's base model before training: Qwen3's architecture, random weights.

python examples/quickstart/init_base.py --tokenizer DIR --output DIR
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_replay.checkpoint.export import write_random
from megatron_replay.data.tokenizer import load_tokenizer
from megatron_replay.errors import ReplayError
from megatron_replay.model.config import ModelConfig


def main() -> int:
    """Write it; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        config = ModelConfig(
            num_layers=4,
            hidden_size=128,
            ffn_hidden_size=384,
            num_attention_heads=4,
            num_query_groups=2,
            kv_channels=32,
            vocab_size=load_tokenizer(options.tokenizer).vocab_size,
            max_position_embeddings=1024,
            rotary_base=10_000.0,
            layernorm_epsilon=1e-6,
            tie_embeddings=True,
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
