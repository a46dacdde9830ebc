"""The frequencies of rotary position embeddings (Su et al., RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """How Llama 3.1 and later slow their long waves down; named as in config.json.

    Attributes:
        factor: a frequency of a long wave is divided by it.
        low_freq_factor, high_freq_factor: a wave is long if the original context has fewer than the
            first number of its periods, and short if it has more than the second.
        original_max_position_embeddings: that context, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


def inverse_frequencies(base: float, channels: int, scaling: Llama3Scaling | None = None) -> Tensor:
    """f_i = base^(-2i / channels) radians per token, for channel pair i: fp32 [channels / 2].

    With ``scaling``, and n = context f / 2 pi periods in the original context:

        s = clip((n - low) / (high - low), 0, 1)        f <- (1 - s) f / factor + s f

    (https://github.com/meta-llama/llama-models, ``apply_scaling``). In fp32 and in transformers'
    order of operations: a last bit of a frequency is a visible angle at position 100,000.
    """
    frequencies = 1.0 / base ** (torch.arange(0, channels, 2, dtype=torch.float32) / channels)
    if scaling is None:
        return frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    periods = scaling.original_max_position_embeddings / (2 * math.pi / frequencies)
    short = ((periods - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - short) * frequencies / scaling.factor + short * frequencies
