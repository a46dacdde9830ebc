"""Reads what models are measured on, and measures one model on all of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import ne
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from megatron_replay.checkpoint.hf import HFReader
from megatron_replay.checkpoint.model_files import digests_of, require_store_of_base
from megatron_replay.data.corpus import Corpus, Document, pick_documents
from megatron_replay.data.prompts import PromptStyle, prompt_of
from megatron_replay.data.row_formats import PLAIN, detect_format, tokenize_row
from megatron_replay.data.rows import Row, parse_row, read_lines
from megatron_replay.data.tokenizer import Tokenizer
from megatron_replay.errors import ConfigError, DataError, StoreError
from megatron_replay.evaluation.choices import read_choices, score_choices
from megatron_replay.evaluation.generation import greedy_answers
from megatron_replay.evaluation.inputs import Inputs, Settings
from megatron_replay.evaluation.language_model import (
    load_model,
    require_readable,
    score,
)
from megatron_replay.evaluation.lm_eval_tasks import run_tasks
from megatron_replay.evaluation.results import Result
from megatron_replay.evaluation.sql.execution import execution_match, with_answers
from megatron_replay.evaluation.sql.gold_answers import GoldAnswers
from megatron_replay.evaluation.sql.server import Limits
from megatron_replay.evaluation.sql.sets import SqlQuestion, read_sql_set
from megatron_replay.evaluation.sql.unwrap import unwrapped
from megatron_replay.loss.candidate_sets import CandidateSets
from megatron_replay.loss.sharded import outside_mass
from megatron_replay.model.compatibility import require_vocabulary
from megatron_replay.model.config import ModelConfig
from megatron_replay.progress import Progress
from megatron_replay.store import CandidateReader, DocumentCandidates

#: General text is cut into pieces of this many predicted tokens.
WINDOW = 128
#: The first questions of an SQL set, whose answers are kept.
NUM_SAMPLES = 3
#: Documents of the corpus whose outside mass is measured.
NUM_DOCUMENTS = 200


class Measurement(NamedTuple):
    """What is measured of every model: ``run(model, show="what the progress bar says")``.

    Attributes:
        kind, name: its place in a model's results; no name: the only one of its kind.
        also: what is added to the result.
    """

    kind: str
    run: Callable[..., Result]
    name: str | None = None
    also: Mapping[str, Any] = MappingProxyType({})


def read_documents(
    path: Path, tokenizer: Tokenizer, *, row_format: str | None, style: PromptStyle = PLAIN
) -> list[Document]:
    """Tokenize all rows of a JSONL file; ``row_format`` None: the first row decides.

    Raises:
        DataError: the file is empty, or a row does not fit.
    """
    documents = []
    for where, line in read_lines(path):
        row = parse_row(where, line)
        row_format = row_format or detect_format(row)
        documents.append(tokenize_row(row, row_format, tokenizer, style))
    if not documents:
        raise DataError("no rows", where=path)
    return documents


def read_measurements(
    inputs: Inputs,
    base: Path,
    tokenizer: Tokenizer,
    settings: Settings,
    metrics: Mapping[str, str],
    gold: GoldAnswers | None = None,
) -> list[Measurement]:
    """Read and check every input, and run every gold query, before the first model is loaded.

    Args:
        metrics: the metric that is the score of each lm-eval task.
        gold: answers of slow gold queries, for the measurements to read and to add to.

    Raises:
        ConfigError: the tokenizer lacks what the settings request, or a question to leave out is
            not there.
        DataError, StoreError: a row does not fit, a gold query fails, or the store is of another
            corpus, tokenizer or base.
    """
    size, found = settings.batch_size, []
    style = settings.for_tokenizer(tokenizer)
    plain = replace(style, chat_template=False, system_prompt=None)
    texts = {}
    if inputs.data:
        texts["data"] = read_documents(inputs.data, tokenizer, row_format=None, style=style)
    if inputs.general_text:
        whole = read_documents(inputs.general_text, tokenizer, row_format="text", style=plain)
        texts["general"] = [piece for text in whole for piece in text.split(WINDOW + 1)]
    for kind, documents in texts.items():
        found.append(Measurement(kind, partial(score, documents=documents, batch_size=size)))
    if inputs.data_path and inputs.store:
        corpus, store = _corpus_and_store(inputs.data_path, inputs.store, base)
        run = partial(candidate_mass, corpus=corpus, reader=store, num_documents=NUM_DOCUMENTS)
        found.append(Measurement("candidates", run))
    for general, files, of in (
        (False, inputs.choices, style), (True, inputs.general_choices, plain)
    ):  # fmt: skip
        for name, file in files.items():
            choices = read_choices(file, tokenizer, of)
            run = partial(score_choices, choices=choices, batch_size=size)
            found.append(Measurement("choices", run, name, {"general": general}))
    for name, (asked, left_out) in _sql_questions(inputs, settings, style).items():
        prompts = {question: _prompt(question, tokenizer, style) for question in asked}
        questions = with_answers(asked, _limits(settings), gold, show=f"{name}: gold")
        run = partial(
            sql_match,
            prompts={question: prompts[question] for question in questions},
            tokenizer=tokenizer,
            settings=settings,
            gold=gold,
        )
        counts = {"empty_gold": len(asked) - len(questions), "left_out": left_out}
        found.append(Measurement("sql", run, name, counts))
    if metrics:

        def run_lm_eval(model: PreTrainedModel, show: str) -> Result:  # it shows its own progress
            return run_tasks(model, tokenizer.path, inputs, metrics, settings)

        found.append(Measurement("lm_eval", run_lm_eval))
    return found


def _sql_questions(
    inputs: Inputs, settings: Settings, style: PromptStyle
) -> dict[str, tuple[list[SqlQuestion], int]]:
    """The questions of every set, and how many were left out by name."""
    left_out = set(filter(None, (settings.leave_out or "").split(",")))
    unknown, found = set(left_out), {}
    for name, directory in inputs.sql.items():
        questions = [
            replace(question, name=f"{name}:{number}")
            for number, question in enumerate(
                read_sql_set(directory, chat=bool(style.chat_template)), start=1
            )
        ]
        asked = [question for question in questions if question.name not in left_out]
        unknown -= {question.name for question in questions}
        found[name] = asked, len(questions) - len(asked)
    if unknown:
        raise ConfigError(
            "no such question",
            where="--leave-out",
            expected="NAME:NUMBER of --sql NAME=DIR, the first question's number being 1",
            found=", ".join(sorted(unknown)),
        )
    return found


def _prompt(question: SqlQuestion, tokenizer: Tokenizer, style: PromptStyle) -> list[int]:
    """What a training row of the question has before its answer."""
    row = Row(question.where, {"prompt": question.prompt, "completion": question.gold})
    return prompt_of(tokenize_row(row, "prompt", tokenizer, style))


def _limits(settings: Settings) -> Limits:
    return Limits(seconds=settings.query_seconds, gold_seconds=settings.gold_seconds)


def _corpus_and_store(data_path: Path, store: Path, base: Path) -> tuple[Corpus, CandidateReader]:
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
    name: str, path: Path, measurements: Sequence[Measurement], settings: Settings
) -> Result:
    """Load the model ``name`` and return its results by kind; what is not given is left out."""
    model = load_model(path, device=settings.device, dtype=settings.dtype)
    result: Result = {}
    for one in measurements:
        found = one.run(model, show=f"{name}: {one.name or one.kind}") | dict(one.also)
        if one.name is None:
            result[one.kind] = found
        else:
            result.setdefault(one.kind, {})[one.name] = found
    return result


def sql_match(
    model: PreTrainedModel,
    prompts: Mapping[SqlQuestion, list[int]],
    *,
    tokenizer: Tokenizer,
    settings: Settings,
    gold: GoldAnswers | None,
    show: str,
) -> Result:
    """Generate a query for each question and run it.

    An answer ends at the first special token: EOS, or the chat template's end of turn.

    Returns:
        `execution_match`'s; ``unfinished``: answers without an end; ``unwrapped``: answers that had
        more than the query that was run; ``samples``: the first questions (the last paragraph of
        the prompt), each with its gold query, the answer, and whether it is right.
    """
    for question, prompt in prompts.items():
        require_readable(model, question.where, prompt, len(prompt) + settings.max_new_tokens)
    answers = greedy_answers(
        model,
        list(prompts.values()),
        stop_ids=tokenizer.special_ids,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        show=f"{show}: generate",
    )
    texts = [tokenizer.decode(answer.tokens).strip() for answer in answers]
    queries = [unwrapped(text) for text in texts] if settings.unwrap else texts
    limits = _limits(settings)
    match = execution_match(list(prompts), queries, limits, gold, show=f"{show}: match")
    samples = [
        {"question": asked.prompt.rpartition("\n\n")[2], "gold": asked.gold, "answer": text,
         "right": hit == "1"}
        for asked, text, hit in zip(prompts, texts, match["hits"], strict=True)
    ]  # fmt: skip
    return match | {
        "samples": samples[:NUM_SAMPLES],
        "unfinished": sum(not answer.finished for answer in answers),
        "unwrapped": sum(map(ne, texts, queries)),
    }


@torch.inference_mode()
def candidate_mass(
    model: PreTrainedModel,
    corpus: Corpus,
    reader: CandidateReader,
    *,
    num_documents: int,
    show: str = "",
) -> dict[str, float | int]:
    """Means over the recorded positions of ``num_documents`` documents, evenly spaced.

    Returns:
        ``outside_mass``: ρ = Σ_{j∉S} p(j), good to about 1e-6; ``restricted_loss``:
        −z[x] + log Σ_{j∈S} exp z[j], and ``full_loss``: −z[x] + log Σ_j exp z[j], in nats;
        ``positions`` and ``documents``: how many there are.

    Raises:
        DataError: corpus and store differ in length, or no position is recorded.
    """
    if len(corpus) != len(reader):
        raise DataError(
            "the store was made for another corpus", expected=len(corpus), found=len(reader)
        )
    sample = pick_documents(corpus.lengths, num_documents).tolist()
    totals, positions = torch.zeros(3, dtype=torch.float64), 0
    with Progress(show, len(sample), "documents", enabled=bool(show)) as bar:
        for number in sample:
            candidates = reader[number]
            if len(candidates.positions):
                document = corpus[number]
                where = f"document {number}"
                require_readable(model, where, document.tokens, len(document) - 1)
                totals += _sums(model, document, candidates)
                positions += len(candidates.positions)
            bar.advance()
    if positions == 0:
        raise DataError(f"no position is recorded in {len(sample)} documents of the store")
    outside, restricted, full = (totals / positions).tolist()
    return {
        "outside_mass": outside,
        "restricted_loss": restricted,
        "full_loss": full,
        "positions": positions,
        "documents": len(sample),
    }


def _sums(
    model: PreTrainedModel, document: Document, candidates: DocumentCandidates
) -> torch.Tensor:
    """Sums over the P recorded positions: outside mass, restricted loss, full loss. float64 [3]."""
    weight_VH = model.get_output_embeddings().weight
    if candidates.ids.max() >= len(weight_VH):
        raise StoreError(
            "the store holds ids that the model lacks",
            expected=f"ids below {len(weight_VH)}",
            found=int(candidates.ids.max()),
        )
    sets = CandidateSets.of(
        candidates.ids,
        candidates.offsets.astype("int64"),
        document.tokens[candidates.positions + 1].astype("int64"),
        vocab_size=len(weight_VH),
    ).moved(lambda tensor: tensor.to(model.device))
    tokens_L = torch.from_numpy(document.tokens[:-1].astype("int64")).to(model.device)
    positions_P = torch.from_numpy(candidates.positions.astype("int64")).to(model.device)
    hidden_LH = model.base_model(tokens_L[None], use_cache=False).last_hidden_state[0]
    outside_P, full_P = outside_mass(hidden_LH[positions_P], weight_VH, sets)
    # Below one: where rounding puts all mass outside, the loss is large, not infinite.
    restricted_P = full_P + torch.log1p(-outside_P.clamp(max=1 - 2**-24))
    return torch.stack([outside_P, restricted_P, full_P]).double().sum(1).cpu()
