"""Every measurement of every model in one document, with the hashes of what it was made from."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

from megatron_replay.checkpoint.hf import HFReader
from megatron_replay.checkpoint.weight_distance import relative_l2
from megatron_replay.data.tokenizer import load_tokenizer, tokenizer_digests
from megatron_replay.errors import DataError, few
from megatron_replay.evaluation.entries import (
    require_entry,
    require_fields,
    require_object,
    restored,
    strict,
)
from megatron_replay.evaluation.inputs import Inputs, Settings, flag_of
from megatron_replay.evaluation.language_model import (
    CONFIG,
    GENERATION,
    require_device,
    require_model,
)
from megatron_replay.evaluation.lm_eval_tasks import require_lm_eval
from megatron_replay.evaluation.measurements import Result, measure, read_material
from megatron_replay.evaluation.scores import general_scores, retention
from megatron_replay.files import (
    differing,
    read_json,
    require_apart,
    sha256_of_files,
    write_json,
)

FORMAT = 2
BASE = "base"
#: Measurements that have a perplexity.
_TEXTS = {"data", "general"}


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
    progress: bool = True,
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
    if progress:
        print(f"models run on {settings.device}, in {settings.dtype}", file=sys.stderr)
    requested = {BASE: base, **models}
    files = inputs.files()
    require_apart(output, _read(requested, files), flag="--output")
    known = {result["key"]: result for result in _previous(output)}
    for path in requested.values():
        require_model(path)
    _require_one_tokenizer(base, models)
    hashes = {name: sha256_of_files(of) for name, of in files.items()}
    sha256 = {name: model_sha256(path) for name, path in requested.items()}
    tokens = load_tokenizer(base)
    document: Result = {
        "format": FORMAT,
        "command": command,
        "inputs": {
            name: {"path": str(path), "sha256": hashes[name]}
            for name, path in inputs.paths().items()
        },
        "settings": asdict(settings),
        "lm_eval_version": require_lm_eval() if inputs.lm_eval() else None,
        "tokenizer": tokens.fingerprint,
    }
    material = read_material(inputs, base, tokens, settings, progress=progress)
    decisive = [FORMAT, sha256[BASE], tokens.fingerprint, hashes, asdict(settings)]
    if material.tasks:
        tasks, metrics = material.tasks
        decisive.append([document["lm_eval_version"], tasks.general, tasks.domain, metrics])
    keys = {
        name: hashlib.sha256(json.dumps([sha, *decisive], sort_keys=True).encode()).hexdigest()
        for name, sha in sha256.items()
    }
    if keys[BASE] in known:  # before the first measurement, which may be cut off
        _write(output, document, requested, keys, known)
    for name, path in requested.items():
        if keys[name] in known:
            continue
        start = time.monotonic()
        measured = measure(name, path, tokens, material, settings, progress=progress)
        measured["relative_l2_percent"] = 100 * relative_l2(path, base)
        measured["seconds"] = round(time.monotonic() - start, 2)
        known[keys[name]] = {"sha256": sha256[name], "key": keys[name], **measured}
        _write(output, document, requested, keys, known)
    return document


def _require_one_tokenizer(base: Path, models: Mapping[str, Path]) -> None:
    """Raise DataError where a model has another tokenizer than the base, whose is used for all."""
    ours = tokenizer_digests(base)
    for name, path in models.items():
        theirs = tokenizer_digests(path)
        names = differing(ours, theirs)
        if not (ours and theirs and names):
            continue
        if load_tokenizer(base).rules() != load_tokenizer(path).rules():
            raise DataError(
                f"--model {name} has another tokenizer than --base, by {few(names)}",
                where=path,
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
        yield from ((flag_of(name.split("/")[0]), file) for file in files)


def _write(
    output: Path,
    document: Result,
    requested: Mapping[str, Path],
    keys: Mapping[str, str],
    known: Mapping[str, Result],
) -> None:
    """Write the requested results, compared with the base, and keep all others."""
    document["models"] = [
        deepcopy(known[keys[name]]) | {"name": name, "path": str(path)}
        for name, path in requested.items()
        if keys[name] in known
    ]
    for result in document["models"]:
        _add_differences(result, document["models"][0])
    document["kept"] = [known[key] for key in known if key not in keys.values()]
    write_json(output, strict(document))


def _add_differences(result: Result, base: Result) -> None:
    """What compares a model with the base.

    ``ΔPPL = exp(CE of the model) − exp(CE of the base)``, on the same tokens; retention of every
    general benchmark, and its mean.
    """
    scores, of_base = general_scores(result), general_scores(base)
    texts = _TEXTS & result.keys()
    if (texts, scores.keys()) != (_TEXTS & base.keys(), of_base.keys()):
        raise DataError(
            "damaged: an earlier result lacks what the base's has, or the base's what it has",
            where=result["name"],
            fix="Measure again, into another file",
        )
    for name in sorted(texts):
        change = result[name]["perplexity"] - base[name]["perplexity"]
        result[name]["delta_perplexity"] = change
    kept = retention(scores, of_base)
    if kept:
        result["retention"] = kept
        result["retention_percent"] = sum(kept.values()) / len(kept)


def read_evaluation(path: Path) -> Result:
    """Read what `evaluate` wrote.

    Raises:
        DataError: it is missing, damaged, or of another format.
    """
    document = read_json(path, DataError, fix="Give the JSON that tools/evaluate.py wrote")
    if "format" not in document:
        raise DataError("not an evaluation", where=path, expected=f'"format": {FORMAT}')
    if document["format"] != FORMAT:
        raise DataError(
            "another format of evaluation",
            where=path,
            expected=FORMAT,
            found=document["format"],
            fix="Measure again with tools/evaluate.py, into another file",
        )
    require_fields(document, path, required=["models", "inputs", "settings", "command"])
    require_object(document["settings"], f"{path}: settings")
    for name, given in require_object(document["inputs"], f"{path}: inputs").items():
        require_fields(given, f"{path}: inputs: {name}", required=["path", "sha256"])
    shown = ("name", "path", "sha256", "key", "relative_l2_percent")
    for part, required in (("models", shown), ("kept", ("key",))):
        results = document.get(part, [])
        if not isinstance(results, list) or (part == "models" and not results):
            raise DataError("damaged: no list of results", where=f"{path}: {part}")
        for number, result in enumerate(results):
            where = f"{path}: {part}[{number}]"
            require_entry(result, where, required=required)
            for text in _TEXTS & result.keys():
                require_fields(result[text], f"{where}: {text}", required=["perplexity"])
            results[number] = restored(result)
    return document


def _previous(output: Path) -> list[Result]:
    """Every result of ``output``, shown or kept; none where there is no such file."""
    if not output.exists():
        return []
    document = read_evaluation(output)
    return [*document["models"], *document.get("kept", [])]
