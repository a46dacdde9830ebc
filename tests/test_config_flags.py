"""Flags, YAML, and the checks of the configuration tree."""

from __future__ import annotations

import os

import pytest
import yaml

from megatron_replay import flags
from megatron_replay.config import Stage0Config, Stage1Config
from megatron_replay.errors import ConfigError

STAGE0 = "--load m --data-path d --store t"
STAGE1 = f"{STAGE0} --save s --lr 1e-3"


def parse(argv, root=Stage1Config):
    argv = argv.split(" ") if isinstance(argv, str) else argv
    return flags.parse(root, argv, program="stage1").config


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {load: m}\ndata: &data {data_path: d, seq_length: 128}\nloss: {store: t}\n"
        "training: {save: s, train_iters: null}\noptimizer: {lr: 1e-5, max_angle: 60}\n"
        "probe: {<<: {probe_interval: 7}, general_data_path: null}"
    )
    config = parse(f"--config {file} --seq-length 256 --bf16 --no-bf16")
    assert config.data.seq_length == 256  # flag
    assert config.model.bf16 is False
    assert config.optimizer.lr == 1e-5  # file; YAML reads it as a string
    assert config.optimizer.max_angle == 60.0
    assert config.probe.probe_interval == 7
    assert config.data.micro_batch_size == 1  # default; so is the null of what may be left out
    assert config.training.train_iters is config.probe.general_data_path is None


def test_printed_configuration_reads_back_equal(tmp_path):
    config = parse(f"{STAGE1} --sequence-parallel --tensor-model-parallel-size 2")
    file = tmp_path / "resolved.yaml"
    file.write_text(flags.to_yaml(config))
    assert parse(f"--config {file}") == config
    assert yaml.safe_load(flags.to_yaml(config))["parallel"]["sequence_parallel"] is True


#: Flags, and what the line of error has. A value in it is one that nothing would use, too.
MISTAKES = [
    ("--leorning-rate 1", "unknown flag --leorning-rate"),
    ("--micro-batchsize 1", "did you mean --micro-batch-size?"),
    ("--lr fast", "--lr"),
    ("--print-config --dry-run", "not allowed with argument"),
    *(
        (argv, f"{argv.split()[0]}: unusable value (expected {expected}")
        for argv, expected in (
            ("--obtuse flat", "one of line, zero; found 'flat')"),
            ("--optimizer sgd", "one of moclip, adamw, mofo, tam, adamuon, muonclip; found"),
            ("--lr 0", "a number above 0, at most 1; found 0.0)"),
            ("--lr 1e30", "a number above 0, at most 1; found 1e+30)"),
            ("--lr inf", "a finite number; found inf)"),
            ("--lr nan", "a finite number; found nan)"),
            ("--max-angle 91", "a number above 0, at most 90; found 91.0)"),
            ("--min-lr 1", "0 to --lr; found 1.0)"),
            ("--adam-beta2 1", "a number from 0, below 1; found 1.0)"),
            ("--exit-interval 0", "a number from 1; found 0)"),
            ("--weight-decay 1e30", "at most 1 / --lr; found 1e+30)"),
            ("--weight-decay 1e300", "a number up to 1e30; found 1e+300)"),
            ("--distributed-timeout-minutes 1e-12", "a number from 0.01, at most 10080; found"),
            ("--tensor-model-parallel-size 0", "a number from 1; found 0)"),
            ("--seq-length 1000000000", "a number from 1, at most 4194304; found 1000000000)"),
            ("--micro-batch-size " + "9" * 30, "a number below 2^53; found"),
            ("--save ", "a text that is not empty; found ''"),
            ("--kl-weight -1", "a number from 0; found -1.0)"),
            ("--train-epochs 2 --train-iters 5", "no value together with --train-iters"),
            ("--tail ghost --loss full", "none, as only --loss restricted uses it; found"),
            ("--head-backend cpu --loss full", "auto, as only --loss restricted uses it"),
            ("--store t --loss full --probe-interval 0", "no store with --loss full and"),
            ("--mofo-fraction 0.5", "0.2, as only --optimizer mofo uses it; found 0.5)"),
            ("--max-angle 30 --optimizer adamw", "45.0, as only --optimizer moclip uses it"),
            ("--min-lr 1e-4 --lr-decay-style constant", "0.0, as only --lr-decay-style cosine or"),
            ("--obtuse zero --angle-scope tensor", "line: zero counts obtuse steps"),
            ("--general-data-path g --probe-interval 0", "None, as only --probe-interval uses it"),
            ("--probe-documents 9 --probe-interval 0", "64, as only --probe-interval uses it"),
            ("--sequence-parallel", "False, as only --tensor-model-parallel-size above 1 uses it"),
            ("--group-prefixes 0", "a number from 1; found 0)"),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "message"), MISTAKES)
def test_a_mistake_gives_one_line(argv, message):
    with pytest.raises(ConfigError) as error:
        parse(f"{STAGE1} {argv}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_flag_is_named():
    for left_out, message in (
        ("--load m ", "--load is required"),
        ("--store t ", "--store: --loss restricted, the default, reads the candidates of a store"),
    ):
        with pytest.raises(ConfigError) as error:
            parse(STAGE1.replace(left_out, ""))
        assert message in str(error.value)
    with pytest.raises(ConfigError, match=r"--probe-documents: .* or --general-data-path uses it"):
        parse(STAGE1.replace("--store t ", "") + " --loss full --probe-documents 9")


@pytest.mark.parametrize(
    "argv",
    [
        "--coverage 0", "--coverage 1.5", "--max-candidates 256", "--seed -1", "--last-n 9",
        "--seed 9 --position-strategy all", "--position-fraction 0.9 --position-strategy all",
        "--sequence-parallel", "--documents-per-shard 0",
    ],
)  # fmt: skip
def test_a_mistake_of_stage_0_names_its_flag(argv):
    """A value out of range, or one that nothing would use."""
    with pytest.raises(ConfigError, match=f"{argv.split()[0]}: unusable value .expected .*; found"):
        parse(f"{STAGE0} {argv}", Stage0Config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimiser: {lr: 1}", "unknown section 'optimiser' (did you mean optimizer?)"),
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
        parse(f"--config {file} {STAGE1}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match=str(path)):
            parse(f"--config {path} {STAGE1}")
