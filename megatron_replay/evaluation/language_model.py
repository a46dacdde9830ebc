"""Scores and greedy answers of a Hugging Face causal language model.

Shapes: B documents of a batch, L its longest document less one, V vocabulary.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_replay.data.corpus import Document
from megatron_replay.errors import CheckpointError, ConfigError, DataError, few
from megatron_replay.evaluation.model_files import CONFIG, require_model
from megatron_replay.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Score:
    """How well a model predicts the tokens that carry loss.

    Attributes:
        loss_sum: Σ −log p(token), in nats.
        tokens: how many were predicted.
        correct: how many were the most probable token.
    """

    loss_sum: float
    tokens: int
    correct: int

    @property
    def loss(self) -> float:
        """Mean loss per token."""
        return self.loss_sum / self.tokens

    @property
    def perplexity(self) -> float:
        """``exp(loss)``: every token weighs the same, whichever document it is in.

        Infinite where a diverged model's is beyond a float.
        """
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def accuracy(self) -> float:
        """Share of tokens predicted exactly."""
        return self.correct / self.tokens


@dataclass(frozen=True)
class Answer:
    """Generated tokens without the end-of-sequence token; ``finished``: that token came."""

    tokens: list[int]
    finished: bool


def load_model(path: Path, *, device: str = "cpu", dtype: str = "float32") -> PreTrainedModel:
    """Load a Hugging Face directory for evaluation; nothing is fetched, no remote code is run.

    Raises:
        ConfigError: there is no such device here.
        CheckpointError: it is missing, does not fit its config.json, or cannot be loaded.
    """
    require_device(device)
    if not (path / CONFIG).is_file():
        raise CheckpointError("no Hugging Face model here", where=path, expected=CONFIG)
    require_model(path)
    try:
        with _no_loader_threads():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=getattr(torch, dtype),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:  # transformers promises no type here
        raise CheckpointError(f"cannot load the model: {error}", where=path) from error
    model, report = loaded
    # transformers initialises what a file lacks at random and goes on: such numbers mean nothing.
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            raise CheckpointError(
                f"{kind.replace('_', ' ')} in the weights", where=path, found=sorted(report[kind])
            )
    bad = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if bad:
        raise CheckpointError(
            f"the weights are not finite: {few(bad)}",
            where=path,
            fix="Nothing can be measured of them: give another checkpoint",
        )
    model.to(device).eval()
    return cast(PreTrainedModel, model)


def require_device(device: str) -> None:
    """Raise ConfigError unless torch can use ``device``."""
    try:
        torch.zeros(1, device=device).item()
    except (AssertionError, RuntimeError) as error:  # torch without a backend asserts
        reason = str(error).partition("\n")[0]  # CUDA's goes on about debugging
        raise ConfigError(
            f"torch cannot use this device: {reason}",
            where="--device",
            found=repr(device),
        ) from error


@contextmanager
def _no_loader_threads() -> Iterator[None]:
    """transformers loads in threads of its own; in a forked process they may wait for ever."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _batches(documents: Sequence[Document], batch_size: int) -> Iterator[list[Document]]:
    """Documents of similar length together: padding costs time."""
    ordered = sorted(documents, key=len, reverse=True)
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]


def _pad(documents: Sequence[Document]) -> tuple[torch.Tensor, torch.Tensor]:
    """``tokens_BL1`` and ``loss_mask_BL1``, padded on the right.

    With causal attention padding on the right changes nothing before it, so no mask is needed.
    """
    longest = max(map(len, documents))
    tokens = torch.zeros(len(documents), longest, dtype=torch.long)
    loss_mask = torch.zeros(len(documents), longest, dtype=torch.bool)
    for row, document in enumerate(documents):
        tokens[row, : len(document)] = torch.as_tensor(document.tokens.astype("int64"))
        loss_mask[row, : len(document)] = torch.as_tensor(document.loss_mask.copy())
    return tokens, loss_mask


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    documents: Sequence[Document],
    *,
    batch_size: int = 16,
    description: str = "score",
    progress: bool = False,
) -> Score:
    """Loss and accuracy over all labels that carry loss.

    Memory: one batch's logits, ``B·L·V`` numbers.

    Raises:
        DataError: a document is longer than the model's context, holds ids it lacks, or no label
            carries loss.
    """
    require_fitting(model, documents)
    loss_sum, tokens, correct = 0.0, 0, 0
    with Progress(description, len(documents), "documents", enabled=progress) as bar:
        for batch in _batches(documents, batch_size):
            tokens_BL1, mask_BL1 = (t.to(model.device) for t in _pad(batch))
            logits_BLV = model(tokens_BL1[:, :-1], use_cache=False).logits
            carries = mask_BL1[:, 1:]
            logits_NV, labels_N = logits_BLV[carries].float(), tokens_BL1[:, 1:][carries]
            losses_N = nn.functional.cross_entropy(logits_NV, labels_N, reduction="none")
            loss_sum += losses_N.double().sum().item()
            correct += int((logits_NV.argmax(-1) == labels_N).sum())
            tokens += len(labels_N)
            bar.advance(len(batch))
    if tokens == 0:
        raise DataError("no token carries loss", where=description)
    return Score(loss_sum=loss_sum, tokens=tokens, correct=correct)


def require_fitting(model: PreTrainedModel, documents: Sequence[Document]) -> None:
    """Raise DataError if a document is longer than the context or holds ids outside the model."""
    context = getattr(model.config, "max_position_embeddings", None)
    for number, document in enumerate(documents):
        if context is not None and len(document) - 1 > context:
            raise DataError(
                f"document {number} is longer than the model's context",
                expected=f"at most {context + 1} tokens",
                found=len(document),
            )
        if document.tokens.max() >= model.config.vocab_size:
            raise DataError(
                f"document {number} holds a token that the model lacks",
                expected=f"ids below {model.config.vocab_size}",
                found=int(document.tokens.max()),
                fix="Give the tokenizer that belongs to the model",
            )


@torch.inference_mode()
def greedy_answers(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    eos_id: int,
    max_new_tokens: int,
    batch_size: int = 64,
    description: str = "generate",
    progress: bool = False,
) -> list[Answer]:
    """The most probable continuation of each prompt, token by token, in the order of ``prompts``.

    Prompts of one length form a batch: no padding, so an answer does not depend on its neighbours
    beyond rounding. Equal logits: the smallest id wins. No prompt is empty.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        by_length[len(prompt)].append(number)
    answers: dict[int, Answer] = {}
    with Progress(description, len(prompts), "answers", enabled=progress) as bar:
        for numbers in by_length.values():
            for start in range(0, len(numbers), batch_size):
                batch = numbers[start : start + batch_size]
                prompts_BL = torch.tensor([list(prompts[n]) for n in batch], device=model.device)
                rows = _continue(model, prompts_BL, eos_id, max_new_tokens)
                answers |= zip(batch, (_cut(row, eos_id) for row in rows), strict=True)
                bar.advance(len(batch))
    return [answers[number] for number in range(len(prompts))]


def _continue(
    model: PreTrainedModel, prompts_BL: torch.Tensor, eos_id: int, max_new_tokens: int
) -> list[list[int]]:
    done_B = torch.zeros(len(prompts_BL), dtype=torch.bool, device=prompts_BL.device)
    cache, inputs, generated = None, prompts_BL, []
    for _ in range(max_new_tokens):
        output = model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, next_B = output.past_key_values, output.logits[:, -1].argmax(-1)
        generated.append(next_B)
        done_B |= next_B == eos_id
        if bool(done_B.all()):
            break
        inputs = next_B[:, None]
    return torch.stack(generated, dim=1).tolist()


def _cut(row: list[int], eos_id: int) -> Answer:
    if eos_id in row:
        return Answer(row[: row.index(eos_id)], True)
    return Answer(row, False)
