"""What Stage 1 refuses of a loss once it knows the model."""

from __future__ import annotations

import pytest

from megatron_replay.config.stage1 import LossConfig
from megatron_replay.errors import ConfigError
from megatron_replay.model.compatibility import require_loss
from megatron_replay.model.config import ModelConfig
from tests import tiny


def test_more_ids_than_the_vocabulary_has(tmp_path):
    model = ModelConfig.from_hf(tiny.save_qwen3(tmp_path, tied=True, num_hidden_layers=1))
    V = model.vocab_size
    require_loss(LossConfig(store="s", tail="sampled", tail_samples=V), model)
    with pytest.raises(ConfigError, match=f"--tail-samples: .*at most {V}; found {V + 1}"):
        require_loss(LossConfig(store="s", tail="sampled", tail_samples=V + 1), model)
