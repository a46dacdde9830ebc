"""Reads what models are measured on, and measures one model on all of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from megatron_replay.checkpoint.hf import HFReader
from megatron_replay.checkpoint.model_files import digests_of, require_store_of_base
from megatron_replay.data.corpus import Corpus, Document, pick_documents
from megatron_replay.data.prompts import PromptStyle
from megatron_replay.data.row_formats import PLAIN, detect_format, tokenize_row
from megatron_replay.data.rows import parse_row, read_lines
from megatron_replay.data.tokenizer import Tokenizer
from megatron_replay.errors import DataError, StoreError
from megatron_replay.evaluation.choices import read_choices, score_choices
from megatron_replay.evaluation.inputs import Inputs, Settings
from megatron_replay.evaluation.language_model import (
    load_model,
    require_readable,
    score,
)
from megatron_replay.evaluation.lm_eval_tasks import run_tasks
from megatron_replay.evaluation.results import Result
from megatron_replay.evaluation.sql.gold_answers import GoldAnswers
from megatron_replay.evaluation.sql.measurement import sql_measurements
from megatron_replay.loss.candidate_sets import CandidateSets
from megatron_replay.loss.sharded import outside_mass
from megatron_replay.model.compatibility import require_vocabulary
from megatron_replay.model.config import ModelConfig
from megatron_replay.progress import Progress
from megatron_replay.store import CandidateReader, DocumentCandidates

#: General text is cut into pieces of this many predicted tokens.
WINDOW = 128
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
        warn_of_another_style(corpus, style)
        run = partial(candidate_mass, corpus=corpus, reader=store, num_documents=NUM_DOCUMENTS)
        found.append(Measurement("candidates", run))
    for general, files, of in (
        (False, inputs.choices, style), (True, inputs.general_choices, plain)
    ):  # fmt: skip
        for name, file in files.items():
            choices = read_choices(file, tokenizer, of)
            run = partial(score_choices, choices=choices, batch_size=size)
            found.append(Measurement("choices", run, name, {"general": general}))
    for name, (match, counts) in sql_measurements(inputs.sql, tokenizer, settings, gold).items():
        found.append(Measurement("sql", match, name, counts))
    if metrics:

        def run_lm_eval(model: PreTrainedModel, show: str) -> Result:  # it shows its own progress
            return run_tasks(model, tokenizer.path, inputs, metrics, settings)

        found.append(Measurement("lm_eval", run_lm_eval))
    return found


def warn_of_another_style(corpus: Corpus, style: PromptStyle) -> None:
    """Print that the model is asked in another way than it was trained to answer in."""
    names = ("chat_template", "system_prompt")
    trained = corpus.description.source.get("prompts", {})
    if corpus.description.format == "prompt" and any(
        name in trained and trained[name] != getattr(style, name) for name in names
    ):
        print(
            f"warning: prompts are asked as {style}, but the corpus was written as "
            f"{PromptStyle(**trained)}: give tools/evaluate.py the flags of "
            "tools/preprocess_data.py",
            file=sys.stderr,
        )


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
    return torch.stack([outside_P, restricted_P, full_P]).cpu().double().sum(1)
