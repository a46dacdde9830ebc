"""Stage 1 as a program: it resumes bitwise, reshards, stops when asked, and says what is wrong."""

from __future__ import annotations

import os
import shutil
import signal

import pytest

from megatron_replay.checkpoint import training
from megatron_replay.store import CandidateReader
from megatron_replay.training.metrics import read_metrics
from tests import tiny
from tests.e2e import stages

LR = 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoint, corpus of some 30 packs, and its store."""
    folder = tmp_path_factory.mktemp("stage1")
    tiny.save_corpus(folder / "corpus", num_documents=100)
    tiny.save_corpus(folder / "other", num_documents=10, seed=5)
    tiny.save_qwen3(folder / "model", tied=True)
    stages.succeed("stage0", *inputs(folder), "--store", folder / "store")
    return folder


def inputs(folder) -> list[object]:
    return ["--load", folder / "model", "--data-path", folder / "corpus", "--seq-length", 64]


def argv(folder, save, *extra) -> list[object]:
    return [
        *inputs(folder), "--store", folder / "store", "--save", save, "--lr", LR,
        "--global-batch-size", 4, "--probe-interval", 3, "--probe-documents", 8, *extra,
    ]  # fmt: skip


def weights(save) -> dict[str, bytes]:
    """Files of the newest checkpoint that hold tensors, by name."""
    newest = training.iteration_directory(save, training.latest_iteration(save))
    return {p.name: p.read_bytes() for p in newest.iterdir() if p.suffix == ".distcp"}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "extra",
    [
        ["--optimizer", "moclip"],
        ["--optimizer", "adamw", "--loss", "full"],
        ["--candidate-scope", "document", "--tail", "ghost", "--train-epochs", 2],
    ],
)
def test_resuming_is_bitwise(folder, tmp_path, extra):
    """Stop in the middle (of epoch 2 in the last case), run the same command: nothing changed."""
    stages.succeed("stage1", *argv(folder, tmp_path / "whole", *extra), tp=2)
    total = len(stages.losses(tmp_path / "whole"))
    slice_ = argv(folder, tmp_path / "parts", *extra, "--exit-interval", total * 2 // 3)
    [code, *_] = [code for code, _, _ in stages.run("stage1", *slice_, tp=2)]
    assert code == 0  # a planned stop is a success
    assert len(stages.losses(tmp_path / "parts")) == total * 2 // 3
    said = stages.succeed("stage1", *argv(folder, tmp_path / "parts", *extra), tp=2)
    assert "resuming" in said
    assert stages.losses(tmp_path / "parts") == stages.losses(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


@pytest.mark.distributed
def test_a_finished_run_is_left_alone(folder, tmp_path):
    stages.succeed("stage1", *argv(folder, tmp_path / "run"))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    said = stages.succeed("stage1", *argv(folder, tmp_path / "run"))
    assert "is finished" in said
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.distributed
@pytest.mark.parametrize("optimizer", ["moclip", "adamw"])
def test_a_checkpoint_of_eight_ranks_continues_on_two(folder, tmp_path, optimizer):
    flags = ["--optimizer", optimizer]
    stages.succeed("stage1", *argv(folder, tmp_path / "one", *flags))
    total = len(stages.losses(tmp_path / "one"))
    stages.run("stage1", *argv(folder, tmp_path / "many", *flags, "--exit-interval", 3), tp=4, pp=2)
    stages.succeed("stage1", *argv(folder, tmp_path / "many", *flags), tp=2)
    assert len(stages.losses(tmp_path / "many")) == total
    assert stages.losses(tmp_path / "many") == pytest.approx(
        stages.losses(tmp_path / "one"), abs=1e-5
    )


@pytest.mark.distributed
def test_layouts_agree_with_every_option(folder, tmp_path):
    """bf16 off: losses of restricted training agree over TP, PP, DP, SP and recomputation."""
    flags = ["--candidate-scope", "document", "--tail", "ghost"]
    stages.succeed("stage1", *argv(folder, tmp_path / "one", *flags))
    reference = stages.losses(tmp_path / "one")
    for name, extra, layout in [
        ("sp", ["--sequence-parallel"], {"tp": 2, "dp": 2}),
        ("pp", ["--recompute-granularity", "full"], {"pp": 2}),
    ]:
        stages.succeed("stage1", *argv(folder, tmp_path / name, *flags, *extra), **layout)
        assert stages.losses(tmp_path / name) == pytest.approx(reference, abs=1e-5), name


@pytest.mark.distributed
@pytest.mark.parametrize("scope", ["position", "document"])
def test_every_head_backend_trains_alike(folder, tmp_path, scope):
    """The same losses, and one line that says which form it was."""
    runs = {}
    for backend, says in (
        ("torch", "torch kernels"), ("union", "union kernels"), ("cpu", "cpu kernels"),
        ("auto", "cpu kernels"),
    ):  # fmt: skip
        extra = ["--candidate-scope", scope, "--tail", "ghost", "--head-backend", backend]
        said = stages.succeed("stage1", *argv(folder, tmp_path / backend, *extra), tp=2)
        assert said.count("restricted head: ") == 1
        how = ", by dense products" if scope == "document" else ""
        assert f"restricted head: {says}{how}\n" in said
        runs[backend] = stages.losses(tmp_path / backend)
    assert runs["auto"] == runs["cpu"]
    for backend in ("union", "cpu"):
        # A weight whose gradient is nothing but rounding moves by the learning rate either way.
        assert runs[backend] == pytest.approx(runs["torch"], abs=3e-4), backend


def rewound(save, to, iteration):
    """A copy of a run as it was after ``iteration``, of which it kept a checkpoint."""
    shutil.copytree(save, to)
    shutil.rmtree(training.iteration_directory(to, training.latest_iteration(to)))
    (to / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")
    assert training.latest_iteration(to) == iteration
    return to


@pytest.mark.distributed
@pytest.mark.parametrize(("extra", "close"), [([], 1e-5), (["--bf16"], 4e-3)], ids=["fp32", "bf16"])
def test_an_interleaved_vocabulary_is_seen_by_nobody(folder, tmp_path, extra, close):
    """Same losses; a run goes on under either sharding and another TP."""
    flags = [*extra, "--save-interval", 3]
    dealing = [*flags, "--vocab-sharding", "interleaved"]
    plain, dealt = tmp_path / "plain", tmp_path / "dealt"
    stages.succeed("stage1", *argv(folder, plain, *flags))
    stages.succeed("stage1", *argv(folder, dealt, *dealing), tp=4)
    reference = stages.losses(plain)
    assert stages.losses(dealt) == pytest.approx(reference, abs=close)
    for start, given, tp in ((dealt, dealing, 4), (dealt, flags, 2), (plain, dealing, 2)):
        run = rewound(start, tmp_path / f"{start.name}-{len(given)}-{tp}", 3)
        stages.succeed("stage1", *argv(folder, run, *given), tp=tp)
        assert stages.losses(run) == pytest.approx(reference, abs=close)
        if tp == 4:  # the same layout goes on bit for bit
            assert stages.losses(run) == stages.losses(dealt)
            assert weights(run) == weights(dealt)


@pytest.mark.distributed
def test_an_epoch_sees_every_recorded_position_once(folder, tmp_path):
    stages.succeed("stage1", *argv(folder, tmp_path / "run"), dp=2)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    reader = CandidateReader(folder / "store")
    recorded = sum(len(reader[i].positions) for i in range(len(reader)))
    assert sum(line.get("positions", 0) for line in lines) == recorded


@pytest.mark.distributed
def test_a_store_serves_any_packing(folder, tmp_path):
    """Packs of 64 made the store; packs of 48 and 96 train on the same sets, so start alike."""
    starts = []
    for length in (48, 64, 96):
        extra = ["--seq-length", length, "--global-batch-size", 40, "--tail", "ghost"]
        stages.succeed("stage1", *argv(folder, tmp_path / str(length), *extra))
        starts.append(read_metrics(tmp_path / str(length) / "metrics.jsonl")[1])
    assert len({line["positions"] for line in starts}) == 1  # the whole corpus in one batch
    assert [line["loss"] for line in starts] == pytest.approx([starts[0]["loss"]] * 3, abs=2e-6)


@pytest.mark.distributed
def test_bf16_trains_fp32_masters(folder, tmp_path):
    """A learning rate below bf16's resolution still moves the masters: the loss falls."""
    stages.succeed("stage1", *argv(folder, tmp_path / "run", "--bf16", "--train-epochs", 4), tp=2)
    losses = stages.losses(tmp_path / "run")
    assert losses[-1] < losses[0]
    stages.run("stage1", *argv(folder, tmp_path / "a", "--bf16", "--exit-interval", 3), tp=2)
    stages.succeed("stage1", *argv(folder, tmp_path / "a", "--bf16"), tp=2)
    stages.succeed("stage1", *argv(folder, tmp_path / "b", "--bf16"), tp=2)
    assert stages.losses(tmp_path / "a") == stages.losses(tmp_path / "b")


def _signal_at_third_step(rank: int) -> None:
    """Rank 0 gets SIGTERM while it computes its third step."""
    from megatron_replay.training.loop import Trainer

    take_step = Trainer._step

    def step(self):
        if rank == 0 and self.state.iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(self)

    Trainer._step = step


@pytest.mark.distributed
def test_sigterm_saves_and_the_rerun_loses_nothing(folder, tmp_path):
    stages.succeed("stage1", *argv(folder, tmp_path / "whole"), tp=2)
    results = stages.run(
        "stage1", *argv(folder, tmp_path / "run"), tp=2, before=_signal_at_third_step
    )
    assert [code for code, _, _ in results] == [130, 130]
    assert "SIGTERM" in results[0][2]
    assert training.latest_iteration(tmp_path / "run") == 3
    stages.succeed("stage1", *argv(folder, tmp_path / "run"), tp=2)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def _poison_third_step(rank: int) -> None:
    from megatron_replay.training import loop

    take_step = loop.train_step

    def step(model, *args, **kwargs):
        work = args[1]
        if step.calls == 2 and rank == 1:
            batch, head = work[0]
            work[0] = (batch, lambda hidden, weight: head(hidden, weight) * float("nan"))
        step.calls += 1
        return take_step(model, *args, **kwargs)

    step.calls = 0
    loop.train_step = step


@pytest.mark.distributed
def test_a_non_finite_gradient_on_one_rank_skips_the_step_on_all(folder, tmp_path):
    said = stages.succeed(
        "stage1", *argv(folder, tmp_path / "run"), tp=1, dp=2, before=_poison_third_step
    )
    assert "step skipped (1 so far)" in said
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert lines[2]["loss"] is None
    assert lines[-1]["skipped_steps"] == 1
    assert lines[-1]["loss"] > 0


@pytest.mark.distributed
def test_too_many_skipped_steps_end_the_run(folder, tmp_path):
    message = stages.fail(
        "stage1", *argv(folder, tmp_path / "run", "--max-skipped-steps", 0),
        dp=2, before=_poison_third_step, code=7,
    )  # fmt: skip
    assert "1 steps were skipped" in message
    assert "the last good checkpoint is none" in message


@pytest.mark.distributed
def test_the_probe_and_tensorboard(folder, tmp_path):
    stages.succeed("stage1", *argv(folder, tmp_path / "run"), tp=2)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    probes = {line["iteration"]: line["probe"] for line in lines if "probe" in line}
    assert 0 in probes
    assert max(probes) == lines[-1]["iteration"]
    at_start = probes[0]
    # Before the first step the model is the one of Stage 0, up to the store's fp16.
    assert at_start["outside_mass"] == pytest.approx(at_start["base_outside_mass"], abs=1e-3)
    assert at_start["full_loss"] > at_start["restricted_loss"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {
        "loss", "grad_norm", "lr", "probe/outside_mass", "update/degrees", "update/obtuse",
        "stability/loss_std", "relative_l2",
    } <= set(events.Tags()["scalars"])  # fmt: skip
    logged = [event.value for event in events.Scalars("loss")]
    assert logged == pytest.approx(stages.losses(tmp_path / "run"), rel=1e-6)


@pytest.mark.distributed
def test_drifting_mass_is_warned_of(folder, tmp_path):
    said = stages.succeed(
        "stage1", *argv(folder, tmp_path / "run", "--optimizer", "adamw", "--train-epochs", 6)
    )
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    last = [line["probe"] for line in lines if "probe" in line][-1]
    drifted = last["outside_mass"] > 2 * last["base_outside_mass"]
    assert ("lies outside the candidate sets" in said) == drifted


@pytest.mark.distributed
def test_an_unfinished_checkpoint_is_ignored(folder, tmp_path):
    save = tmp_path / "run"
    stages.run("stage1", *argv(folder, save, "--exit-interval", 2))
    (save / ".iter_0000005.incomplete").mkdir()
    (save / ".iter_0000005.incomplete" / "junk").write_text("torn")
    stages.succeed("stage1", *argv(folder, save))
    assert not list(save.glob("*.incomplete"))


@pytest.mark.distributed
class TestMistakes:
    """Each gives one line and its exit code."""

    def test_store_of_another_corpus(self, folder, tmp_path):
        extra = ["--data-path", folder / "other"]
        message = stages.fail("stage1", *argv(folder, tmp_path / "run", *extra), code=5)
        assert "corpus_fingerprint" in message

    def test_unfinished_store(self, folder, tmp_path):
        shutil.copytree(folder / "store", tmp_path / "store")
        (tmp_path / "store" / "manifest.json").unlink()
        extra = ["--store", tmp_path / "store"]
        message = stages.fail("stage1", *argv(folder, tmp_path / "run", *extra), code=5)
        assert "Rerun Stage 0" in message

    def test_flipped_bit_in_the_store(self, folder, tmp_path):
        shutil.copytree(folder / "store", tmp_path / "store")
        shard = tmp_path / "store" / "0000" / "shard-0000000.bin"
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
        extra = ["--store", tmp_path / "store"]
        message = stages.fail("stage1", *argv(folder, tmp_path / "run", *extra), code=5)
        assert "shard-0000000.bin" in message

    def test_missing_checkpoint(self, folder, tmp_path):
        extra = ["--load", tmp_path / "nothing"]
        message = stages.fail("stage1", *argv(folder, tmp_path / "run", *extra), code=4)
        assert "no such directory" in message

    def test_warm_up_as_long_as_the_run(self, folder, tmp_path):
        extra = ["--lr-warmup-iters", 1000]
        message = stages.fail("stage1", *argv(folder, tmp_path / "run", *extra), code=2)
        assert "--lr-warmup-iters" in message

    def test_documents_longer_than_the_context(self, folder, tmp_path):
        tiny.save_qwen3(tmp_path / "short", tied=True, max_position_embeddings=16)
        extra = ["--load", tmp_path / "short"]
        message = stages.fail("stage1", *argv(folder, tmp_path / "run", *extra), code=2)
        assert "at most 16 positions" in message

    @pytest.mark.parametrize("backend", ["triton", "ascend"])
    def test_a_head_backend_that_cannot_run(self, folder, tmp_path, backend):
        extra = ["--head-backend", backend]
        message = stages.fail("stage1", *argv(folder, tmp_path / "run", *extra), code=2)
        assert f"the {backend} form cannot run" in message
        assert "a tensor on cpu, where it runs on" in message

    def test_a_head_backend_under_full_softmax(self, folder, tmp_path):
        extra = ["--loss", "full", "--head-backend", "cpu"]
        message = stages.fail("stage1", *argv(folder, tmp_path / "run", *extra), code=2)
        assert "--head-backend" in message

    def test_an_interleaved_vocabulary_under_zero_1(self, folder, tmp_path):
        extra = ["--vocab-sharding", "interleaved", "--use-distributed-optimizer"]
        message = stages.fail("stage1", *argv(folder, tmp_path / "run", *extra), code=2)
        assert "False under --vocab-sharding interleaved" in message

    def test_tp_that_does_not_divide(self, folder, tmp_path):
        message = stages.fail("stage1", *argv(folder, tmp_path / "run"), tp=3, code=2)
        assert "--tensor-model-parallel-size" in message

    def test_save_that_cannot_be_written(self, folder, tmp_path):
        (tmp_path / "file").write_text("")
        message = stages.fail("stage1", *argv(folder, tmp_path / "file" / "run"), code=6)
        assert "cannot write" in message

    def test_resuming_with_other_data(self, folder, tmp_path):
        stages.run("stage1", *argv(folder, tmp_path / "run", "--exit-interval", 2))
        extra = ["--global-batch-size", 8]
        message = stages.fail("stage1", *argv(folder, tmp_path / "run", *extra), code=2)
        assert "another global_batch_size" in message
        assert "expected 4; found 8" in message

    def test_full_disk_publishes_nothing(self, folder, tmp_path):
        message = stages.fail(
            "stage1", *argv(folder, tmp_path / "run"), tp=2, before=_limit_file_size, code=6
        )
        assert "nothing was published" in message
        assert "Errno 27" in message  # what a file size limit gives in place of a full disk's 28
        assert training.latest_iteration(tmp_path / "run") is None
        stages.succeed("stage1", *argv(folder, tmp_path / "run"), tp=2)

    def test_damaged_checkpoint(self, folder, tmp_path):
        save = tmp_path / "run"
        stages.run("stage1", *argv(folder, save, "--exit-interval", 2))
        shard = next(training.iteration_directory(save, 2).glob("*.distcp"))
        shard.write_bytes(shard.read_bytes()[:1000])
        message = stages.fail("stage1", *argv(folder, save), code=4)
        assert "cannot load the checkpoint" in message


def _limit_file_size(rank: int) -> None:
    """No file of this process may grow beyond 64 KiB: the kernel refuses, as on a full disk."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))


def test_print_config_and_dry_run_need_no_ranks(folder, tmp_path, capsys):
    from megatron_replay import stage0, stage1

    assert stage1.main([*map(str, argv(folder, tmp_path / "run")), "--print-config"]) == 0
    assert "max_angle: 45.0" in capsys.readouterr().out
    eight = ["--tensor-model-parallel-size", "4", "--pipeline-model-parallel-size", "2"]
    assert stage1.main([*map(str, argv(folder, tmp_path / "run")), "--dry-run", *eight]) == 0
    out = capsys.readouterr().out
    assert "TP 4 x PP 2 x DP 1 = 8 processes" in out
    assert "memory per device" in out
    store = ["--store", str(tmp_path / "new")]
    assert stage0.main([*map(str, inputs(folder)), *store, "--dry-run"]) == 0
    assert "disk for the store" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "new").exists()
