"""Flags, YAML, and the checks of the configuration tree."""

from __future__ import annotations

import os

import pytest
import yaml

from megatron_replay import flags
from megatron_replay.config import Stage0Config, Stage1Config
from megatron_replay.errors import ConfigError

STAGE1 = ["--load", "m", "--data-path", "d", "--store", "t", "--save", "s", "--lr", "1e-3"]
STAGE0 = ["--load", "m", "--data-path", "d", "--store", "t"]


def parse(argv, root=Stage1Config):
    return flags.parse(root, argv, program="stage1").config


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {load: m}\ndata: {data_path: d, seq_length: 128}\n"
        "loss: {store: t}\ntraining: {save: s}\noptimizer: {lr: 1e-5, max_angle: 60}\n"
    )
    config = parse(["--config", str(file), "--seq-length", "256"])
    assert config.data.seq_length == 256  # flag
    assert config.optimizer.lr == 1e-5  # file; YAML reads it as a string
    assert config.optimizer.max_angle == 60.0
    assert config.data.micro_batch_size == 1  # default


def test_printed_configuration_reads_back_equal(tmp_path):
    config = parse([*STAGE1, "--sequence-parallel", "--tensor-model-parallel-size", "2"])
    file = tmp_path / "resolved.yaml"
    file.write_text(flags.to_yaml(config))
    assert parse(["--config", str(file)]) == config
    assert yaml.safe_load(flags.to_yaml(config))["parallel"]["sequence_parallel"] is True


def test_boolean_flags_can_be_negated():
    assert parse([*STAGE1, "--bf16", "--no-bf16"]).model.bf16 is False


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--leorning-rate", "1"], "unknown flag --leorning-rate"),
        (["--micro-batchsize", "1"], "did you mean --micro-batch-size?"),
        (["--obtuse", "flat"], "--obtuse: unusable value (expected one of line, zero"),
        (["--lr", "fast"], "--lr"),
        (["--lr", "0"], "--lr: unusable value (expected a number above 0; found 0.0)"),
        (["--max-angle", "91"], "--max-angle"),
        (["--min-lr", "1"], "--min-lr: unusable value (expected 0 to --lr"),
        (
            ["--loss", "full", "--tail", "ghost"],
            "--tail: unusable value (expected none, as only --loss",
        ),
        (
            ["--loss", "full", "--kl-weight", "1"],
            "--kl-weight: unusable value (expected 0.0, as only",
        ),
        (["--exit-interval", "0"], "--exit-interval: unusable value (expected a number above 0"),
        (["--lr", "inf"], "--lr: unusable value (expected a finite number; found inf)"),
        (["--lr", "1e30"], "--lr: unusable value (expected a number above 0, at most 1; found"),
        (["--lr", "nan"], "--lr: unusable value"),
        (["--weight-decay", "inf"], "--weight-decay: unusable value (expected a finite number"),
        (["--distributed-timeout-minutes", "1e300"], "expected a number up to 1e30; found 1e+300"),
        (["--distributed-timeout-minutes", "1e-12"], "expected 0.01 to 10,080; found 1e-12"),
        (["--weight-decay", "1e30"], "--weight-decay: unusable value (expected at most 1 / --lr;"),
        (["--weight-decay", "1e300"], "--weight-decay: unusable value (expected a number up to"),
        (["--seq-length", "1000000000"], "--seq-length: unusable value (expected 1 to 4,194,304"),
        (["--micro-batch-size", "9" * 30], "--micro-batch-size: unusable value (expected a number"),
        (["--save", ""], "--save: unusable value (expected a text that is not empty"),
        (["--train-iters", "5", "--train-epochs", "2"], "--train-epochs: unusable value (expected"),
        (
            ["--mofo-fraction", "0.5"],
            "--mofo-fraction: unusable value (expected 0.2, as only --optimizer mofo",
        ),
        (["--min-lr", "1e-4", "--lr-decay-style", "constant"], "as only --lr-decay-style cosine"),
        (
            ["--probe-interval", "0", "--general-data-path", "g"],
            "--general-data-path: unusable value (expected None, as only --probe-interval uses",
        ),
        (["--probe-interval", "0", "--probe-documents", "9"], "as only --probe-interval uses it"),
        (["--loss", "full", "--probe-interval", "0"], "--store: unusable value (expected no store"),
        (["--print-config", "--dry-run"], "not allowed with argument"),
        (["--loss", "full", "--head-backend", "cpu"], "--head-backend: unusable value"),
        (["--optimizer", "adamw", "--max-angle", "30"], "--max-angle: unusable value (expected 45"),
        (["--optimizer", "sgd"], "expected one of moclip, adamw, mofo, tam, adamuon, muonclip"),
        (["--angle-scope", "tensor", "--obtuse", "zero"], "--obtuse"),
        (
            ["--sequence-parallel", "--tensor-model-parallel-size", "3"],
            "--seq-length: unusable value (expected a multiple of --tensor-model-parallel-size 3",
        ),
        (["--kl-weight", "-1"], "--kl-weight: unusable value (expected a "),
        (["--kl-weight", "inf"], "--kl-weight: unusable value (expected a "),
        (["--sequence-parallel"], "--tensor-model-parallel-size above 1"),
        (["--global-batch-size", "5", "--micro-batch-size", "2"], "a multiple of --micro-batch"),
    ],
)
def test_a_mistake_gives_one_line(argv, message):
    with pytest.raises(ConfigError) as error:
        parse([*STAGE1, *argv])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_flag_is_named():
    with pytest.raises(ConfigError, match="--load is required"):
        parse(STAGE1[2:])
    with pytest.raises(ConfigError, match=r"--store: unusable value .expected a store"):
        parse([flag for flag in STAGE1 if flag not in ("--store", "t")])
    with pytest.raises(ConfigError, match=r"--probe-documents: .* or --general-data-path uses it"):
        parse([*STAGE1[:4], *STAGE1[6:], "--loss", "full", "--probe-documents", "9"])


@pytest.mark.parametrize(
    "argv",
    [
        "--coverage 0",
        "--coverage 1.5",
        "--max-candidates 256",
        "--seed -1",
        "--last-n 9",
        "--seed 9 --position-strategy all",
        "--position-fraction 0.9 --position-strategy all",
    ],
)
def test_a_mistake_of_stage_0_names_its_flag(argv):
    """A value out of range, or one that nothing would use."""
    with pytest.raises(ConfigError, match=f"{argv.split()[0]}: unusable value .expected .*; found"):
        parse([*STAGE0, *argv.split()], Stage0Config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimiser: {lr: 1}", "unknown section 'optimiser'; did you mean optimizer?"),
        ("optimizer: {learning_rate: 1}", "unknown key 'learning_rate' under 'optimizer'"),
        ("optimizer: {max_angel: 1}", "did you mean max_angle?"),
        ("seq_length: 5", "unknown section 'seq_length'; it belongs under data:"),
        ("data: {seq_length: 4.5}", "data.seq_length: unusable value (expected int; found 4.5)"),
        ("data: [1]", "section 'data' is not a mapping"),
        ("data: {seq", "not YAML"),
        ("data: {seq_length: null}", "data.seq_length: unusable value (expected int; found None"),
        ("data: null", "section 'data' is not a mapping"),
        ("3", "not a mapping of sections"),
        ("[" * 100_000, "not YAML"),
        ("data: {seq_length: 8, seq_length: 9}", "the key 'seq_length' is there twice"),
        ("data: {seq_length: 8}\ndata: {bf16: true}", "the key 'data' is there twice"),
        ("data: &a {seq_length: *a}", "data.seq_length: unusable value (expected int"),
        ("data: {seq_length: " + "9" * 5000 + "}", "not YAML"),
    ],
)
def test_a_mistake_in_the_file_gives_one_line(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        parse(["--config", str(file), *STAGE1])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_null_is_the_default_of_what_may_be_left_out(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("training: {train_iters: null}\nprobe: {general_data_path: null}\n")
    assert parse(["--config", str(file), *STAGE1]) == parse(STAGE1)


def test_a_merge_key_is_read(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("data: &a {seq_length: 8}\nprobe: {<<: {probe_interval: 7}}\n")
    assert parse(["--config", str(file), *STAGE1]).probe.probe_interval == 7


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match=str(path)):
            parse(["--config", str(path), *STAGE1])
