"""Every measurement of every model in one document, with the hashes of what it was made from."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from megatron_replay.data.corpus import Corpus
from megatron_replay.data.document import Document
from megatron_replay.data.rows import detect_format, parse_row, read_lines, tokenize_row
from megatron_replay.data.tokenizer import Tokenizer, load_tokenizer
from megatron_replay.errors import DataError
from megatron_replay.evaluation.candidate_mass import candidate_mass
from megatron_replay.evaluation.inputs import Inputs, Settings
from megatron_replay.evaluation.language_model import Score, greedy_answers, load_model, score
from megatron_replay.evaluation.sql_execution import Limits, execution_match
from megatron_replay.evaluation.weight_distance import relative_l2, weight_files
from megatron_replay.files import sha256_of_files, write_json
from megatron_replay.store import CandidateReader

FORMAT = 1
BASE = "base"
Result = dict[str, Any]


def model_sha256(directory: Path) -> str:
    """SHA-256 of a model's weights and configuration."""
    return sha256_of_files([*weight_files(directory), directory / "config.json"])


def read_documents(path: Path, tokenizer: Tokenizer, *, row_format: str | None) -> list[Document]:
    """Tokenize all rows of a JSONL file; ``row_format`` None: the first row decides.

    Raises:
        DataError: the file is empty, or a row does not fit.
    """
    documents = []
    for where, line in read_lines(path):
        row = parse_row(where, line)
        row_format = row_format or detect_format(row)
        documents.append(tokenize_row(row, row_format, tokenizer))
    if not documents:
        raise DataError("no rows", where=path)
    return documents


def evaluate(
    base: Path,
    models: Mapping[str, Path],
    inputs: Inputs,
    settings: Settings,
    *,
    output: Path,
    command: str,
    tokenizer: Path | None = None,
    progress: bool = True,
) -> Result:
    """Measure the base and every model, and write ``output`` after each of them.

    A model whose weights, inputs, settings and base are those of a result in ``output`` is not
    measured again. All models are read with one tokenizer, the base's where no other is given
    (a sentencepiece model, say): perplexities are comparable only over the same tokens.

    Raises:
        ConfigError, DataError, CheckpointError, StoreError: something given cannot be used.
    """
    hashes = inputs.sha256()
    base_sha256 = model_sha256(base)
    tokens = load_tokenizer(tokenizer or base)
    done = {result["key"]: result for result in _previous(output)}
    document: Result = {
        "format": FORMAT,
        "command": command,
        "inputs": {
            name: {"path": str(getattr(inputs, name)), "sha256": digest}
            for name, digest in hashes.items()
        },
        "settings": asdict(settings),
        "tokenizer": tokens.fingerprint,
        "models": [],
    }
    for name, path in {BASE: base, **models}.items():
        sha256 = model_sha256(path)
        key = _key(sha256, base_sha256, tokens.fingerprint, hashes, settings)
        if key in done:
            result = done[key] | {"name": name, "path": str(path)}
        else:
            start = time.monotonic()
            measured = measure(path, tokens, inputs, settings, progress=progress)
            measured["relative_l2_percent"] = 100 * relative_l2(path, base)
            result = {"name": name, "path": str(path), "sha256": sha256, "key": key, **measured}
            result["seconds"] = round(time.monotonic() - start, 2)
        document["models"].append(result)
        _add_differences(result, document["models"][0])
        write_json(output, document)
    return document


def measure(
    path: Path, tokenizer: Tokenizer, inputs: Inputs, settings: Settings, *, progress: bool
) -> Result:
    """All measurements of one model that need no other."""
    model = load_model(path, device=settings.device, dtype=settings.dtype)
    result: Result = {}
    if inputs.sql_questions and inputs.database:
        result["execution"] = _execution(
            model, tokenizer, inputs.sql_questions, inputs.database, settings, progress
        )
    for name, file, row_format in (
        ("task", inputs.task_data, "prompt"),
        ("data", inputs.data, None),
        ("general", inputs.general_text, "text"),
    ):
        if file is None:
            continue
        documents = read_documents(file, tokenizer, row_format=row_format)
        if name == "general":
            documents = [p for d in documents for p in d.split(settings.window + 1)]
        result[name] = _score_result(
            score(
                model,
                documents,
                batch_size=settings.batch_size,
                description=f"{path.name}: {name}",
                progress=progress,
            )
        )
    if inputs.data_path and inputs.store:
        corpus, reader = Corpus(inputs.data_path), CandidateReader(inputs.store)
        reader.require(corpus_fingerprint=corpus.fingerprint)
        result["candidates"] = asdict(
            candidate_mass(
                model, corpus, reader, max_documents=settings.max_documents, progress=progress
            )
        )
    return result


def _execution(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    questions: Path,
    database: Path,
    settings: Settings,
    progress: bool,
) -> Result:
    rows = [parse_row(where, line) for where, line in read_lines(questions)]
    if not rows:
        raise DataError("no questions", where=questions)
    answers = greedy_answers(
        model,
        [tokenizer.encode(row.text("prompt")) for row in rows],
        eos_id=tokenizer.eos_id,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        progress=progress,
    )
    match = execution_match(
        database,
        [
            (row.text("completion"), tokenizer.decode(answer.tokens).strip())
            for row, answer in zip(rows, answers, strict=True)
        ],
        limits=Limits(seconds=settings.query_seconds),
        bird_compatible=settings.bird_compatible,
        progress=progress,
    )
    return asdict(match) | {
        "accuracy": match.accuracy,
        "standard_error": match.standard_error,
        "unfinished": sum(not answer.finished for answer in answers),
    }


def _score_result(result: Score) -> Result:
    return {
        "perplexity": result.perplexity,
        "loss": result.loss,
        "accuracy": result.accuracy,
        "tokens": result.tokens,
    }


def _add_differences(result: Result, base: Result) -> None:
    """ΔPPL = exp(CE of the model) − exp(CE of the base), on the same tokens."""
    for name in ("task", "data", "general"):
        if name in result:
            change = result[name]["perplexity"] - base[name]["perplexity"]
            result[name]["delta_perplexity"] = change


def _key(
    sha256: str, base: str, tokenizer: str, hashes: Mapping[str, str], settings: Settings
) -> str:
    decisive = [FORMAT, sha256, base, tokenizer, dict(hashes), asdict(settings)]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def read_evaluation(path: Path) -> Result:
    """Read what `evaluate` wrote.

    Raises:
        DataError: it is missing, damaged, or of another format.
    """
    try:
        document: Result = json.loads(path.read_text())
        version = document["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"not an evaluation: {error}", where=path) from error
    if version != FORMAT:
        raise DataError("another format of evaluation", where=path, expected=FORMAT, found=version)
    return document


def _previous(output: Path) -> list[Result]:
    return list(read_evaluation(output)["models"]) if output.exists() else []
