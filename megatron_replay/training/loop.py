"""Stage 1's loop: data, model, optimizer and monitor, and the steps between two checkpoints."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from megatron_replay import cli, kernels
from megatron_replay.checkpoint.load import base_fingerprint, describe_model, load_model
from megatron_replay.checkpoint.model_files import fingerprints, keep_model_files
from megatron_replay.checkpoint.retention import keep_only, report_remains
from megatron_replay.checkpoint.training import (
    TrainState,
    latest_iteration,
    load_checkpoint,
    read_state,
    save_checkpoint,
)
from megatron_replay.config import Stage1Config
from megatron_replay.data.corpus import Corpus
from megatron_replay.data.loader import Loader
from megatron_replay.data.packing import report_long_documents, usable_documents
from megatron_replay.data.sampler import global_batches, require_iterations
from megatron_replay.locks import DirectoryLock
from megatron_replay.model.attention import record_max_logits
from megatron_replay.model.compatibility import (
    require_context,
    require_store,
    require_vocabulary,
)
from megatron_replay.optim.build import (
    apply_hyperparameters,
    build_optimizer,
    kernels_of,
)
from megatron_replay.optim.schedule import learning_rate
from megatron_replay.parallel import Parallel
from megatron_replay.progress import Progress
from megatron_replay.store import CandidateReader
from megatron_replay.training import identity, run_directory
from megatron_replay.training.interrupt import StopRequest
from megatron_replay.training.monitor import Monitor
from megatron_replay.training.profile import StepTrace
from megatron_replay.training.step import StepResult, train_step, wrap_for_training
from megatron_replay.training.work import GlobalWork, WorkMaker

#: Global batches made ahead of the step.
PREFETCHED_BATCHES = 2


class Trainer:
    """The state of a run, in the order it is built: directory, data, model, optimizer, monitor.

    What can be refused is refused before a weight is loaded, and nothing but the lock is written
    before everything is accepted.
    """

    _loader: Loader[GlobalWork]  # while it trains
    _lock: DirectoryLock  # of rank 0, for as long as this process lives

    def __init__(self, config: Stage1Config, groups: Parallel) -> None:
        self.config, self.groups = config, groups
        self.directory = Path(config.training.save)
        groups.on_rank_zero(self._claim)
        self._prepare_data()
        files, shape = describe_model(config.model.load)
        require_vocabulary(self.corpus, shape, files)
        require_context(self.lengths, shape)
        if self.reader is not None:
            require_store(self.reader, self.corpus, shape, logits=config.loss.kl_weight > 0)
        dtype = torch.bfloat16 if config.model.bf16 else torch.float32
        like = torch.empty(0, dtype=dtype, device=groups.device)
        self.backend = kernels.HEAD.choose(config.loss.head_backend, like)
        self.state, resumes = self._find_state(fingerprints(files))
        self.model = load_model(
            config.model,
            config.parallel,
            groups,
            recompute=config.training.recompute_granularity == "full",
        )
        self.wrapped = wrap_for_training(
            self.model,
            use_distributed_optimizer=config.optimizer.use_distributed_optimizer,
            overlap_grad_reduce=groups.dp_size > 1,
        )
        self.optimizer = build_optimizer(config.optimizer, self.model, self.wrapped, groups)
        if groups.writer:
            self._describe(like)
        if config.optimizer.qk_clip_threshold is not None:
            record_max_logits(self.model.module)
        if resumes:
            self._resume()
        if self.state.iteration < self.train_iters:  # what is refused or finished records nothing
            groups.on_rank_zero(lambda: self._record(files))
        self.trace = StepTrace(config, groups.rank)
        self.monitor = Monitor(
            config,
            groups,
            model=self.model,
            wrapped=self.wrapped,
            optimizer=self.optimizer,
            corpus=self.corpus,
            reader=self.reader,
            lengths=self.lengths,
            iteration=self.state.iteration,
            train_iters=self.train_iters,
        )

    def _claim(self) -> None:
        self._lock = run_directory.claim(self.config)

    def _record(self, files: Path) -> None:
        run_directory.record(self.directory, self.config)
        keep_model_files(files, self.directory)

    def _prepare_data(self) -> None:
        """Corpus, store, and which documents make up a step."""
        config, groups = self.config, self.groups
        self.corpus = Corpus(config.data.data_path)
        self.reader: CandidateReader | None = None
        if config.loss.store is not None:
            self.reader = CandidateReader(config.loss.store)
            self.reader.require(corpus_fingerprint=self.corpus.fingerprint)
        documents, self.lengths = usable_documents(config, self.corpus, self.reader)
        if groups.rank == 0:
            report_long_documents(documents, config.data.long_documents)
        self.batches = global_batches(
            config, self.lengths, dp_rank=groups.dp_rank, dp_size=groups.dp_size
        )
        self.train_iters = config.training.train_iters or self.batches.num_batches
        require_iterations(config, self.train_iters)

    def _describe(self, like: torch.Tensor) -> None:
        loss = self.config.loss
        print(f"attention: {kernels.ATTENTION.describe('auto', like)}")
        print(f"optimizer: {self.config.optimizer.optimizer}, {kernels_of(self.optimizer)}")
        if loss.loss == "restricted":
            form = kernels.HEAD.describe(loss.head_backend, like)
            dense = loss.candidate_scope != "position"
            print(f"restricted head: {form}" + ", by dense products" * dense)

    def _find_state(self, model_files: dict[str, str]) -> tuple[TrainState, bool]:
        """Where the run stands, and whether that is a checkpoint."""
        config, groups = self.config, self.groups
        own = Path(config.model.load).resolve() == self.directory.resolve()
        base = groups.from_rank_zero(lambda: base_fingerprint(config.model.load))
        agreed = identity.identity(config, self.corpus, self.reader, base="" if own else base)
        iteration = groups.from_rank_zero(lambda: latest_iteration(self.directory))
        if groups.rank == 0:
            report_remains(self.directory, iteration)
        before: dict[str, Any] = {}
        state = TrainState(0, 0, 0, agreed, model_files)
        if iteration is not None:
            state = read_state(self.directory, iteration)
            identity.require_same(state, agreed, model_files, self.directory)
            before = state.identity
            state = dataclasses.replace(state, identity={**before, **agreed})
        is_its_own = before.get(identity.STORE) == agreed.get(identity.STORE, ...)
        if self.reader is not None and not config.loss.allow_other_store and not is_its_own:
            identity.require_store_of_base(self.reader, base)
        return state, iteration is not None

    def train(self, stop: StopRequest) -> None:
        """Take every step that is left, watching and saving on the way."""
        with (
            Progress(
                "Stage 1",
                self.train_iters,
                "iterations",
                initial=self.state.iteration,
                enabled=self.groups.writer,
            ) as progress,
            self._start_loader() as self._loader,
        ):
            self.monitor.start()
            while self.state.iteration < self.train_iters:
                with self.trace.step(self.state.iteration + 1):
                    result, facts = self._step()
                progress.advance(note=_note(result, last_stage=self.groups.last_stage))
                self.monitor.after_step(self.state, result, **facts)
                if self._must_leave(stop):
                    break
                self._save_if_due()
        self.trace.close()
        is_finished = self.state.iteration >= self.train_iters
        is_planned = is_finished or self._slice_is_over()
        nothing = self.monitor.nothing_learnt(self.state, is_over=is_planned)
        if not nothing:
            self._save()
        self.monitor.finish()
        if not is_finished:
            why = stop.received or ("--exit-interval" if is_planned else "another rank")
            message = (
                f"stopped after iteration {self.state.iteration} of {self.train_iters} ({why}); "
                + (nothing or "saved, the same command goes on from here")
            )
            if not is_planned:
                raise cli.Interrupted(message)
            if self.groups.writer:
                print(message, file=sys.stderr)

    def _resume(self) -> None:
        """Load the checkpoint that ``_find_state`` found, and say so."""
        iteration = self.state.iteration
        load_checkpoint(self.directory, iteration, self.model.module, self.optimizer, self.groups)
        apply_hyperparameters(self.optimizer, self.config.optimizer)
        self._keep_only()  # where a killed run could not
        if self.groups.writer:
            finished = iteration >= self.train_iters
            message = (
                f"{self.directory} is finished: {iteration} of {self.train_iters} iterations are "
                "done, nothing is left to do"
                if finished
                else f"resuming {self.directory} after iteration {iteration}"
            )
            print(message, file=sys.stderr)
            changed = run_directory.changes(self.directory, self.config)
            if changed and not finished:
                print(f"changed since it last ran: {', '.join(changed)}", file=sys.stderr)

    def _start_loader(self) -> Loader[GlobalWork]:
        """What is left of the run, a step's work at a time."""
        make = WorkMaker(
            self.config,
            self.groups,
            self.corpus,
            self.lengths,
            self.batches,
            self.reader,
            self.backend,
            self.model.shape.vocab_size,
        )
        steps = range(self.state.iteration, self.train_iters)
        return Loader(make, steps, depth=PREFETCHED_BATCHES)

    def _step(self) -> tuple[StepResult, dict[str, Any]]:
        """One optimizer step on the next global batch, and what the monitor takes besides it."""
        started = time.perf_counter()
        lr = learning_rate(self.state.iteration, self.config.optimizer, self.train_iters)
        with record_function("data"):
            work, packs, tokens = next(self._loader)
        is_logged = (self.state.iteration + 1) % self.config.training.log_interval == 0
        result = train_step(
            self.wrapped,
            self.optimizer,
            work,
            self.groups,
            lr=lr,
            report=is_logged,
            qk_clip_threshold=self.config.optimizer.qk_clip_threshold,
        )
        self.state = dataclasses.replace(
            self.state,
            iteration=self.state.iteration + 1,
            consumed_tokens=self.state.consumed_tokens + tokens,
            skipped_steps=self.state.skipped_steps + result.skipped,
        )
        return result, {
            "packs": packs,
            "lr": lr,
            "tokens": tokens,
            "seconds": time.perf_counter() - started,
            "waited": self._loader.waited,
        }

    def _must_leave(self, stop: StopRequest) -> bool:
        """Whether any rank was asked to stop, or the slice is over."""
        return stop.after(self.state.iteration) or self._slice_is_over()

    def _save_if_due(self) -> None:
        """Every ``--save-interval``, once there is something to save."""
        interval = self.config.training.save_interval
        if not interval or self.state.iteration % interval:
            return
        if nothing := self.monitor.nothing_learnt(self.state):
            if self.groups.writer:
                print(f"iteration {self.state.iteration}: {nothing}", file=sys.stderr)
        else:
            self._save()

    def _slice_is_over(self) -> bool:
        interval = self.config.training.exit_interval
        return interval is not None and self.state.iteration % interval == 0

    def _save(self) -> None:
        """Write a checkpoint, then remove those that --keep-last does not keep."""
        save_checkpoint(self.directory, self.state, self.model.module, self.optimizer, self.groups)
        self._keep_only()

    def _keep_only(self) -> None:
        last = self.config.training.keep_last
        self.groups.on_rank_zero(lambda: keep_only(self.directory, last=last))


def _note(result: StepResult, *, last_stage: bool) -> str:
    if result.loss is not None:
        return f"loss {result.loss:.4f}"
    return "no label in this step" if last_stage else ""
