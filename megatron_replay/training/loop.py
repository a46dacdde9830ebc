"""Stage 1's loop: data, model, optimizer and watch, and the steps between two checkpoints."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from megatron_replay import cli, kernels
from megatron_replay.checkpoint.load import LoadedModel, load_model, model_files
from megatron_replay.checkpoint.retention import keep_only, report_remains
from megatron_replay.checkpoint.training import (
    TrainState,
    keep_model_files,
    latest_iteration,
    load_checkpoint,
    save_checkpoint,
)
from megatron_replay.config import Stage1Config
from megatron_replay.data.corpus import Corpus
from megatron_replay.data.loader import Loader
from megatron_replay.data.packing import fit_documents, report_long_documents, without_unread
from megatron_replay.data.sampler import GlobalBatches
from megatron_replay.errors import ConfigError
from megatron_replay.files import make_directory
from megatron_replay.model.attention import record_max_logits
from megatron_replay.model.compatibility import (
    open_store,
    require_context,
    require_loss,
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
from megatron_replay.training import configuration, refresh
from megatron_replay.training.interrupt import StopRequest
from megatron_replay.training.profile import StepTrace
from megatron_replay.training.skipped import SkippedBatches
from megatron_replay.training.step import StepResult, train_step, wrap_for_training
from megatron_replay.training.watch import Watch
from megatron_replay.training.work import GlobalWork, WorkMaker


class Trainer:
    """The state of a run, in the order it is built: data, model, optimizer, watch."""

    _loader: Loader[GlobalWork]  # while it trains

    def __init__(self, config: Stage1Config, groups: Parallel) -> None:
        interleaved = config.loss.vocab_sharding == "interleaved" and groups.tp_size > 1
        groups = dataclasses.replace(groups, interleaved_vocabulary=interleaved)
        self.config, self.groups = config, groups
        self.directory = Path(config.training.save)
        self._prepare_directory()
        self.corpus = Corpus(config.data.data_path)
        fitted = fit_documents(
            self.corpus.lengths, config.data.seq_length, config.data.long_documents
        )
        if groups.rank == 0:
            report_long_documents(fitted, config.data.long_documents)
        self.lengths = fitted.lengths
        if config.loss.loss == "restricted" and config.training.drop_unread_tokens:
            assert config.loss.store is not None
            reader = CandidateReader(config.loss.store)
            reader.require(corpus_fingerprint=self.corpus.fingerprint)
            self.lengths = without_unread(self.lengths, reader.stops())
        self.batches = GlobalBatches(
            self.lengths,
            seq_length=config.data.seq_length,
            global_batch_size=config.training.global_batch_size,
            micro_batch_size=config.data.micro_batch_size,
            seed=config.training.seed,
            epochs=config.training.train_epochs,
            pack_documents=config.data.pack_documents,
            dp_rank=groups.dp_rank,
            dp_size=groups.dp_size,
        )
        self.train_iters = config.training.train_iters or self.batches.num_batches
        self._require_iterations()
        dtype = torch.bfloat16 if config.model.bf16 else torch.float32
        like = torch.empty(0, dtype=dtype, device=groups.device)
        self.head_form = kernels.HEAD.choose(config.loss.head_backend, like)
        self.model = self._load_model()
        require_vocabulary(self.corpus, self.model.shape)
        require_context(self.lengths, self.model.shape)
        require_loss(config.loss, self.model.shape)
        self.reader: CandidateReader | None = None
        if config.loss.store is not None:
            logits = config.loss.kl_weight > 0
            self.reader = open_store(
                config.loss.store, self.corpus, self.model.shape, logits=logits
            )
        self.wrapped = wrap_for_training(
            self.model,
            use_distributed_optimizer=config.optimizer.use_distributed_optimizer,
            overlap_grad_reduce=config.training.overlap_grad_reduce,
        )
        self.optimizer = build_optimizer(config.optimizer, self.model, self.wrapped, groups)
        if groups.writer:
            print(f"attention: {kernels.ATTENTION.describe('auto', like)}")
            print(f"optimizer: {config.optimizer.optimizer}, {kernels_of(self.optimizer)}")
            if config.loss.loss == "restricted":
                form = kernels.HEAD.describe(config.loss.head_backend, like)
                dense = config.loss.candidate_scope != "position"
                print(f"restricted head: {form}" + ", by dense products" * dense)
        if config.optimizer.qk_clip_threshold is not None:
            record_max_logits(self.model.module)
        self.is_refreshed = False
        self.state = self._resume()
        if self.state.iteration < self.train_iters:  # what is refused or finished records nothing
            groups.on_rank_zero(lambda: configuration.record(self.directory, config))
        self.trace = StepTrace(config, groups.rank)
        self.skipped = SkippedBatches(
            self.directory,
            groups,
            self.lengths,
            limit=config.training.max_skipped_steps,
            resume_iteration=self.state.iteration,
        )
        self.watch = Watch(
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
        if self.is_refreshed and self.state.iteration < self.train_iters:
            self.watch.refreshed(self.state.iteration, str(config.loss.store))

    def train(self, stop: StopRequest) -> None:
        """Take every step that is left, watching and saving on the way."""
        with (
            Progress(
                "Stage 1",
                self.train_iters,
                "iterations",
                initial=self.state.iteration,
                enabled=self.groups.writer,
                interval=self.config.progress.progress_interval,
            ) as progress,
            self._start_loader() as self._loader,
        ):
            self.watch.begin(self.state.iteration)
            while self.state.iteration < self.train_iters:
                with self.trace.step(self.state.iteration + 1):
                    result, values = self._step()
                progress.advance(note="" if result.loss is None else f"loss {result.loss:.4f}")
                self.watch.step(self.state.iteration, values)
                if self._must_leave(stop):
                    break
                self._save_if_due()
        self.trace.close()
        self._save()
        self.watch.close()
        if self.state.iteration < self.train_iters:
            why = stop.received or ("--exit-interval" if self._slice_is_over() else "another rank")
            message = (
                f"stopped after iteration {self.state.iteration} of {self.train_iters} "
                f"({why}); saved, the same command goes on from here"
            )
            if not self._slice_is_over():  # a planned stop is a success
                raise cli.Interrupted(message)
            if self.groups.writer:
                print(message, file=sys.stderr)

    def _prepare_directory(self) -> None:
        def prepare() -> None:
            make_directory(self.directory)
            keep_model_files(model_files(self.config.model.load), self.directory)

        self.groups.on_rank_zero(prepare)

    def _require_iterations(self) -> None:
        warmup = self.config.optimizer.lr_warmup_iters
        if warmup >= self.train_iters:
            raise ConfigError(
                "the warm-up is as long as the run",
                where="--lr-warmup-iters",
                expected=f"below the run's {self.train_iters} iterations",
                found=warmup,
                fix="Shorten it, or lower --global-batch-size or --seq-length for more iterations",
            )

    def _load_model(self) -> LoadedModel:
        """Weights from ``--load``; ``_resume`` overwrites them where ``--save`` has newer ones."""
        return load_model(
            self.config.model,
            self.config.parallel,
            self.groups,
            recompute=self.config.training.recompute_granularity == "full",
        )

    def _resume(self) -> TrainState:
        identity = refresh.identity(self.config, self.corpus, self.reader, self.lengths)
        allowed = self.config.loss.refresh_store
        iteration = self.groups.broadcast(latest_iteration(self.directory))
        if self.groups.rank == 0:
            report_remains(self.directory, iteration)
        if allowed:
            refresh.require_checkpoint(iteration, self.directory)
        if iteration is None:
            return TrainState(0, 0, 0, identity)
        state = load_checkpoint(
            self.directory,
            iteration,
            self.model.module,
            self.optimizer,
            self.groups,
            identity=refresh.resumable(identity, allowed=allowed),
            fixes=refresh.FIXES,
        )
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
            changed = configuration.changes(self.directory, self.config)
            if changed and not finished:
                print(f"changed since it last ran: {', '.join(changed)}", file=sys.stderr)
        self.is_refreshed = refresh.is_refreshed(state.identity, identity)
        return dataclasses.replace(state, identity=identity)

    def _start_loader(self) -> Loader[GlobalWork]:
        """What is left of the run, a step's work at a time."""
        make = WorkMaker(
            self.config,
            self.groups,
            self.corpus,
            self.lengths,
            self.batches,
            self.reader,
            self.head_form,
            self.model.shape.vocab_size,
        )
        steps = range(self.state.iteration, self.train_iters)
        return Loader(make, steps, depth=self.config.training.prefetch_batches)

    def _step(self) -> tuple[StepResult, dict[str, Any]]:
        """One optimizer step on the next global batch, and what to log of it."""
        started = time.perf_counter()
        lr = learning_rate(self.state.iteration, self.config.optimizer, self.train_iters)
        with record_function("data"):
            work, tokens, loss_form = next(self._loader)
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
        if result.skipped:
            self._tell_of_skipped(result)
        return result, {
            "loss": result.loss,
            **({"loss_form": loss_form} if loss_form != self.config.loss.loss else {}),
            "grad_norm": result.grad_norm,
            "lr": lr,
            "positions": result.positions,
            "tokens": tokens,
            "seconds": time.perf_counter() - started,
            "data_wait_seconds": self._loader.waited,
            "skipped_steps": self.state.skipped_steps,
            "update": result.update,
        }

    def _tell_of_skipped(self, result: StepResult) -> None:
        k = (self.state.iteration - 1) % self.batches.num_batches
        with self._loader.still():  # whose thread uses the batches otherwise
            packs = self.batches.global_batch(k)
        self.skipped.add(
            self.state.iteration,
            self.state.skipped_steps,
            result.own_sums,
            packs,
            self.config.data.micro_batch_size,
        )

    def _must_leave(self, stop: StopRequest) -> bool:
        """Whether any rank was asked to stop, or the slice is over."""
        return self.groups.any(stop.received is not None) or self._slice_is_over()

    def _save_if_due(self) -> None:
        """Every ``--save-interval``; the loader stands still, as saving forks."""
        interval = self.config.training.save_interval
        if interval and self.state.iteration % interval == 0:
            with self._loader.still():
                self._save()

    def _slice_is_over(self) -> bool:
        return self.state.iteration == self.config.training.exit_interval

    def _save(self) -> None:
        """A checkpoint with what is known of its worth; then the older ones go that may."""
        found = self.groups.agreed(self.watch.scores)  # {} on all but the writer
        scores = {name: value for part in found for name, value in part.items()}
        state = dataclasses.replace(self.state, scores=scores)
        save_checkpoint(self.directory, state, self.model.module, self.optimizer, self.groups)
        self._keep_only()

    def _keep_only(self) -> None:
        last, best = self.config.training.keep_last, self.config.training.keep_best
        self.groups.on_rank_zero(
            lambda: keep_only(self.directory, last=last, best_by=None if best == "none" else best)
        )
