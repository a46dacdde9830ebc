"""One forward pass over many sequences: tokens that they begin with alike are computed once.

Shapes: L tokens of a sequence, H key-value heads, D channels of a head, C hidden size; T new tokens
of a row, K keys that they may attend to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, takewhile
from operator import eq
from typing import NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel

#: New tokens that pass through the model at once: for each sequence of a batch, and in all. A CPU
#: multiplies no faster with more, whose attention is mostly masked.
_TOKENS, _MOST_TOKENS = 32, 512


class Passed(NamedTuple):
    """What a model computed of one sequence: each layer's keys and values ``[H, L, D]``, and the
    last hidden states ``[L, C]``.
    """

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    hidden_LC: torch.Tensor


def forward_sorted(
    model: PreTrainedModel, sequences: Sequence[list[int]], *, batch_size: int
) -> Iterator[Passed]:
    """Pass ``sequences`` through the model, in their order, which must be that of their tokens.

    So each begins with tokens of the one before, which are not computed again. The new tokens of
    several sequences are one row, since the weights are read once a row: each attends to the tokens
    before it in its own sequence. Memory: keys, values and hidden states of a row and of the
    sequence before it; a row has ``32 * batch_size`` tokens, at most 512, or one sequence.
    """
    if not sequences:
        return
    shared = [0, *(_common(one, two) for one, two in pairwise(sequences))]
    own = [len(sequence) - n for sequence, n in zip(sequences, shared, strict=True)]
    last = Passed([], torch.zeros(0, model.config.hidden_size, dtype=model.dtype))
    for first, stop in _rows(own, min(_TOKENS * batch_size, _MOST_TOKENS)):
        kept, size = shared[first], sum(own[first:stop])  # of the sequence before; new
        cache = DynamicCache([(k[None, :, :kept], v[None, :, :kept]) for k, v in last.layers])
        hidden_KC = last.hidden_LC[:kept]
        sees_TK = torch.zeros(size, kept + size, dtype=torch.bool)
        tokens, positions, paths = list[int](), list[int](), [list(range(kept))]
        for sequence, n in zip(sequences[first:stop], shared[first:stop], strict=True):
            start = len(tokens)
            tokens += sequence[n:]
            positions += range(n, len(sequence))
            path = [*paths[-1][:n], *range(kept + start, kept + len(tokens))]
            before = torch.ones(len(sequence) - n, len(path)).tril(n)
            sees_TK[start : len(tokens), path] = before.bool()
            paths.append(path)
        if tokens:
            mask_11TK = None  # of one sequence: causal
            if stop - first > 1:
                mask_11TK = torch.zeros(1, 1, *sees_TK.shape, dtype=model.dtype)
                mask_11TK = mask_11TK.masked_fill(~sees_TK, -torch.inf).to(model.device)
            new = model.base_model(
                torch.tensor([tokens], device=model.device),
                attention_mask=mask_11TK,
                position_ids=torch.tensor([positions], device=model.device),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[0]
            hidden_KC = torch.cat([hidden_KC.to(model.device), new])
        for path in paths[1:]:
            layers = [(k[0, :, path], v[0, :, path]) for k, v, _ in cache]
            last = Passed(layers, hidden_KC[path])
            yield last


def _common(one: Sequence[int], two: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return len(list(takewhile(bool, map(eq, one, two))))


def _rows(sizes: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Bounds of consecutive stretches of at most ``most`` tokens, or of one sequence."""
    first, size = 0, 0
    for number, more in enumerate(sizes):
        if number > first and size + more > most:
            yield first, number
            first, size = number, 0
        size += more
    yield first, len(sizes)
