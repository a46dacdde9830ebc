"""Greedy answers of a Hugging Face causal language model.

Shapes: B prompts of a batch, L its longest prompt, H key-value heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import islice, pairwise, takewhile
from operator import eq
from typing import NamedTuple

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from megatron_replay.progress import Progress

#: Tokens of prompts that pass through the model at once.
ROW = 512
#: Of each layer, a prompt's keys and values ``[H, length, D]``.
States = list[tuple[torch.Tensor, torch.Tensor]]


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
    states = _states(model, [prompts[number] for number in ordered])
    with Progress(show, len(prompts), "answers", enabled=bool(show)) as bar:
        for start in range(0, len(prompts), batch_size):
            batch = ordered[start : start + batch_size]
            last = [prompts[number][-1] for number in batch]
            found = _answers(
                model, last, list(islice(states, len(batch))), stop_ids, max_new_tokens
            )
            answers |= zip(batch, found, strict=True)
            bar.advance(len(batch))
    return [answers[number] for number in range(len(prompts))]


def _answers(
    model: PreTrainedModel,
    last: Sequence[int],
    states: Sequence[States],
    stop_ids: Collection[int],
    max_new_tokens: int,
) -> list[Answer]:
    """Answers to a batch of prompts, given the last token of each and its keys and values.

    Where half of the answers have ended, the other half goes on alone.
    """
    cache = Cache(layers=[_Layer(layer, max_new_tokens) for layer in zip(*states, strict=True)])
    width = cache.get_seq_length()
    position_B = torch.tensor([prompt[0][0].shape[1] - 1 for prompt in states], device=model.device)
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


def _states(model: PreTrainedModel, prompts: Sequence[list[int]]) -> Iterator[States]:
    """Keys and values of each prompt; the tokens that it shares with the one before have its.

    The new tokens of several prompts pass through the model as one row, since the weights are read
    once a row: each attends to the tokens before it in its own prompt.
    """
    shared = [0, *(_common(one, two) for one, two in pairwise(prompts))]
    own = [len(prompt) - n for prompt, n in zip(prompts, shared, strict=True)]
    last: States = []
    for first, stop in _rows(own):
        kept, size = shared[first], sum(own[first:stop])  # of the prompt before; new in this row
        cache = DynamicCache([(k[None, :, :kept], v[None, :, :kept]) for k, v in last])
        sees = torch.zeros(size, kept + size, dtype=torch.bool)
        tokens, positions, paths = list[int](), list[int](), [list(range(kept))]
        for prompt, n in zip(prompts[first:stop], shared[first:stop], strict=True):
            start = len(tokens)
            tokens += prompt[n:]
            positions += range(n, len(prompt))
            path = [*paths[-1][:n], *range(kept + start, kept + len(tokens))]
            sees[start : len(tokens), path] = torch.ones(len(prompt) - n, len(path)).tril(n).bool()
            paths.append(path)
        if tokens:
            mask = torch.zeros(sees.shape, dtype=model.dtype).masked_fill(~sees, -torch.inf)
            model.base_model(
                torch.tensor([tokens], device=model.device),
                attention_mask=mask[None, None].to(model.device),
                position_ids=torch.tensor([positions], device=model.device),
                past_key_values=cache,
                use_cache=True,
            )
        for path in paths[1:]:
            last = [(k[0, :, path], v[0, :, path]) for k, v, _ in cache]
            yield last


def _common(one: Sequence[int], two: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return len(list(takewhile(bool, map(eq, one, two))))


def _rows(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Bounds of consecutive stretches of at most ``ROW`` tokens, or of one prompt."""
    first, size = 0, 0
    for number, more in enumerate(sizes):
        if number > first and size + more > ROW:
            yield first, number
            first, size = number, 0
        size += more
    yield first, len(sizes)


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
