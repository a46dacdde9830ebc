"""Greedy answers of a Hugging Face causal language model.

Shapes: B prompts of a batch, L its longest prompt, H key-value heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from megatron_replay.evaluation.shared_prefixes import Passed, forward_sorted
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

    The prompts are sorted by their tokens, so each shares its first tokens with the one before, and
    what many begin with (a database's schema) is computed once. Neighbours are then answered as one
    batch, padded on the left; the other prompts of a batch change an answer only by rounding.
    generation_config.json is ignored. Memory: the keys and values of a batch, twice.
    """
    answers: dict[int, Answer] = {}
    ordered = sorted(range(len(prompts)), key=lambda number: prompts[number])
    ours = [prompts[number] for number in ordered]
    passed = forward_sorted(model, ours, batch_size=batch_size)
    with Progress(show, len(prompts), "answers", enabled=bool(show)) as bar:
        for start in range(0, len(prompts), batch_size):
            batch = ordered[start : start + batch_size]
            last = [prompts[number][-1] for number in batch]
            found = _answers(
                model, last, list(islice(passed, len(batch))), stop_ids, max_new_tokens
            )
            answers |= zip(batch, found, strict=True)
            bar.advance(len(batch))
    return [answers[number] for number in range(len(prompts))]


def _answers(
    model: PreTrainedModel,
    last: Sequence[int],
    passed: Sequence[Passed],
    stop_ids: Collection[int],
    max_new_tokens: int,
) -> list[Answer]:
    """Answers to a batch of prompts, given the last token of each and what was computed of it.

    Where half of the answers have ended, the other half goes on alone.
    """
    layers = zip(*(prompt.layers for prompt in passed), strict=True)
    cache = Cache(layers=[_Layer(layer, max_new_tokens) for layer in layers])
    width = cache.get_seq_length()
    position_B = torch.tensor([len(prompt.hidden_LC) - 1 for prompt in passed], device=model.device)
    mask_BL = torch.arange(width + max_new_tokens, device=model.device) >= (
        width - position_B[:, None]
    )
    token_B = torch.tensor(last, device=model.device)
    answers, rows = [Answer([], False) for _ in last], list(range(len(last)))
    for step in range(max_new_tokens):
        logits_B1V = model(
            token_B[:, None],
            attention_mask=mask_BL[:, : width + step + 1],
            position_ids=(position_B + step)[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits
        token_B = logits_B1V[:, 0].argmax(-1)
        for row, token in zip(rows, token_B.tolist(), strict=True):
            if token in stop_ids:
                answers[row] = answers[row]._replace(finished=True)
            elif not answers[row].finished:
                answers[row].tokens.append(token)
        going = [place for place, row in enumerate(rows) if not answers[row].finished]
        if not going:
            break
        if 2 * len(going) <= len(rows):
            rows = [rows[place] for place in going]
            cache.batch_select_indices(torch.tensor(going, device=model.device))
            token_B, position_B, mask_BL = token_B[going], position_B[going], mask_BL[going]
    return answers


class _Layer(DynamicLayer):
    """A layer's keys and values of a batch, padded on the left, with room for ``room`` more.

    They are written in place: a concatenation would copy all for every token of the answers.
    """

    def __init__(self, states: Sequence[tuple[torch.Tensor, torch.Tensor]], room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # The last token of a prompt is read again, because its logits are needed.
        length = max(keys.shape[1] for keys, _ in states) - 1
        self._whole = [_padded(of, length, room) for of in zip(*states, strict=True)]
        self.dtype, self.device, self.is_initialized = states[0][0].dtype, states[0][0].device, True
        self._show(length)

    def _show(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (of[:, :, :length] for of in self._whole)
        self.keys, self.values = keys, values
        return keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append; returns all keys and values, ``[B, H, length, D]``."""
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        for whole, new in zip(self._whole, (key_states, value_states), strict=True):
            whole[:, :, start:stop] = new
        return self._show(stop)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these prompts of the batch."""
        length = self.get_seq_length()
        self._whole = [of[indices] for of in self._whole]
        self._show(length)


def _padded(states: Sequence[torch.Tensor], length: int, room: int) -> torch.Tensor:
    """``[B, H, length + room, D]`` of states ``[H, n + 1, D]``, without the last of each."""
    heads, _, channels = states[0].shape
    whole = states[0].new_zeros(len(states), heads, length + room, channels)
    for row, state in zip(whole, states, strict=True):
        row[:, length + 1 - state.shape[1] : length] = state[:, :-1]
    return whole
