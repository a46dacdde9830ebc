"""The parts of the study, each one of the framework's own programs; an interrupted part resumes.

A part writes its product last and atomically, so it is either done or not.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from examples.replicate import bases
from examples.replicate.bases import Size
from examples.replicate.plan import DOMAINS, LR, Run, Store
from examples.replicate.results import read_rows, row_of_run, write_rows
from megatron_replay import parallel, platform, stage0, stage1
from megatron_replay.checkpoint.export import export_hf
from megatron_replay.checkpoint.load import load_model
from megatron_replay.config import ModelConfigSource, ParallelConfig
from megatron_replay.evaluation.results import BASE, read_evaluation
from tools import evaluate, preprocess_data

#: The row of a finished run, in its directory.
ROW = "row.csv"
#: Fine-tuning: packs of this length, one a step, once over the data.
SEQ_LENGTH, WARMUP = 512, 10
#: The bases have read plain text only; their tokenizer has a chat template.
PLAIN = "--no-chat-template"


class Failed(Exception):  # noqa: N818 - the program has printed the reason
    """A program ended with this exit code."""

    def __init__(self, code: int) -> None:
        self.code = code


def _call(main: Callable[[list[str]], int], program: str, argv: Sequence[str]) -> None:
    """Run a program in this process, and log the command that does the same."""
    print(f"$ {shlex.join(['python', *program.split(), *argv])}", flush=True)
    if code := main(list(argv)):
        raise Failed(code)


def make_corpora(data: Path) -> None:
    """Tokenize what the bases and the runs learn from; corpora that are up to date are kept."""
    longest = ["--max-document-tokens", str(bases.SEQ_LENGTH + 1)]
    inputs = {name: (data / f"{name}.jsonl", longest) for name in bases.KNOWLEDGE}
    inputs |= {n: (data / "train" / f"{n}.jsonl", list[str]()) for n in ("all", *DOMAINS)}
    for name, (rows, flags) in inputs.items():
        prefix = _corpus(data, name)
        prefix.parent.mkdir(exist_ok=True)
        argv = ["--input", str(rows), "--tokenizer", str(data / "tokenizer"), *flags]
        argv += ["--output-prefix", str(prefix), PLAIN]
        _call(preprocess_data.main, "tools/preprocess_data.py", argv)


def _corpus(data: Path, name: str) -> Path:
    return data.parent / "corpora" / name


def _export(run: Path, target: Path) -> None:
    """As tools/convert_checkpoint.py does, without its verification: transformers loads it next."""
    config = ParallelConfig()
    groups = parallel.initialize(config, platform.select("cpu"))
    model = load_model(ModelConfigSource(load=str(run)), config, groups)
    export_hf(
        model,
        target,
        groups,
        dtype=torch.float32,
        overwrite=True,
    )
    parallel.shutdown()


def base_evaluation(base: Path, domain: str) -> Path:
    """Where a base model's own scores are."""
    return base / f"evaluation-{domain}.json"


def _evaluate(base: Path, models: Sequence[str], data: Path, domain: str, output: Path) -> None:
    """Measure into ``output``; results of the base that are there already are kept."""
    asked = DOMAINS if domain == "all" else (domain,)
    sql = [name for name in ("tables", "joins") if name in asked]
    flags = [w for name in sql for w in ("--sql", f"{name}={data / 'sql' / name}")]
    if "protocols" in asked:
        flags += ["--choices", f"protocols={data / 'choices' / 'protocols.jsonl'}"]
    for name in ("cloze", "copying"):  # no base learned the sums
        flags += ["--general-choices", f"{name}={data / 'general' / f'{name}.jsonl'}"]
    argv = [
        "--base", str(base), *(word for model in models for word in ("--model", model)), *flags,
        "--general-text", str(data / "general_heldout.jsonl"),
        *(("--max-new-tokens", "96") if sql else ()), "--batch-size", "150",
        "--device", "cpu", "--output", str(output), PLAIN,
    ]  # fmt: skip
    _call(evaluate.main, "tools/evaluate.py", argv)


def make_base(folder: Path, size: Size, base: str, data: Path) -> None:
    """Pretrain a base model and measure it."""
    init, export = folder / "init", folder / "hf"
    if not export.exists():
        if not init.exists():
            bases.write_init(init, size, tokenizer=data / "tokenizer")
        corpus = _corpus(data, base)
        argv = bases.pretraining(size, init=init, corpus=corpus, save=folder / "train")
        _call(stage1.main, "-m megatron_replay.stage1", argv)
        _export(folder / "train", export)
    for domain in (*DOMAINS, "all"):
        _evaluate(export, [], data, domain, base_evaluation(folder, domain))


def make_store(folder: Path, store: Store, base: Path, data: Path) -> None:
    """Stage 0."""
    argv = [
        "--load", str(base / "hf"), "--data-path", str(_corpus(data, store.domain)),
        "--store", str(folder), "--seq-length", str(SEQ_LENGTH), "--micro-batch-size", "4",
        "--position-strategy", store.strategy, "--coverage", str(store.coverage),
    ]  # fmt: skip
    argv += ["--last-n", "4"] if store.strategy == "last-token" else []
    argv += ["--store-logits", "fp16"] if store.logits else []
    _call(stage0.main, "-m megatron_replay.stage0", argv)


def _matched_rate(moving: Path, target: Path) -> float:
    """The rate at which the first run would move as far as the second.

    Distance grows about linearly with the rate (Adam's steps have about the size of the rate).
    """
    moved, wanted = (float(read_rows(path)[0]["relative_l2_percent"]) for path in (moving, target))
    return float(f"{LR * wanted / moved:.3g}")


def make_run(
    folder: Path,
    run: Run,
    base: Path,
    store: Path,
    data: Path,
    matched: Sequence[Path],
) -> None:
    """Stage 1, export, evaluation; leaves the row, the log and the metrics.

    Args:
        matched: rows of the two runs that a matched learning rate is computed from.
    """
    lr = _matched_rate(*matched) if run.lr is None else run.lr
    argv = [
        "--load", str(base / "hf"), "--data-path", str(_corpus(data, run.store.domain)),
        "--store", str(store),
        "--save", str(folder / "run"), "--seed", str(run.seed), "--seq-length", str(SEQ_LENGTH),
        "--micro-batch-size", "1", "--global-batch-size", "1",
        "--lr", f"{lr:g}", "--lr-decay-style", "linear",
        "--lr-warmup-iters", str(WARMUP), "--weight-decay", "0.0",
        "--probe-interval", "1000",  # at the end
        *run.loss, *run.optimizer,
    ]  # fmt: skip
    _call(stage1.main, "-m megatron_replay.stage1", argv)
    export, output = folder / "export", folder / "evaluation.json"
    _export(folder / "run", export)
    domain = run.store.domain
    shutil.copy(base_evaluation(base, domain), output)  # the base is not measured again
    _evaluate(base / "hf", [f"run={export}"], data, domain, output)
    (entry,) = (model for model in read_evaluation(output)["models"] if model["name"] != BASE)
    cost = json.loads((store / "cost.json").read_text())
    row = row_of_run(
        folder / "run",
        entry,
        stage0_seconds=cost["seconds"] if "restricted" in run.loss else None,
        lr=lr,
        **made_with(run),
    )
    for path in export, *(folder / "run").glob("iter_*"):
        shutil.rmtree(path)
    write_rows(folder / ROW, [row])


def made_with(run: Run) -> dict[str, Any]:
    """What a row says of its run, besides the learning rate."""
    return {
        "name": run.name,
        "method": run.method,
        "tables": " ".join(run.tables),
        "variant": run.variant,
        "base": run.store.setting,
        "size": run.store.size,
        "seed": run.seed,
    }
