"""Reads what models are measured on, and measures one model on all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from megatron_replay.checkpoint.hf import HFReader
from megatron_replay.checkpoint.model_files import digests_of, require_store_of_base
from megatron_replay.data.corpus import Corpus, Document
from megatron_replay.data.row_formats import detect_format, tokenize_row
from megatron_replay.data.rows import parse_row, read_lines
from megatron_replay.data.tokenizer import Tokenizer
from megatron_replay.errors import DataError
from megatron_replay.evaluation.candidate_mass import candidate_mass
from megatron_replay.evaluation.choices import Choice, read_choices, score_choices
from megatron_replay.evaluation.inputs import Inputs, Settings
from megatron_replay.evaluation.language_model import (
    greedy_answers,
    load_model,
    require_readable,
    score,
)
from megatron_replay.evaluation.lm_eval_tasks import LmEvalTasks, read_metrics, run_tasks
from megatron_replay.evaluation.sql.execution import execution_match, with_answers
from megatron_replay.evaluation.sql.query import Limits
from megatron_replay.evaluation.sql.sets import SqlQuestion, read_sql_set
from megatron_replay.model.compatibility import require_vocabulary
from megatron_replay.model.config import ModelConfig
from megatron_replay.store import CandidateReader

Result = dict[str, Any]
#: General text is cut into pieces of this many predicted tokens.
WINDOW = 128
#: Documents of the corpus whose outside mass is measured.
NUM_DOCUMENTS = 200


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


@dataclass(frozen=True, kw_only=True)
class Material:
    """What every model is measured on, read and checked before the first model is loaded.

    Attributes:
        sql: the questions of each set whose gold query finds something, and how many do not.
        choices: rows of each benchmark, and whether it is one of general abilities.
        documents: "data" and "general", those that are given.
        candidates: corpus and store whose outside mass is measured.
        tasks: the lm-eval tasks, if any, and the metric that is the score of each.
    """

    sql: Mapping[str, tuple[list[SqlQuestion], int]]
    choices: Mapping[str, tuple[list[Choice], bool]]
    documents: Mapping[str, list[Document]]
    candidates: tuple[Corpus, CandidateReader] | None
    tasks: tuple[LmEvalTasks, Mapping[str, str]] | None


def read_material(
    inputs: Inputs, base: Path, tokenizer: Tokenizer, settings: Settings, *, progress: bool
) -> Material:
    """Read every input, run every gold query, and look up every lm-eval task.

    Raises:
        ConfigError, DataError, StoreError: a row does not fit, a gold query fails, the store is of
            another corpus, tokenizer or base, an lm-eval task is unknown or has no score that can
            be used.
    """
    documents = {}
    if inputs.data:
        documents["data"] = read_documents(inputs.data, tokenizer, row_format=None)
    if inputs.general_text:
        texts = read_documents(inputs.general_text, tokenizer, row_format="text")
        documents["general"] = [piece for text in texts for piece in text.split(WINDOW + 1)]
    candidates = None
    if inputs.data_path and inputs.store:
        candidates = _candidates(inputs.data_path, inputs.store, base)
    choices = {
        name: (read_choices(file, tokenizer), general)
        for general, files in ((False, inputs.choices), (True, inputs.general_choices))
        for name, file in files.items()
    }
    sql = {}
    for name, directory in inputs.sql.items():
        questions = read_sql_set(directory)
        limits = Limits(seconds=settings.query_seconds)
        kept = with_answers(questions, limits, show=f"{name}: gold" if progress else "")
        sql[name] = kept, len(questions) - len(kept)
    tasks = inputs.lm_eval()
    return Material(
        sql=sql,
        choices=choices,
        documents=documents,
        candidates=candidates,
        tasks=(tasks, read_metrics(tasks, progress=progress)) if tasks else None,
    )


def _candidates(data_path: Path, store: Path, base: Path) -> tuple[Corpus, CandidateReader]:
    """Corpus and store, made for each other and for the base."""
    corpus, reader = Corpus(data_path), CandidateReader(store)
    require_vocabulary(corpus, ModelConfig.from_hf(base), base, flag="--base")
    reader.require(
        corpus_fingerprint=corpus.fingerprint, tokenizer_fingerprint=corpus.tokenizer_fingerprint
    )
    require_store_of_base(
        reader,
        digests_of(HFReader(base).files()),
        flag="--base",
        fix="Give the --base that Stage 0 had as --load, or rerun Stage 0 with this one",
    )
    return corpus, reader


def measure(
    name: str,
    path: Path,
    tokenizer: Tokenizer,
    material: Material,
    settings: Settings,
    *,
    progress: bool,
) -> Result:
    """Measure one model; what is not given is left out."""
    model = load_model(path, device=settings.device, dtype=settings.dtype)
    size = settings.batch_size

    def show(what: str) -> str:
        return f"{name}: {what}" if progress else ""

    result: Result = {
        "sql": {
            of: _execution(model, tokenizer, questions, settings, show(of)) | {"empty_gold": empty}
            for of, (questions, empty) in material.sql.items()
        },
        "choices": {
            of: score_choices(model, rows, batch_size=size, show=show(of)) | {"general": general}
            for of, (rows, general) in material.choices.items()
        },
    }
    for kind, documents in material.documents.items():
        result[kind] = score(model, documents, batch_size=size, show=show(kind))
    if material.tasks:
        result["lm_eval"] = run_tasks(
            model, tokenizer.path, *material.tasks, batch_size=size, progress=progress
        )
    if material.candidates:
        result["candidates"] = candidate_mass(
            model, *material.candidates, num_documents=NUM_DOCUMENTS, show=show("outside mass")
        )
    return {of: found for of, found in result.items() if found}


def _execution(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    questions: list[SqlQuestion],
    settings: Settings,
    show: str,
) -> Result:
    """Generate a query for each question and run it; ``unfinished``: answers without an end."""
    prompts = [tokenizer.encode(question.prompt) for question in questions]
    for question, prompt in zip(questions, prompts, strict=True):
        if not prompt:
            raise DataError("the prompt has no tokens", where=question.where)
        require_readable(model, question.where, prompt, len(prompt) + settings.max_new_tokens)
    answers = greedy_answers(
        model,
        prompts,
        eos_id=tokenizer.eos_id,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        show=show and f"{show}: generate",
    )
    match = execution_match(
        questions,
        [tokenizer.decode(answer.tokens).strip() for answer in answers],
        Limits(seconds=settings.query_seconds),
        show=show and f"{show}: match",
    )
    return match | {"unfinished": sum(not answer.finished for answer in answers)}
