"""Write a model of Qwen3's architecture with random weights and a small tokenizer of its own.

    python -m examples.quickstart.init_base --output DIR

It shows that a path works; it knows nothing. The small shapes take seconds. The true shapes of
Qwen3-4B and 8B, in bf16, take minutes, 8 or 16 GB of disk, and 3 or 5 GB of memory.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from examples.quickstart import network
from examples.quickstart.general_text import general_texts
from megatron_replay.checkpoint.export import write_random
from megatron_replay.cli import exit_code_of
from megatron_replay.model.config import ModelConfig

VOCAB_SIZE = 1024  # of the tokenizer
SMALL: dict[str, Any] = {
    "num_layers": 4,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 1024,
    "hidden_size": 128,
    "ffn_hidden_size": 384,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 32,
    "rotary_base": 10_000.0,
    "tie_embeddings": True,
}
QWEN3 = SMALL | {"num_attention_heads": 32, "num_query_groups": 8, "rotary_base": 1e6}
#: Of Qwen3-4B and 8B: heads and groups are kept, so that their layouts fit; 32 times narrower.
TINY = QWEN3 | {"kv_channels": 4}
#: The shapes of the published config.json.
TRUE = QWEN3 | {
    "num_layers": 36,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "kv_channels": 128,
}
UNTIED = {"tie_embeddings": False}
SHAPES = {
    "quickstart": SMALL,
    "qwen3-4b-tiny": TINY | {"hidden_size": 80, "ffn_hidden_size": 304},
    "qwen3-8b-tiny": TINY | UNTIED,
    "qwen3-4b-random": TRUE | {"hidden_size": 2560, "ffn_hidden_size": 9728},
    "qwen3-8b-random": TRUE | UNTIED | {"hidden_size": 4096, "ffn_hidden_size": 12288},
}


PAD, EOS = "<|pad|>", "<|im_end|>"
SPECIAL_TOKENS = [PAD, "<|im_start|>", EOS]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def config(shape: str) -> ModelConfig:
    """The model of a name in ``SHAPES``."""
    return ModelConfig(layernorm_epsilon=1e-6, **SHAPES[shape])


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with a chat template, trained on general text and the domain's schema."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Often enough that the schema takes few tokens.
    bpe.train_from_iterator([network.SCHEMA] * 50 + general_texts(200), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def main() -> int:
    """Write the model; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="quickstart")
    options = parser.parse_args()
    model = config(options.shape)
    dtype = torch.bfloat16 if options.shape.endswith("-random") else torch.float32

    def write() -> str:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer().save_pretrained(folder)
            write_random(
                options.output, model, seed=0, init_std=0.02, tokenizer=folder, dtype=dtype
            )
        return f"{options.output}: {model.num_parameters():,} parameters"

    return exit_code_of(write)


if __name__ == "__main__":
    sys.exit(main())
