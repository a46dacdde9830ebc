"""Blended weights against float64, and the refusal of what does not belong together."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_replay.checkpoint.blend import Blend, interpolate
from megatron_replay.errors import CheckpointError
from tests import pool, tiny
from tests.same_weights import require_equal, weights
from tools import convert_checkpoint

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2}
#: Half the distance of two neighbours, relative to the number; float32 rounds several times.
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8}


def models(tmp_path, save, tied, dtype):
    """A base in one file, and a tuned model of ``dtype`` in several."""
    base = save(tmp_path / "base", tied=tied, **SMALL)
    model = AutoModelForCausalLM.from_pretrained(
        save(tmp_path / "other", tied=tied, seed=1, **SMALL), dtype=dtype
    )
    model.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    (tmp_path / "tuned" / "tokenizer.json").write_text('{"of": "tuned"}')
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 2
    return base, tmp_path / "tuned"


def require_between(blended, base, tuned, weight, dtype):
    found, ends = weights(blended), (weights(base), weights(tuned))
    assert found.keys() == ends[0].keys() == ends[1].keys()
    for name, tensor in found.items():
        assert tensor.dtype is dtype
        b, t = (end[name].double() for end in ends)
        bound = ROUNDING[dtype] * 1.001 * torch.maximum(b.abs(), t.abs())
        assert ((tensor.double() - ((1 - weight) * b + weight * t)).abs() <= bound).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("save", [tiny.save_llama, tiny.save_qwen3])
def test_equals_float64(tmp_path, save, tied, dtype):
    base, tuned = models(tmp_path, save, tied, dtype)
    Blend(base, tuned).write(tmp_path / "out", 0.3, overwrite=False)
    require_between(tmp_path / "out", base, tuned, 0.3, dtype)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype is dtype
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"of": "tuned"}'
    Blend(base, tuned).write(tmp_path / "out", 1.0, overwrite=True)
    require_equal(tmp_path / "out", tuned)


def _convert(rank, world_size, argv):
    return convert_checkpoint.main(argv)


@pytest.mark.parametrize("tied", [True, False])
def test_the_converter_writes_the_same_bits_from_any_layout(tmp_path, tied):
    base, tuned = models(tmp_path, tiny.save_qwen3, tied, torch.bfloat16)
    Blend(base, tuned).write(tmp_path / "expected", 0.7, overwrite=False)
    run = ["--load", tuned, "--save", tmp_path / "run", "--save-model-type", "mcore"]
    assert pool.run(1, _convert, [*map(str, run), "--no-verify"]) == [0]
    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    for source, world_size, flags in (("tuned", 1, []), ("run", 4, layout)):
        final = tmp_path / f"from-{source}"
        argv = ["--load", tmp_path / source, "--save", final, "--blend", base, *flags]
        argv = [*map(str, argv), "--blend-weight", "0.7"]
        assert pool.run(world_size, _convert, argv) == [0] * world_size
        require_equal(final, tmp_path / "expected")


def change_config(directory, **changes):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_does_not_belong_together_is_refused(tmp_path):
    base, tuned = models(tmp_path, tiny.save_qwen3, True, torch.float32)
    for number, (changes, message) in enumerate(
        (
            ({"rms_norm_eps": 1e-5}, r"differ in layernorm_epsilon \(expected 1e-06; found 1e-05"),
            ({"tie_word_embeddings": False}, "differ in tie_embeddings"),
        )
    ):
        other = shutil.copytree(base, tmp_path / f"base-{number}")
        change_config(other, **changes)
        with pytest.raises(CheckpointError, match=message):
            Blend(other, tuned)
    deeper = tiny.save_qwen3(tmp_path / "deeper", tied=True, **SMALL | {"num_hidden_layers": 3})
    shutil.copy(base / "config.json", deeper)
    with pytest.raises(CheckpointError, match="not part of the model"):
        Blend(deeper, tuned)


def test_equal_weights_stay_as_they_are():
    same = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for weight in (0.1, 0.5, 0.9):
        assert torch.equal(interpolate(same, same, weight), same)
