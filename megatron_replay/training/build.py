"""Builds a run of Stage 1, and refuses what does not fit before a weight is loaded."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_replay import kernels
from megatron_replay.checkpoint.directories import keep_only, latest_iteration, report_remains
from megatron_replay.checkpoint.load import (
    LoadedModel,
    base_fingerprint,
    describe_model,
    load_model,
)
from megatron_replay.checkpoint.model_files import (
    fingerprints,
    keep_model_files,
    require_store_of_base,
)
from megatron_replay.checkpoint.training import TrainState, load_checkpoint, read_state
from megatron_replay.config import Stage1Config
from megatron_replay.data.corpus import Corpus
from megatron_replay.data.loader import global_batches, require_iterations
from megatron_replay.data.packing import report_long_documents, usable_documents
from megatron_replay.estimate import checkpoint_bytes
from megatron_replay.locks import DirectoryLock
from megatron_replay.loss.blocks import product_dtype
from megatron_replay.model.attention import record_max_logits
from megatron_replay.model.compatibility import (
    require_context,
    require_store,
    require_vocabulary,
)
from megatron_replay.optim.build import apply_hyperparameters, build_optimizer, kernels_of
from megatron_replay.parallel import Parallel
from megatron_replay.store import CandidateReader
from megatron_replay.training import run_directory
from megatron_replay.training.batches import BatchBuilder, TrainingData
from megatron_replay.training.step import wrap_for_training


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingRun:
    """A run, ready to take its remaining steps.

    Attributes:
        directory: --save.
        model, wrapped: this rank's part of the model, plain and as it is trained.
        state: steps, tokens and skipped steps so far, and the run's identity.
        make_batch: builds a step's batch on this rank's device.
        lock: rank 0's lock on the directory, held until this process ends.
    """

    config: Stage1Config
    groups: Parallel
    directory: Path
    data: TrainingData
    model: LoadedModel
    wrapped: DistributedDataParallel
    optimizer: MegatronOptimizer
    state: TrainState
    make_batch: BatchBuilder
    lock: DirectoryLock | None


def build_run(config: Stage1Config, groups: Parallel) -> TrainingRun:
    """Build directory, data, model and optimizer, in this order. Collective over the world.

    Only the lock is written before everything has been accepted.

    Raises:
        ReplayError: the settings, the files or the checkpoint do not fit; the same on all ranks.
    """
    directory = Path(config.training.save)
    locks: list[DirectoryLock] = []
    groups.on_rank_zero(lambda: locks.append(run_directory.claim(config)))
    data = prepare_data(config, groups)
    files, shape = describe_model(config.model.load)
    require_vocabulary(data.corpus, shape, files)
    require_context(data.lengths, shape)
    if data.reader is not None:
        require_store(data.reader, data.corpus, shape, logits=config.loss.kl_weight > 0)
    dtype = torch.bfloat16 if config.model.bf16 else torch.float32
    like = torch.empty(0, dtype=dtype, device=groups.device)
    backend = kernels.HEAD.choose(config.loss.head_backend, like)
    state, resumes = _find_state(config, groups, data, fingerprints(files))
    if state.iteration < data.train_iters:
        size = checkpoint_bytes(shape, config)
        groups.on_rank_zero(lambda: run_directory.require_space(directory, size))
    model = load_model(
        config.model,
        config.parallel,
        groups,
        recompute=config.training.recompute_granularity == "full",
    )
    wrapped = wrap_for_training(
        model,
        use_distributed_optimizer=config.optimizer.use_distributed_optimizer,
        overlap_grad_reduce=groups.dp_size > 1,
    )
    optimizer = build_optimizer(config.optimizer, model, wrapped, groups)
    if groups.writer:
        _print_backends(config, optimizer, like)
    if config.optimizer.qk_clip_threshold is not None:
        record_max_logits(model.module)
    if resumes:
        load_checkpoint(directory, state.iteration, model.module, optimizer, groups)
        apply_hyperparameters(optimizer, config.optimizer)
        last = config.training.keep_last
        groups.on_rank_zero(lambda: keep_only(directory, last=last))  # if a kill prevented it
        if groups.writer:
            _print_resumption(config, state.iteration, data.train_iters)
    if state.iteration < data.train_iters:  # a refused or finished run records nothing
        groups.on_rank_zero(lambda: run_directory.record(directory, config))
        groups.on_rank_zero(lambda: keep_model_files(files, directory))
    return TrainingRun(
        config=config,
        groups=groups,
        directory=directory,
        data=data,
        model=model,
        wrapped=wrapped,
        optimizer=optimizer,
        state=state,
        make_batch=BatchBuilder(config, groups, data, backend, shape.vocab_size),
        lock=locks[0] if locks else None,
    )


def prepare_data(config: Stage1Config, groups: Parallel) -> TrainingData:
    """Read corpus and store, and plan the documents of each step."""
    corpus = Corpus(config.data.data_path)
    reader = None
    if config.loss.store is not None:
        reader = CandidateReader(config.loss.store)
        reader.require(corpus_fingerprint=corpus.fingerprint)
    documents, lengths = usable_documents(config, corpus, reader)
    if groups.rank == 0:
        report_long_documents(documents, config.data.long_documents)
    batches = global_batches(config, corpus, lengths)
    train_iters = config.training.train_iters or batches.num_batches
    require_iterations(config, train_iters)
    return TrainingData(
        corpus=corpus, reader=reader, lengths=lengths, batches=batches, train_iters=train_iters
    )


def _find_state(
    config: Stage1Config, groups: Parallel, data: TrainingData, model_files: dict[str, str]
) -> tuple[TrainState, bool]:
    """The run's state, and whether it comes from a checkpoint."""
    directory = Path(config.training.save)
    own = Path(config.model.load).resolve() == directory.resolve()
    base = groups.from_rank_zero(lambda: base_fingerprint(config.model.load))
    agreed = run_directory.identity(config, data.corpus, data.reader, base="" if own else base)
    iteration = groups.from_rank_zero(lambda: latest_iteration(directory))
    if groups.rank == 0:
        report_remains(directory, iteration)
    before: dict[str, Any] = {}
    state = TrainState(0, 0, 0, agreed, model_files)
    if iteration is not None:
        state = read_state(directory, iteration)
        run_directory.require_same(state, agreed, model_files, directory)
        before = state.identity
        state = dataclasses.replace(state, identity={**before, **agreed})
    is_its_own = before.get(run_directory.STORE) == agreed.get(run_directory.STORE, ...)
    if data.reader is not None and not config.loss.allow_other_store and not is_its_own:
        require_store_of_base(
            data.reader,
            base,
            flag=run_directory.BASE,
            fix="Use the --load of Stage 0, rerun Stage 0 with this one, or add "
            "--allow-other-store to train on the candidates of another model",
        )
    return state, iteration is not None


def _print_backends(config: Stage1Config, optimizer: MegatronOptimizer, like: torch.Tensor) -> None:
    print(f"attention: {kernels.ATTENTION.describe('auto', like)}")
    print(f"{kernels.LAYERS.what}: {kernels.LAYERS.describe('auto', like)}")
    print(f"optimizer: {config.optimizer.optimizer}, {kernels_of(optimizer)}")
    if config.loss.loss == "restricted":
        head = kernels.HEAD.describe(config.loss.head_backend, like)
        dense = config.loss.candidate_scope != "position"
        print(f"restricted head: {head}" + ", by dense products" * dense)
    else:
        print(f"full softmax: products of {product_dtype(like)}, summed in fp32")


def _print_resumption(config: Stage1Config, iteration: int, train_iters: int) -> None:
    directory = Path(config.training.save)
    is_finished = iteration >= train_iters
    print(
        f"{directory} is finished: {iteration} iterations are done, and the run has {train_iters}"
        if is_finished
        else f"resuming {directory} after iteration {iteration}",
        file=sys.stderr,
    )
    changed = run_directory.changes(directory, config)
    if changed:
        effect = ", which has no effect: for another run, choose another --save" * is_finished
        print(f"settings changed since the last run: {', '.join(changed)}{effect}", file=sys.stderr)
