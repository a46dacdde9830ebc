"""All measurements of one model that need no other: what is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
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
from megatron_replay.evaluation.language_model import Score, greedy_answers, load_model, score
from megatron_replay.evaluation.lm_eval_metrics import Metric
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
    """What is asked of every model, read and checked before the first of them is loaded.

    Attributes:
        sql: the questions of each set whose gold query finds something, and how many do not.
        choices, general_choices: rows of each benchmark.
        documents: "data" and "general", those that are given.
        candidates: corpus and store whose outside mass is measured.
        tasks: the lm-eval tasks, if any, and the metric that is the score of each.
    """

    sql: Mapping[str, tuple[list[SqlQuestion], int]]
    choices: Mapping[str, list[Choice]]
    general_choices: Mapping[str, list[Choice]]
    documents: Mapping[str, list[Document]]
    candidates: tuple[Corpus, CandidateReader] | None
    tasks: tuple[LmEvalTasks, Mapping[str, Metric]] | None


def read_material(
    inputs: Inputs, base: Path, tokenizer: Tokenizer, settings: Settings, *, progress: bool
) -> Material:
    """Read every input; lm-eval reads its own tasks, here to see that it can.

    Raises:
        ConfigError, DataError, StoreError: a row does not fit, a gold query fails, the store is of
            another corpus, tokenizer or base, an lm-eval task is unknown or has no score that can
            be used.
    """
    documents = {
        name: read_documents(file, tokenizer, row_format=row_format)
        for name, file, row_format in (
            ("data", inputs.data, None),
            ("general", inputs.general_text, "text"),
        )
        if file is not None
    }
    if general := documents.get("general"):
        documents["general"] = [p for d in general for p in d.split(WINDOW + 1)]
    candidates = None
    if inputs.data_path and inputs.store:
        candidates = _candidates(inputs.data_path, inputs.store, base)
    choices, general_choices = (
        {name: read_choices(file, tokenizer) for name, file in files.items()}
        for files in (inputs.choices, inputs.general_choices)
    )
    sql = {}
    for name, directory in inputs.sql.items():
        questions = read_sql_set(directory)
        asked = with_answers(questions, _limits(settings), show=f"{name}: gold" if progress else "")
        sql[name] = asked, len(questions) - len(asked)
    tasks = inputs.lm_eval()
    return Material(
        sql=sql,
        choices=choices,
        general_choices=general_choices,
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
    """All measurements of one model that need no other; what is not given is left out."""
    model = load_model(path, device=settings.device, dtype=settings.dtype)

    def choose(rows: Mapping[str, list[Choice]], general: bool) -> Result:
        return {
            of: _choices(model, asked, settings, general, f"{name}: {of}", progress)
            for of, asked in rows.items()
        }

    result: Result = {
        "sql": {
            of: _execution(model, tokenizer, *asked, settings, f"{name}: {of}", progress)
            for of, asked in material.sql.items()
        },
        "choices": choose(material.choices, False) | choose(material.general_choices, True),
    }
    for kind, documents in material.documents.items():
        measured = score(
            model,
            documents,
            batch_size=settings.batch_size,
            description=f"{name}: {kind}",
            progress=progress,
        )
        result[kind] = _score_result(measured)
    if material.tasks:
        result["lm_eval"] = run_tasks(
            model,
            tokenizer.path,
            *material.tasks,
            batch_size=settings.batch_size,
            progress=progress,
        )
    if material.candidates:
        corpus, reader = material.candidates
        result["candidates"] = candidate_mass(
            model,
            corpus,
            reader,
            num_documents=NUM_DOCUMENTS,
            show=f"{name}: outside mass" if progress else "",
        )
    return {of: found for of, found in result.items() if found}


def _limits(settings: Settings) -> Limits:
    return Limits(seconds=settings.query_seconds)


def _score_result(result: Score) -> Result:
    return {
        "perplexity": result.perplexity,
        "loss": result.loss,
        "accuracy": result.accuracy,
        "tokens": result.tokens,
    }


def _choices(
    model: PreTrainedModel,
    asked: list[Choice],
    settings: Settings,
    general: bool,
    description: str,
    progress: bool,
) -> Result:
    found = score_choices(
        model,
        asked,
        batch_size=settings.batch_size,
        description=description,
        progress=progress,
    )
    return asdict(found) | {
        "accuracy": found.accuracy,
        "accuracy_per_byte": found.accuracy_per_byte,
        "standard_error": found.standard_error,
        "general": general,
    }


def _execution(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    questions: list[SqlQuestion],
    left_out: int,
    settings: Settings,
    description: str,
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
        description=f"{description}: generate",
        progress=progress,
    )
    match = execution_match(
        questions,
        [tokenizer.decode(answer.tokens).strip() for answer in answers],
        _limits(settings),
        show=f"{description}: match" if progress else "",
    )
    return match | {
        "empty_gold": left_out,
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
