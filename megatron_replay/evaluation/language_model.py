"""Loads a Hugging Face causal language model, and scores documents with it.

Shapes: L tokens of a document less one, N labels with loss, R of them at a time, H hidden size, V
vocabulary.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_replay.checkpoint.directories import LATEST
from megatron_replay.checkpoint.hf import HFReader
from megatron_replay.data.corpus import Document
from megatron_replay.errors import CheckpointError, ConfigError, DataError, few
from megatron_replay.evaluation.shared_prefixes import forward_sorted
from megatron_replay.files import read_json, require_regular
from megatron_replay.model.config import ModelConfig
from megatron_replay.progress import Progress

CONFIG, GENERATION = "config.json", "generation_config.json"
#: Labels whose logits are in memory at once.
_ROWS = 256
#: Of exp in float64.
_LARGEST_EXPONENT = math.log(sys.float_info.max)


def load_model(path: Path, *, device: str = "cpu", dtype: str = "float32") -> PreTrainedModel:
    """Load a Hugging Face directory for evaluation; nothing is fetched, no remote code is run.

    Raises:
        ConfigError: there is no such device here, or the model is of another architecture than
            those that this project trains.
        CheckpointError: it is missing, does not fit its config.json, or cannot be loaded.
    """
    require_device(device)
    require_model(path)
    try:
        # transformers loads in threads of its own, which may wait for ever in a forked process.
        with replaced(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"):
            model: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=getattr(torch, dtype),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
    except Exception as error:  # transformers promises no type here
        raise CheckpointError(f"cannot load the model: {error}", where=path) from error
    bad = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if bad:
        raise CheckpointError(
            f"the weights are not finite: {few(bad)}",
            where=path,
            fix="Nothing can be measured of them: give another checkpoint",
        )
    return cast(PreTrainedModel, model.to(device).eval())


def require_model(directory: Path) -> None:
    """Check a Hugging Face directory before transformers allocates the sizes in its config.json.

    The directory is untrusted: its files may be pipes, and its sizes anything. Reads headers only.

    Raises:
        ConfigError: the model is of another architecture than those that this project trains.
        CheckpointError: a file is missing, damaged or not regular, or the tensors are not those of
            config.json.
    """
    for file in sorted(directory.glob("*")):
        if file.exists() and not file.is_dir():
            require_regular(file, CheckpointError)
    if not (directory / CONFIG).is_file():
        export = f"Export the run: tools/convert_checkpoint.py --load {directory} --save DIR"
        raise CheckpointError(
            "no Hugging Face model here",
            where=directory,
            expected=CONFIG,
            fix=export if (directory / LATEST).exists() else None,
        )
    if (directory / GENERATION).exists():  # transformers takes its defaults for a damaged one
        read_json(directory / GENERATION, CheckpointError)
    config = ModelConfig.from_hf(directory)
    try:
        HFReader(directory).check(config)
    except RuntimeError as error:  # more than can be mapped
        raise CheckpointError(f"cannot read the weights: {error}", where=directory) from error
    _require_counts(read_json(directory / CONFIG, CheckpointError), config.vocab_size, directory)


def _require_counts(config: Mapping[str, Any], most: int, directory: Path) -> None:
    """Raise CheckpointError where a count (num_labels, …) would make transformers fill memory."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            _require_counts(value, most, directory)
        elif isinstance(value, int) and re.match("(num|n)_", name) and value > most:
            raise CheckpointError(
                f"unusable {name} in {CONFIG}",
                where=directory,
                expected=f"at most {most}",
                found=value,
            )


def require_device(device: str) -> None:
    """Raise ConfigError unless torch can use ``device``."""
    try:
        torch.zeros(1, device=device).item()
    except (AssertionError, RuntimeError) as error:  # torch without a backend asserts
        reason = str(error).partition("\n")[0]  # CUDA's has further lines about debugging
        raise ConfigError(
            f"torch cannot use this device: {reason}",
            where="--device",
            found=repr(device),
        ) from error


@contextmanager
def replaced(values: MutableMapping[str, Any], **new: Any) -> Iterator[None]:
    """Set these values within the context, and restore what they were, or that they were absent."""
    before = {name: values[name] for name in new if name in values}
    values.update(new)
    try:
        yield
    finally:
        for name in new:
            del values[name]
        values.update(before)


@torch.inference_mode()
def label_losses(
    model: PreTrainedModel,
    documents: Sequence[Document],
    *,
    batch_size: int,
    show: str = "",
    unit: str = "documents",
) -> list[torch.Tensor]:
    """Of each document ``[3, N]``, float64, for its labels with loss, in their order:

    −log p(label) in nats; −log of the largest p; whether the label is the most probable token.

    Tokens that documents begin with alike are computed once. Memory: the logits of 256 labels, and
    that of `forward_sorted`.
    """
    found: dict[int, torch.Tensor] = {}
    waiting: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    inputs = [document.tokens[:-1].tolist() for document in documents]
    ordered = sorted(range(len(documents)), key=inputs.__getitem__)
    passes = forward_sorted(model, [inputs[n] for n in ordered], batch_size=batch_size)
    with Progress(show, len(documents), unit, enabled=bool(show)) as bar:
        for number, passed in zip(ordered, passes, strict=True):
            document = documents[number]
            labels_N = torch.from_numpy(document.tokens[1:][document.loss_mask[1:]].astype("int64"))
            carries_L = torch.from_numpy(document.loss_mask[1:].copy()).to(model.device)
            waiting[number] = passed.hidden_LC[carries_L], labels_N.to(model.device)
            if sum(len(labels_N) for _, labels_N in waiting.values()) >= _ROWS:
                found |= _losses(model, waiting)
                waiting = {}
            bar.advance()
        found |= _losses(model, waiting)
    return [found[number] for number in range(len(documents))]


def _losses(
    model: PreTrainedModel, waiting: Mapping[int, tuple[torch.Tensor, torch.Tensor]]
) -> dict[int, torch.Tensor]:
    """`label_losses` of the hidden states ``[N, H]`` and labels ``[N]`` that wait."""
    if not waiting:
        return {}
    hidden_NH, labels_N = (torch.cat(of) for of in zip(*waiting.values(), strict=True))
    head, parts = model.get_output_embeddings(), []
    for hidden_RH, labels_R in zip(hidden_NH.split(_ROWS), labels_N.split(_ROWS), strict=True):
        logits_RV = head(hidden_RH).float()
        total_R, largest = logits_RV.logsumexp(-1), logits_RV.max(-1)
        label_R = logits_RV.gather(1, labels_R[:, None])[:, 0]
        is_largest_R = (largest.indices == labels_R).float()
        found_3R = torch.stack([total_R - label_R, total_R - largest.values, is_largest_R])
        parts.append(found_3R.cpu().double())
    sizes = [len(labels_N) for _, labels_N in waiting.values()]
    return dict(zip(waiting, torch.cat(parts, dim=1).split(sizes, dim=1), strict=True))


def score(
    model: PreTrainedModel, documents: Sequence[Document], *, batch_size: int = 16, show: str = ""
) -> dict[str, float | int]:
    """How well a model predicts the labels that carry loss; each label weighs the same.

    Returns:
        ``loss``: mean −log p(label), in nats; ``perplexity``: exp(loss), infinite where a diverged
        model's is beyond a float; ``accuracy``: share of labels that are the most probable token;
        ``tokens``: the number of labels.

    Raises:
        DataError: a document is longer than the model's context, holds ids it lacks, or no label
            carries loss.
    """
    for number, document in enumerate(documents):
        require_readable(model, f"document {number}", document.tokens, len(document) - 1)
    losses_3N = torch.cat(label_losses(model, documents, batch_size=batch_size, show=show), dim=1)
    if losses_3N.shape[1] == 0:
        raise DataError("no token carries loss", where=show or None)
    loss, _, accuracy = losses_3N.mean(1).tolist()
    return {
        "perplexity": math.exp(loss) if not loss > _LARGEST_EXPONENT else math.inf,
        "loss": loss,
        "accuracy": accuracy,
        "tokens": losses_3N.shape[1],
    }


def require_readable(
    model: PreTrainedModel, where: object, tokens: Sequence[int] | np.ndarray, length: int
) -> None:
    """Raise DataError if ``length`` input tokens exceed the context, or the model lacks an id.

    Args:
        where: what the tokens are of, for the message.
        tokens: at least one.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and length > context:
        raise DataError(
            "longer than the model's context",
            where=where,
            expected=f"at most {context} tokens",
            found=length,
        )
    if (largest := int(max(tokens))) >= model.config.vocab_size:
        raise DataError(
            "a token that the model lacks",
            where=where,
            expected=f"ids below {model.config.vocab_size}",
            found=largest,
            fix="Give the tokenizer that belongs to the model",
        )
