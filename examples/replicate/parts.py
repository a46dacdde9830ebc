"""The parts of the study, each by the framework's own programs; what is half done goes on.

Products are written last and under another name first: a part is done or it is not.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from examples.replicate import bases
from examples.replicate.bases import Size
from examples.replicate.plan import DOMAINS, LR, Run, Store
from megatron_replay import parallel, platform, stage0, stage1
from megatron_replay.checkpoint.export import export_hf
from megatron_replay.checkpoint.load import load_model
from megatron_replay.config import ModelConfigSource, ParallelConfig
from megatron_replay.evaluation.inputs import Inputs, Settings
from megatron_replay.evaluation.rows import append_row, read_rows, row_of_run
from megatron_replay.evaluation.suite import BASE, evaluate
from tools import preprocess_data

#: A finished run's row.
ROW = "row.jsonl"
#: Fine-tuning: packs of this length, one a step, once over the data.
SEQ_LENGTH, WARMUP = 512, 10


class Failed(Exception):  # noqa: N818 - the program has said why
    """A program ended with this exit code."""

    def __init__(self, code: int) -> None:
        self.code = code


def _call(main: Any, program: str, argv: Sequence[str]) -> str:
    """Run a program in this process; returns the command that does the same."""
    command = shlex.join(["python", *program.split(), *argv])
    print(f"$ {command}", flush=True)
    if code := main(list(argv)):
        raise Failed(code)
    return command


def make_corpora(data: Path) -> None:
    """Tokenize what the bases and the runs learn from; what is up to date is left."""
    longest = ["--max-document-tokens", str(bases.SEQ_LENGTH + 1)]
    inputs = {name: (data / f"{name}.jsonl", longest) for name in bases.KNOWLEDGE}
    inputs |= {n: (data / "train" / f"{n}.jsonl", list[str]()) for n in ("all", *DOMAINS)}
    for name, (rows, flags) in inputs.items():
        prefix = _corpus(data, name)
        prefix.parent.mkdir(exist_ok=True)
        argv = ["--input", str(rows), "--tokenizer", str(data / "tokenizer"), *flags]
        argv += ["--output-prefix", str(prefix)]
        _call(preprocess_data.main, "tools/preprocess_data.py", argv)


def _corpus(data: Path, name: str) -> Path:
    return data.parent / "corpora" / name


def _export(run: Path, target: Path) -> None:
    """As tools/convert_checkpoint.py does, unverified: transformers loads it next."""
    config = ParallelConfig()
    groups = parallel.initialize(config, platform.select("cpu"))
    model = load_model(ModelConfigSource(load=str(run)), config, groups)
    export_hf(
        model.module.named_parameters(),
        model.shape,
        target,
        groups,
        layer_offset=model.layer_offset,
        source=model.files,
        dtype=torch.float32,
        overwrite=True,
    )
    parallel.shutdown()


def _inputs(data: Path, domain: str) -> Inputs:
    """What a run on ``domain`` is measured by."""
    sql = {name: data / "sql" / name for name in ("tables", "joins")}
    choices = {"protocols": data / "choices" / "protocols.jsonl"}
    return Inputs(
        sql={name: path for name, path in sql.items() if domain in ("all", name)},
        choices={name: path for name, path in choices.items() if domain in ("all", name)},
        general_choices={
            # Sums are in the data as well, but neither base of either size learns them.
            name: data / "general" / f"{name}.jsonl"
            for name in ("cloze", "copying")
        },
        general_text=data / "general_heldout.jsonl",
    )


def base_evaluation(base: Path, domain: str) -> Path:
    """Where a base model's own scores are."""
    return base / f"evaluation-{domain}.json"


def _evaluate(
    base: Path, models: dict[str, Path], data: Path, domain: str, output: Path
) -> dict[str, Any]:
    """Measure, into ``output``, which may hold the base's own results already."""
    named = [word for name, path in models.items() for word in ("--model", f"{name}={path}")]
    inputs = _inputs(data, domain)
    flags = [
        *(w for n, p in inputs.sql.items() for w in ("--sql", f"{n}={p}")),
        *(w for n, p in inputs.choices.items() for w in ("--choices", f"{n}={p}")),
        *(w for n, p in inputs.general_choices.items() for w in ("--general-choices", f"{n}={p}")),
    ]
    command = [
        "python", "tools/evaluate.py", "--base", str(base), *named, *flags,
        "--general-text", str(inputs.general_text),
        *(("--max-new-tokens", "96") if inputs.sql else ()), "--batch-size", "150",
        "--device", "cpu", "--output", str(output),
    ]  # fmt: skip
    return evaluate(
        base,
        models,
        inputs,
        Settings(device="cpu", max_new_tokens=96, batch_size=150),
        output=output,
        command=shlex.join(command),
        progress=False,
    )


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
        _evaluate(export, {}, data, domain, base_evaluation(folder, domain))


def make_store(folder: Path, store: Store, base: Path, data: Path) -> None:
    """Stage 0."""
    argv = [
        "--load", str(base / "hf"), "--data-path", str(_corpus(data, store.domain)),
        "--store", str(folder), "--seq-length", str(SEQ_LENGTH), "--micro-batch-size", "4",
        "--position-strategy", store.strategy, "--coverage", str(store.coverage),
    ]  # fmt: skip
    if store.strategy == "last-token":
        argv += ["--last-n", "4"]
    if store.logits:
        argv += ["--store-logits", "fp16"]
    _call(stage0.main, "-m megatron_replay.stage0", argv)


def _learning_rate(run: Run, reference: Sequence[Path] | None) -> float:
    """The run's own, or that at which the first reference would move as far as the second.

    Distance grows about linearly with the rate (Adam's steps have about the size of the rate).
    """
    if run.lr is not None:
        return run.lr
    assert reference is not None
    moved, target = (read_rows(path)[0].evaluation["relative_l2_percent"] for path in reference)
    return float(f"{LR * target / moved:.3g}")


def make_run(
    folder: Path,
    run: Run,
    base: Path,
    store: Path,
    data: Path,
    reference: Sequence[Path] | None,
) -> None:
    """Stage 1, export, evaluation; leaves the row, the log and the metrics."""
    corpus = _corpus(data, run.store.domain)
    argv = [
        "--load", str(base / "hf"), "--data-path", str(corpus), "--store", str(store),
        "--save", str(folder / "run"), "--seed", str(run.seed), "--seq-length", str(SEQ_LENGTH),
        "--micro-batch-size", "1", "--global-batch-size", "1",
        "--lr", f"{_learning_rate(run, reference):g}", "--lr-decay-style", "linear",
        "--lr-warmup-iters", str(WARMUP), "--weight-decay", "0.0",
        "--probe-interval", "1000",  # at the end
        *run.loss, *run.optimizer,
    ]  # fmt: skip
    command = _call(stage1.main, "-m megatron_replay.stage1", argv)
    export = folder / "export"
    _export(folder / "run", export)
    output = folder / "evaluation.json"
    domain = run.store.domain
    shutil.copy(base_evaluation(base, domain), output)  # the base is not measured again
    measured = _evaluate(base / "hf", {"run": export}, data, domain, output)
    (entry,) = (model for model in measured["models"] if model["name"] != BASE)
    cost = json.loads((store / "cost.json").read_text())
    row = row_of_run(
        folder / "run",
        entry,
        method=run.method,
        tables=run.tables,
        seed=run.seed,
        variant=run.variant,
        base=run.store.setting,
        size=run.store.size,
        stage0_seconds=cost["seconds"] if "restricted" in run.loss else None,
        command=command,
    )
    for path in export, *(folder / "run").glob("iter_*"):
        shutil.rmtree(path)
    unfinished = folder / "unfinished.jsonl"
    unfinished.unlink(missing_ok=True)
    append_row(unfinished, row)
    unfinished.rename(folder / ROW)
