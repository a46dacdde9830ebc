"""Stage 1's training loop."""

from __future__ import annotations

import sys
import time

from torch.profiler import record_function

from megatron_replay import cli
from megatron_replay.checkpoint.directories import keep_only
from megatron_replay.checkpoint.training import TrainState, save_checkpoint
from megatron_replay.optim.build import learning_rate
from megatron_replay.progress import Progress
from megatron_replay.training.build import TrainingRun
from megatron_replay.training.interrupt import StopRequest
from megatron_replay.training.step import StepResult, train_step


def train(run: TrainingRun, stop: StopRequest) -> None:
    """Take the remaining steps: batch, forward and backward, update, watch, save, stop.

    Raises:
        Interrupted: a signal ended the run early, after a checkpoint was saved.
        TrainingError: too many steps were skipped, or no step had a label.
    """
    config, groups, state = run.config, run.groups, run.state
    save_interval = config.training.save_interval
    with (
        run.start_loader() as batches,
        Progress(
            "Stage 1",
            run.train_iters,
            "iterations",
            initial=state.iteration,
            enabled=groups.writer,
        ) as progress,
    ):
        run.monitor.start()
        while state.iteration < run.train_iters:
            started = time.perf_counter()
            lr = learning_rate(state.iteration, config.optimizer, run.train_iters)
            with run.trace.step(state.iteration + 1):
                with record_function("data"):
                    batch = next(batches)
                result = train_step(
                    run.wrapped,
                    run.optimizer,
                    batch.micro_batches,
                    groups,
                    lr=lr,
                    report=(state.iteration + 1) % config.training.log_interval == 0,
                    qk_clip_threshold=config.optimizer.qk_clip_threshold,
                )
            state = state.after_step(tokens=batch.tokens, skipped=result.skipped)
            seconds = time.perf_counter() - started
            progress.advance(note=_note(result, last_stage=groups.last_stage))
            run.monitor.after_step(
                state,
                result,
                batch.packs,
                lr=lr,
                tokens=batch.tokens,
                seconds=seconds,
                waited=batches.waited,
            )
            if stop.after(state.iteration) or _slice_is_over(run, state):
                break
            if save_interval and state.iteration % save_interval == 0:
                _save_unless_nothing_learnt(run, state)
    run.trace.close()
    _finish(run, state, stop)


def _finish(run: TrainingRun, state: TrainState, stop: StopRequest) -> None:
    """Save, write the summary, and report why the run ends here if it is not finished."""
    is_finished = state.iteration >= run.train_iters
    is_planned = is_finished or _slice_is_over(run, state)
    nothing = run.monitor.nothing_learnt(state, is_over=is_planned)
    if not nothing:
        _save(run, state)
    run.monitor.finish()
    if is_finished:
        return
    why = stop.received or ("--exit-interval" if is_planned else "another rank")
    message = f"stopped after iteration {state.iteration} of {run.train_iters} ({why}); " + (
        nothing or "saved; rerun the same command to continue"
    )
    if not is_planned:
        raise cli.Interrupted(message)
    if run.groups.writer:
        print(message, file=sys.stderr)


def _slice_is_over(run: TrainingRun, state: TrainState) -> bool:
    interval = run.config.training.exit_interval
    return interval is not None and state.iteration % interval == 0


def _save_unless_nothing_learnt(run: TrainingRun, state: TrainState) -> None:
    if nothing := run.monitor.nothing_learnt(state):
        if run.groups.writer:
            print(f"iteration {state.iteration}: {nothing}", file=sys.stderr)
    else:
        _save(run, state)


def _save(run: TrainingRun, state: TrainState) -> None:
    """Write a checkpoint, then remove those that --keep-last does not keep."""
    save_checkpoint(run.directory, state, run.model.module, run.optimizer, run.groups)
    last = run.config.training.keep_last
    run.groups.on_rank_zero(lambda: keep_only(run.directory, last=last))


def _note(result: StepResult, *, last_stage: bool) -> str:
    if result.loss is not None:
        return f"loss {result.loss:.4f}"
    return "no label in this step" if last_stage else ""
