"""What Stage 1 refuses, and what it says without ranks."""

from __future__ import annotations

import shutil
import signal

import pytest

from megatron_replay.checkpoint import training
from tests import tiny
from tests.e2e import stages
from tests.e2e.stages import argv, inputs


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
        assert f"the {backend} backend cannot run" in message
        assert "a tensor on cpu, where it runs on" in message

    def test_a_head_backend_under_full_softmax(self, folder, tmp_path):
        extra = ["--loss", "full", "--head-backend", "cpu"]
        message = stages.fail("stage1", *argv(folder, tmp_path / "run", *extra), code=2)
        assert "--head-backend" in message

    def test_a_divergence_from_logits_that_the_store_lacks(self, folder, tmp_path):
        extra = ["--kl-weight", 0.5]
        message = stages.fail("stage1", *argv(folder, tmp_path / "run", *extra), code=5)
        assert "the store has no logits" in message
        assert "Rerun Stage 0 with --store-logits fp16" in message

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
        assert "another --global-batch-size" in message
        assert "expected 4; found 8" in message
        again = ["--store", tmp_path / "again", "--coverage", 0.5]
        stages.succeed("stage0", *inputs(folder), *again)
        extra = [*again[:2], "--allow-other-store"]  # of the same base model
        message = stages.fail("stage1", *argv(folder, tmp_path / "run", *extra), code=2)
        assert "another --store" in message

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
        assert f"{shard}: damaged: " in message
        assert "emove" not in message  # no advice costs a checkpoint


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
    assert "memory per device" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "new").exists()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--no-pack-documents"], 18),
        (["--train-epochs", "2"], 21), ([], 10),
    ],
)  # fmt: skip
def test_a_dry_run_predicts_the_iterations(folder, tmp_path, capsys, flags, expected):
    from megatron_replay import stage1

    flags = [*flags, "--seq-length", 32]  # at which unread tokens fill a pack
    assert stage1.main([*map(str, argv(folder, tmp_path / "run", *flags)), "--dry-run"]) == 0
    [line] = [x.split() for x in capsys.readouterr().out.splitlines() if "iterations" in x]
    stages.succeed("stage1", *argv(folder, tmp_path / "run", *flags))
    assert int(line[-1]) == len(stages.losses(tmp_path / "run")) == expected
