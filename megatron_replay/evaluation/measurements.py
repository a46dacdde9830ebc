"""All measurements of one model that need no other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from megatron_replay.data.corpus import Corpus
from megatron_replay.data.document import Document
from megatron_replay.data.rows import detect_format, parse_row, read_lines, tokenize_row
from megatron_replay.data.sql_sets import SqlQuestion, read_sql_set
from megatron_replay.data.tokenizer import Tokenizer
from megatron_replay.errors import DataError
from megatron_replay.evaluation.candidate_mass import candidate_mass
from megatron_replay.evaluation.choices import read_choices, score_choices
from megatron_replay.evaluation.inputs import Inputs, Settings
from megatron_replay.evaluation.language_model import Score, greedy_answers, load_model, score
from megatron_replay.evaluation.lm_eval_tasks import run_tasks
from megatron_replay.evaluation.sql_execution import Limits, execution_match
from megatron_replay.store import CandidateReader

Result = dict[str, Any]


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


def measure(
    path: Path, tokenizer: Tokenizer, inputs: Inputs, settings: Settings, *, progress: bool
) -> Result:
    """All measurements of one model that need no other; what is not given is left out."""
    model = load_model(path, device=settings.device, dtype=settings.dtype)
    result: Result = {
        "sql": {
            name: _execution(model, tokenizer, read_sql_set(directory), settings, progress)
            for name, directory in inputs.sql.items()
        },
        "choices": {
            **_choices(model, tokenizer, inputs.choices, settings, False, progress),
            **_choices(model, tokenizer, inputs.general_choices, settings, True, progress),
        },
        **_perplexities(model, tokenizer, inputs, settings, f"{path.name}: ", progress),
    }
    if tasks := inputs.lm_eval():
        result["lm_eval"] = run_tasks(
            model, tokenizer.path, tasks, batch_size=settings.batch_size, progress=progress
        )
    if inputs.data_path and inputs.store:
        corpus, reader = Corpus(inputs.data_path), CandidateReader(inputs.store)
        reader.require(corpus_fingerprint=corpus.fingerprint)
        result["candidates"] = asdict(
            candidate_mass(
                model, corpus, reader, max_documents=settings.max_documents, progress=progress
            )
        )
    return {name: found for name, found in result.items() if found}


def _perplexities(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    inputs: Inputs,
    settings: Settings,
    prefix: str,
    progress: bool,
) -> Result:
    result: Result = {}
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
                description=prefix + name,
                progress=progress,
            )
        )
    return result


def _score_result(result: Score) -> Result:
    return {
        "perplexity": result.perplexity,
        "loss": result.loss,
        "accuracy": result.accuracy,
        "tokens": result.tokens,
    }


def _choices(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    files: Mapping[str, Path],
    settings: Settings,
    general: bool,
    progress: bool,
) -> Result:
    result: Result = {}
    for name, file in files.items():
        found = score_choices(
            model,
            read_choices(file, tokenizer),
            batch_size=settings.batch_size,
            description=name,
            progress=progress,
        )
        result[name] = asdict(found) | {
            "accuracy": found.accuracy,
            "accuracy_per_byte": found.accuracy_per_byte,
            "standard_error": found.standard_error,
            "general": general,
        }
    return result


def _execution(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    questions: list[SqlQuestion],
    settings: Settings,
    progress: bool,
) -> Result:
    prompts = [tokenizer.encode(question.prompt) for question in questions]
    _require_answerable(model, questions, prompts, settings.max_new_tokens)
    answers = greedy_answers(
        model,
        prompts,
        eos_id=tokenizer.eos_id,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        progress=progress,
    )
    match = execution_match(
        questions,
        [tokenizer.decode(answer.tokens).strip() for answer in answers],
        limits=Limits(seconds=settings.query_seconds),
        bird_compat=settings.bird_compat,
        progress=progress,
    )
    return asdict(match) | {
        "accuracy": match.accuracy,
        "standard_error": match.standard_error,
        "unfinished": sum(not answer.finished for answer in answers),
    }


def _require_answerable(
    model: PreTrainedModel,
    questions: list[SqlQuestion],
    prompts: list[list[int]],
    max_new_tokens: int,
) -> None:
    context = getattr(model.config, "max_position_embeddings", None)
    for question, prompt in zip(questions, prompts, strict=True):
        if context is not None and len(prompt) + max_new_tokens > context:
            raise DataError(
                "prompt and answer are longer than the model's context",
                where=question.where,
                expected=f"at most {context} tokens",
                found=f"{len(prompt)} and --max-new-tokens {max_new_tokens}",
            )
        if not prompt:
            raise DataError("the prompt has no tokens", where=question.where)
        if max(prompt) >= model.config.vocab_size:
            raise DataError(
                "the prompt holds a token that the model lacks",
                where=question.where,
                expected=f"ids below {model.config.vocab_size}",
                found=max(prompt),
                fix="Give the tokenizer that belongs to the model",
            )
