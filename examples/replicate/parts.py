"""The parts of the study, each one of the framework's own programs; an interrupted part resumes.

A part writes its product atomically when all else is done. What a run leaves beside its rows, if it
is killed while it clears up, only takes space.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from examples.replicate.data import GENERAL
from examples.replicate.plan import Run, Store
from examples.replicate.results import (
    ROWS,
    base_evaluation,
    row_of_model,
    row_of_run,
    write_rows,
)
from examples.replicate.study import Failed
from megatron_replay import parallel, platform, stage0, stage1
from megatron_replay.checkpoint.blend import blend_into
from megatron_replay.checkpoint.export import export_hf
from megatron_replay.checkpoint.load import load_model
from megatron_replay.config import ModelConfigSource, ParallelConfig
from megatron_replay.evaluation.results import read_evaluation
from megatron_replay.files import atomic_file
from tools import evaluate, preprocess_data

#: A step: so many documents, computed in micro-batches of up to so many positions.
BATCH, SEQ_LENGTH = 16, 1024
WARMUP, PROBE_INTERVAL, PROBE_DOCUMENTS = 3, 12, 16
#: Questions about one database share its schema: a step draws groups of them. Questions of the
#: other domains share next to nothing.
ORDER = {"spider": ("--group-prefixes", "8")}
#: The rate of healing is small against those of the study.
HEALING_LR = 3e-5
MAX_NEW_TOKENS, EVALUATION_BATCH = 80, 32


def _call(main: Callable[[list[str]], int], program: str, argv: Sequence[str]) -> None:
    """Run a program in this process, and log the command that does the same."""
    print(f"$ {shlex.join(['python', *program.split(), *argv])}", flush=True)
    if code := main(list(argv)):
        raise Failed(code)


def make_corpora(data: Path, tokenizer: Path, domains: Sequence[str]) -> None:
    """Tokenize what the base and the runs learn from; corpora that are up to date are kept."""
    spider = ["--format", "spider", "--input", str(data / "spider" / "train.json")]
    for name in ("heal_text", "heal_chat", *domains):
        argv = spider if name == "spider" else ["--input", str(data / f"{name}.jsonl")]
        argv = [*argv, "--tokenizer", str(tokenizer), "--output-prefix", str(_corpus(data, name))]
        _corpus(data, name).parent.mkdir(exist_ok=True)
        _call(preprocess_data.main, "tools/preprocess_data.py", argv)


def _corpus(data: Path, name: str) -> Path:
    return data.parent / "corpora" / name


def _train(load: Path, corpus: Path, save: Path, device: str, *more: str) -> None:
    argv = [
        "--load", str(load), "--data-path", str(corpus), "--save", str(save),
        "--seq-length", str(SEQ_LENGTH), "--no-pack-documents", "--global-batch-size", str(BATCH),
        "--lr-decay-style", "linear", "--lr-warmup-iters", str(WARMUP), "--weight-decay", "0.0",
        "--platform", device, *more,
    ]  # fmt: skip
    _call(stage1.main, "-m megatron_replay.stage1", argv)


def _export(run: Path, target: Path, device: str, *, base: Path | None = None,
            weight: float = 1.0) -> None:  # fmt: skip
    """As tools/convert_checkpoint.py does, without its verification: transformers loads it next."""
    config = ParallelConfig(platform=device)
    groups = parallel.initialize(config, platform.select(device))
    model = load_model(ModelConfigSource(load=str(run)), config, groups)
    if base is not None:
        blend_into(model, base, weight, groups)
    export_hf(model, target, groups, dtype=torch.float32, overwrite=True)
    parallel.shutdown()


def _evaluate(base: Path, models: Mapping[str, Path], data: Path, domain: str, output: Path,
              device: str) -> None:  # fmt: skip
    """Measure into ``output``; results of the base that are there already are kept."""
    asked = ["--choices", f"{domain}={data / 'choices' / f'{domain}.jsonl'}"]
    if domain == "spider":
        asked = ["--sql", f"spider={data / 'spider'}", "--max-new-tokens", str(MAX_NEW_TOKENS)]
    for name in GENERAL:
        asked += ["--general-choices", f"{name}={data / 'general' / f'{name}.jsonl'}"]
    argv = [
        "--base", str(base), *(w for n, path in models.items() for w in ("--model", f"{n}={path}")),
        *asked, "--general-text", str(data / "general_text.jsonl"),
        "--batch-size", str(EVALUATION_BATCH), "--device", device, "--output", str(output),
    ]  # fmt: skip
    _call(evaluate.main, "tools/evaluate.py", argv)


def make_base(folder: Path, source: Path, data: Path, domains: Sequence[str], device: str) -> None:
    """Heal a base whose weights were rounded to four bits, so that training is not what heals it.

    A short run of full softmax on text that is not measured; then its scores on every domain.
    """
    healed, text = folder / "hf", folder / "heal_text-hf"
    if not healed.exists():
        for name, load, export in (("heal_text", source, text), ("heal_chat", text, healed)):
            flags = ["--loss", "full", "--optimizer", "adamw", "--lr", str(HEALING_LR)]
            _train(load, _corpus(data, name), folder / name, device, *flags)
            _export(folder / name, export, device)
        for path in (text, folder / "heal_text", folder / "heal_chat"):
            shutil.rmtree(path)
    for domain in domains:
        _evaluate(healed, {}, data, domain, base_evaluation(folder, domain), device)


def make_store(folder: Path, store: Store, base: Path, data: Path, device: str) -> None:
    """Stage 0."""
    argv = [
        "--load", str(base / "hf"), "--data-path", str(_corpus(data, store.domain)),
        "--store", str(folder), "--seq-length", str(SEQ_LENGTH), "--platform", device,
        "--position-strategy", store.strategy, "--coverage", str(store.coverage),
        "--store-logits", "fp16",
    ]  # fmt: skip
    argv += ["--last-n", "4"] if store.strategy == "last-token" else []
    _call(stage0.main, "-m megatron_replay.stage0", argv)


def make_run(folder: Path, run: Run, base: Path, store: Path, data: Path, device: str) -> None:
    """Stage 1, export, evaluation, also of blends with the base; leaves rows, log and metrics."""
    domain = run.store.domain
    _train(
        base / "hf", _corpus(data, domain), folder / "run", device,
        "--store", str(store), "--seed", str(run.seed), "--lr", f"{run.lr:g}",
        "--probe-interval", str(PROBE_INTERVAL), "--probe-documents", str(PROBE_DOCUMENTS),
        *ORDER.get(domain, ()), *run.loss, *run.optimizer,
    )  # fmt: skip
    exports = {"1": folder / "export", **{f"{w:g}": folder / f"blend-{w:g}" for w in run.blends}}
    for weight, target in exports.items():
        blended = {} if weight == "1" else {"base": base / "hf", "weight": float(weight)}
        _export(folder / "run", target, device, **blended)
    output = folder / "evaluation.json"
    if not output.exists():  # the base is not measured again
        with atomic_file(output, "w") as handle:
            handle.write(base_evaluation(base, domain).read_text())
    _evaluate(base / "hf", exports, data, domain, output, device)
    found = {model["name"]: model for model in read_evaluation(output)["models"]}
    cost = json.loads((store / "cost.json").read_text())["seconds"]
    needs_store = "restricted" in run.loss
    rows = [
        row_of_run(folder / "run", found["1"], run, stage0_seconds=cost if needs_store else None)
    ]
    rows += [
        row_of_model(found[f"{weight:g}"], name=f"{run.name}-blend{weight:g}", domain=domain,
                     method=f"{run.method}, α {weight:g}", lr=run.lr, seed=run.seed)
        for weight in run.blends
    ]  # fmt: skip
    write_rows(folder / ROWS, rows)
    for path in *exports.values(), *(folder / "run").glob("iter_*"):
        shutil.rmtree(path)
