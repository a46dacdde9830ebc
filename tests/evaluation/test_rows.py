"""rows.jsonl: what a row says of its run, kills in the middle of a line, mistakes by line."""

from __future__ import annotations

import fcntl
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_replay.errors import ConfigError, DataError, OutputError
from megatron_replay.evaluation import json_lines
from megatron_replay.evaluation.rows import (
    append_row,
    base_row,
    configuration_hash,
    read_rows,
    row_of_run,
)

CONFIG: dict[str, dict[str, Any]] = {
    "loss": {"loss": "restricted", "candidate_scope": "document", "tail": "ghost", "kl_weight": 0},
    "optimizer": {"optimizer": "moclip", "lr": 2e-4, "lr_warmup_iters": 1},
    "training": {"seed": 3, "save": "runs/a", "tensorboard_dir": None, "global_batch_size": 16},
}
ENTRY = {"name": "m", "sql": {"shop": {"accuracy": 0.5}}}


def run_directory(path: Path) -> Path:
    path.mkdir()
    (path / "resolved_config.yaml").write_text(yaml.safe_dump(CONFIG))
    step = {"loss": 1.0, "grad_norm": 1.0, "tokens": 10, "seconds": 0.5}
    lines = [{"iteration": i, **step} for i in range(1, 21)]
    for at, mass in ((20, 0.07), (10, 0.5)):
        lines.insert(at, {"iteration": at, "probe": {"outside_mass": mass}})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def make_row(run: Path, **more: Any) -> Any:
    given = {"method": "ours", "tables": ["methods"], "seed": 3, "command": "python train"}
    return row_of_run(run, ENTRY, **(given | more))


def test_a_row_says_what_was_run(tmp_path: Path) -> None:
    row = make_row(run_directory(tmp_path / "run"), stage0_seconds=4.5, base="small", size="1M")
    assert (row.lr, row.optimizer, row.loss) == (2e-4, "moclip", "restricted document ghost")
    assert row.run is not None
    assert (row.run["outside_mass"], row.run["seconds"], row.run["iterations"]) == (0.07, 10.0, 20)
    assert "probes" not in row.run
    rows = tmp_path / "rows.jsonl"
    base = base_row(ENTRY, base="small", size="1M", command="python evaluate")
    append_row(rows, base)
    append_row(rows, row)
    assert read_rows(rows) == [base, row]
    assert base.is_base
    assert not row.is_base


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        ({"loss": "full", "candidate_scope": "document", "tail": "ghost"}, "full"),
        ({"loss": "restricted"}, "restricted"),
        (
            {"loss": "restricted", "tail": "sampled", "tail_samples": 64, "full_loss_every": 4},
            "restricted sampled 64 full every 4",
        ),
        (
            {"loss": "restricted", "candidate_scope": "tile", "kl_weight": 0.5},
            "restricted tile KL 0.5",
        ),
    ],
)
def test_a_loss_is_named_by_what_is_not_default(
    tmp_path: Path, loss: dict[str, Any], name: str
) -> None:
    run = run_directory(tmp_path / "run")
    (run / "resolved_config.yaml").write_text(yaml.safe_dump({**CONFIG, "loss": loss}))
    assert make_row(run).loss == name


def test_the_hash_is_of_the_settings_alone() -> None:
    training = CONFIG["training"]
    moved = {**CONFIG, "training": {**training, "seed": 4, "save": "x", "tensorboard_dir": "y"}}
    backwards = {name: dict(reversed(CONFIG[name].items())) for name in reversed(CONFIG)}
    assert configuration_hash(moved) == configuration_hash(backwards) == configuration_hash(CONFIG)
    for section, name in (("training", "global_batch_size"), ("optimizer", "lr"), ("loss", "tail")):
        changed = {**CONFIG, section: {**CONFIG[section], name: 1}}
        assert configuration_hash(changed) != configuration_hash(CONFIG)


def test_a_torn_line_is_dropped_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut anywhere, a line is gone whole, the others stay, and the next append mends the file."""
    row, rows = make_row(run_directory(tmp_path / "run")), tmp_path / "rows.jsonl"
    append_row(rows, row)
    line = rows.read_bytes()
    for cut in (1, 20, len(line) // 2, len(line) - 2):
        rows.write_bytes(line[:cut])  # the first of all
        append_row(rows, row)
        assert "dropped its last line" in capsys.readouterr().err
        assert rows.read_bytes() == line
        rows.write_bytes(line + line[:cut])
        assert read_rows(rows) == [row]
        assert "dropped its last line" in capsys.readouterr().err
        append_row(rows, row)
        assert "dropped its last line" in capsys.readouterr().err
        assert rows.read_bytes() == 2 * line
    rows.write_bytes(line[:-1])  # whole but for its newline: written by an editor
    assert read_rows(rows) == [row]
    append_row(rows, row)
    assert rows.read_bytes() == 2 * line
    assert capsys.readouterr().err == ""


def test_writers_take_turns(tmp_path: Path) -> None:
    """An flock keeps open files apart, whichever process opened them: threads do as well."""
    row, rows = make_row(run_directory(tmp_path / "run"), command="c" * 50_000), tmp_path / "rows"
    with ThreadPoolExecutor(3) as writers:
        list(writers.map(lambda _: append_row(rows, row), range(30)))
    assert read_rows(rows) == 30 * [row]


def test_a_lock_that_is_never_released_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, rows = make_row(run_directory(tmp_path / "run")), tmp_path / "rows.jsonl"
    append_row(rows, row)
    monkeypatch.setattr(json_lines, "LOCK_SECONDS", 0.02)
    with rows.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match=r"rows\.jsonl: another process has kept this file"):
            append_row(rows, row)
    append_row(rows, row)
    assert read_rows(rows) == [row, row]


def test_appending_reads_the_ends_of_the_file_only(tmp_path: Path) -> None:
    """Of a file of 64 GiB, most of it a hole: were it read whole, this would take minutes."""
    row, rows = make_row(run_directory(tmp_path / "run")), tmp_path / "rows.jsonl"
    append_row(rows, row)
    line = rows.read_bytes()
    try:
        with rows.open("r+b") as handle:
            handle.truncate(1 << 36)
            handle.seek(0, os.SEEK_END)
            handle.write(b"\n" + line + line[:100])
        append_row(rows, row)
        with rows.open("rb") as handle:
            handle.seek((1 << 36) + 1)
            assert handle.read() == 2 * line
    finally:
        rows.unlink()


@pytest.mark.parametrize(
    "content", [b"notes\n", b"\n\n{}", b'{"prompt": "a"}\n', b"[1]", b"\xff\n", b'{"format": 1}\n']
)
def test_rows_are_appended_to_nothing_else(tmp_path: Path, content: bytes) -> None:
    row, rows = make_row(run_directory(tmp_path / "run")), tmp_path / "mine"
    rows.write_bytes(content)
    with pytest.raises(OutputError, match=r"mine: this file holds something else than rows"):
        append_row(rows, row)
    assert rows.read_bytes() == content


def test_rows_are_appended_to_regular_files(tmp_path: Path) -> None:
    row = make_row(run_directory(tmp_path / "run"))
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null"), tmp_path):
        with pytest.raises(OutputError, match=f"{path}: cannot (append|write)"):
            append_row(path, row)
    with pytest.raises(DataError, match="found a pipe"):
        read_rows(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": True}, "'seed' is of another type"),
        ({"evaluation": None}, "'evaluation' is of another type (expected dict; found null)"),
        ({"format": 2}, 'not a row (expected an object with "format": 1)'),
        ({"extra": 1}, "unknown field 'extra'"),
        ({"tables": ["table 1"]}, "no such table"),
        ({"evaluation": {"sql": {"shop": {}}}}, "evaluation: sql: shop: 'accuracy' is missing"),
        ({"evaluation": {"general": 3}}, "evaluation: general: not an object"),
        ({"run": {"loss_std": "x"}}, "run: 'loss_std' is of another type"),
        ({"run": {"iterations": 0}}, "run: a run without a step"),
        ({"lr": None}, "a run without a learning rate"),
        ({"lr": 10**400}, "'lr' is of another type"),
    ],
)
def test_a_mistake_names_the_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    row, rows = make_row(run_directory(tmp_path / "run")), tmp_path / "rows.jsonl"
    append_row(rows, row)
    with rows.open("a") as handle:
        handle.write(json.dumps({"format": 1, **asdict(row), **change}) + "\n")
    with pytest.raises(DataError) as caught:
        read_rows(rows)
    assert str(caught.value).startswith(f"{rows}:2: ")
    assert message in str(caught.value)


def test_what_cannot_be_a_row(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run")
    with pytest.raises(ConfigError, match="no such table"):
        make_row(run, tables=["table 1"])
    (tmp_path / "empty").touch()
    with pytest.raises(DataError, match="no rows"):
        read_rows(tmp_path / "empty")
    with pytest.raises(DataError, match="cannot read"):
        read_rows(tmp_path / "none")
    config = {name: dict(section) for name, section in CONFIG.items()}
    del config["optimizer"]["lr"]
    (run / "resolved_config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(DataError, match="not a resolved configuration: KeyError"):
        make_row(run)
