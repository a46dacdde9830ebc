"""Every measurement of every model in one document, with the hashes of what it was made from."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import torch

from megatron_replay.checkpoint.hf import HFReader
from megatron_replay.checkpoint.weight_distance import relative_l2
from megatron_replay.config import flag_name
from megatron_replay.data.tokenizer import load_tokenizer, tokenizer_digests
from megatron_replay.errors import DataError, few
from megatron_replay.evaluation.inputs import Inputs, Settings
from megatron_replay.evaluation.language_model import (
    CONFIG,
    GENERATION,
    require_device,
    require_model,
)
from megatron_replay.evaluation.lm_eval_tasks import read_metrics, require_lm_eval
from megatron_replay.evaluation.measurements import measure, read_measurements
from megatron_replay.evaluation.results import (
    BASE,
    FORMAT,
    Result,
    add_differences,
    read_evaluation,
    strict,
)
from megatron_replay.evaluation.sql.gold_answers import GoldAnswers
from megatron_replay.files import differing, require_apart, sha256_of_files, write_json


def model_sha256(directory: Path) -> str:
    """SHA-256 of a model's weights and configuration files."""
    files = sorted(HFReader(directory).files(), key=lambda file: file.name == CONFIG)
    if (generation := directory / GENERATION).is_file():  # lm-eval's answers need it
        files.append(generation)
    return sha256_of_files(files)


def evaluate(
    base: Path,
    models: Mapping[str, Path],
    inputs: Inputs,
    settings: Settings,
    *,
    output: Path,
    command: str,
) -> Result:
    """Measure the base and every model, and write ``output`` after each of them.

    A result in ``output`` that was made from the same weights, inputs, settings and base is reused.
    The other results in ``output`` stay there as ``kept``, also when a run is interrupted. All
    models are read with the base's tokenizer, so that perplexities are over the same tokens.

    Raises:
        ConfigError, DataError, CheckpointError, StoreError: something given cannot be used.
    """
    settings = settings.resolved()
    require_device(settings.device)
    requested = {BASE: base, **models}
    files = inputs.files()
    require_apart(output, _read(requested, files), flag="--output")
    earlier = read_evaluation(output) if output.exists() else {"models": []}
    known = {one["key"]: one for one in [*earlier["models"], *earlier.get("kept", [])]}
    for path in requested.values():
        require_model(path)
    for name, path in models.items():
        require_one_tokenizer(base, path, flag=f"--model {name}")
    hashes = {name: sha256_of_files(of) for name, of in files.items()}
    sha256 = {name: model_sha256(path) for name, path in requested.items()}
    tokens = load_tokenizer(base)
    style = settings.for_tokenizer(tokens)
    threads = f" with {torch.get_num_threads()} threads" if settings.device == "cpu" else ""
    print(
        f"models run on {settings.device}{threads}, in {settings.dtype}; prompts: {style}",
        file=sys.stderr,
    )
    known_settings = asdict(replace(settings, **asdict(style)))
    version, metrics = (require_lm_eval(), read_metrics(inputs)) if inputs.tasks else (None, {})
    document: Result = {
        "format": FORMAT,
        "command": command,
        "inputs": {
            name: {"path": str(path), "sha256": hashes[name]}
            for name, path in inputs.paths().items()
        },
        "settings": known_settings,
        "lm_eval_version": version,
        "tokenizer": tokens.fingerprint,
    }
    gold = GoldAnswers(output.with_suffix(".gold.json"))
    measurements = read_measurements(inputs, base, tokens, settings, metrics, gold)
    decisive = [FORMAT, sha256[BASE], tokens.fingerprint, hashes, known_settings]
    if metrics:  # which follow a flag, and not the tokenizer
        by_flag = [settings.chat_template, settings.add_bos]
        tasks = [inputs.lm_eval_tasks, inputs.lm_eval_domain_tasks]
        decisive.append([version, *tasks, metrics, by_flag])
    keys = {
        name: hashlib.sha256(json.dumps([sha, *decisive], sort_keys=True).encode()).hexdigest()
        for name, sha in sha256.items()
    }
    for name, path in requested.items():
        if keys[name] not in known:
            start = time.monotonic()
            measured = measure(name, path, measurements, settings)
            measured["relative_l2_percent"] = 100 * relative_l2(path, base)
            measured["seconds"] = round(time.monotonic() - start, 2)
            known[keys[name]] = {"sha256": sha256[name], "key": keys[name], **measured}
        _write(output, document, requested, keys, known)
    return document


def _write(
    output: Path,
    document: Result,
    requested: Mapping[str, Path],
    keys: Mapping[str, str],
    known: Mapping[str, Result],
) -> None:
    """Write the requested results that are known, compared with the base, and keep all others."""
    document["models"] = [
        deepcopy(known[keys[name]]) | {"name": name, "path": str(path)}
        for name, path in requested.items()
        if keys[name] in known
    ]
    for result in document["models"]:
        add_differences(result, document["models"][0])
    document["kept"] = [known[key] for key in known if key not in keys.values()]
    write_json(output, strict(document))


def require_one_tokenizer(base: Path, model: Path, *, flag: str) -> None:
    """Raise DataError if ``model``, given as ``flag``, has another tokenizer than the base."""
    ours, theirs = tokenizer_digests(base), tokenizer_digests(model)
    names = differing(ours, theirs)
    if not (ours and theirs and names):
        return
    if load_tokenizer(base).rules() != load_tokenizer(model).rules():
        raise DataError(
            f"{flag} has another tokenizer than --base, by {few(names)}",
            where=model,
            expected=f"the tokenizer of {base}: all models are read with one",
            fix="Give it the --base that it was made from; if the base's tokenizer is meant, "
            "remove these files from the model",
        )


def _read(
    models: Mapping[str, Path], inputs: Mapping[str, list[Path]]
) -> Iterator[tuple[str, Path]]:
    """(flag, file) of everything that is read; of a model's directory, all of it."""
    for name, path in models.items():
        flag = "--base" if name == BASE else "--model"
        yield from ((flag, file) for file in path.glob("*"))
    for name, files in inputs.items():
        yield from ((flag_name(name.split("/")[0]), file) for file in files)
