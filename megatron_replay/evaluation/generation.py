"""Greedy answers of a Hugging Face causal language model.

Shapes: B prompts of a batch, L its longest prompt, H key-value heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import islice, takewhile
from operator import eq
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from megatron_replay.evaluation.language_model import replaced
from megatron_replay.progress import Progress


class Answer(NamedTuple):
    """Generated tokens before the first that ends an answer; ``finished``: such a token came."""

    tokens: list[int]
    finished: bool


@torch.inference_mode()
def greedy_answers(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    *,
    stop_ids: Collection[int],
    max_new_tokens: int,
    batch_size: int = 16,
    show: str = "",
) -> list[Answer]:
    """The most probable continuation of each prompt, token by token, in the order of ``prompts``.

    An answer ends before the first of ``stop_ids``, or after ``max_new_tokens``.

    The prompts are sorted by their tokens. Each one's forward pass continues from the tokens that
    it shares with the one before, so what many prompts begin with (a database's schema) is computed
    once. Neighbours are then answered as one batch, padded on the left; the other prompts of
    a batch change an answer only by rounding. generation_config.json is ignored. Memory: the keys
    and values of a batch, twice.
    """
    answers: dict[int, Answer] = {}
    ordered = sorted(range(len(prompts)), key=lambda number: prompts[number])
    caches = _caches(model, [prompts[number] for number in ordered])
    pad_id = min(stop_ids)
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stop_ids),
        pad_token_id=pad_id,
    )
    generate: Any = model.generate
    with (
        replaced(vars(model), generation_config=greedy),
        Progress(show, len(prompts), "answers", enabled=bool(show)) as bar,
    ):
        for start in range(0, len(prompts), batch_size):
            batch = ordered[start : start + batch_size]
            rows = [torch.tensor(prompts[number]) for number in batch]
            tokens_BL, mask_BL = (
                pad_sequence(of, batch_first=True, padding_value=value, padding_side="left")
                for of, value in ((rows, pad_id), ([torch.ones_like(row) for row in rows], 0))
            )
            found = generate(
                tokens_BL.to(model.device),
                attention_mask=mask_BL.to(model.device),
                past_key_values=_batched(list(islice(caches, len(batch)))),
            )
            for number, tokens in zip(batch, found[:, tokens_BL.shape[1] :].tolist(), strict=True):
                end = next((i for i, token in enumerate(tokens) if token in stop_ids), None)
                answers[number] = Answer(tokens[:end], end is not None)
            bar.advance(len(batch))
    return [answers[number] for number in range(len(prompts))]


def _caches(model: PreTrainedModel, prompts: Sequence[list[int]]) -> Iterator[DynamicCache]:
    """Keys and values of each prompt, ``[1, H, length, D]``, continued from the prompt before."""
    cache, before = DynamicCache(), list[int]()
    for prompt in prompts:
        shared = len(list(takewhile(bool, map(eq, before, prompt))))
        cache = DynamicCache([(k[:, :, :shared], v[:, :, :shared]) for k, v, _ in cache])
        if rest := prompt[shared:]:
            tokens = torch.tensor([rest], device=model.device)
            model.base_model(tokens, past_key_values=cache, use_cache=True)
        before = prompt
        yield cache


def _batched(caches: Sequence[DynamicCache]) -> DynamicCache:
    """One cache ``[B, H, L - 1, D]``: generation reads the last token, and needs its logits."""

    def padded(states: Sequence[torch.Tensor]) -> torch.Tensor:
        rows = [state[0, :, :-1].transpose(0, 1) for state in states]
        return pad_sequence(rows, batch_first=True, padding_side="left").transpose(1, 2)

    layers = [zip(*layer, strict=True) for layer in zip(*caches, strict=True)]
    return DynamicCache([(padded(keys), padded(values)) for keys, values, _ in layers])
