"""Files that appear whole or not at all, their errors, and the lines of progress."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import signal
from pathlib import Path
from unittest import mock

import pytest

from megatron_replay import progress
from megatron_replay.errors import ConfigError, DataError, OutputError, ReplayError
from megatron_replay.files import (
    atomic_file,
    make_directory,
    open_regular,
    output_error,
    read_json,
    require_apart,
    require_regular,
    sha256_of_files,
    write_json,
)
from megatron_replay.progress import Progress


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_an_error_is_one_line_and_keeps_the_blanks_of_a_path():
    error = ReplayError("broken:\n  twice", where="a  b\nc", found="x  y", fix="Repair\r\nit ")
    assert str(error) == "a  b\\nc: broken: twice (found x  y). Repair it"


@pytest.mark.parametrize("read", [open_regular, require_regular, read_json])
def test_only_regular_files_are_opened(tmp_path, read):
    """A pipe would block, and a device has no end."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "directory").mkdir()
    for name in ("missing", "fifo", "device", "directory"):
        with pytest.raises(DataError, match=f"{tmp_path / name}: cannot read"):
            read(tmp_path / name, DataError)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"1", b"[" * 100_000, b"\x00"])
def test_damaged_json_is_one_line(tmp_path, content):
    path = tmp_path / "it.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path}: damaged.*Write it again$"):
        read_json(path, DataError, fix="Write it again")
    os.truncate(path, 1 << 40)  # sparse: it is not read
    with pytest.raises(DataError, match="too large"):
        read_json(path, DataError)


def test_an_output_that_is_an_input_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "rows")
    with pytest.raises(ConfigError, match="also read, as --input"):
        require_apart(tmp_path / "link", [("--input", tmp_path / "rows")], flag="--output")
    require_apart(tmp_path / "other", [("--input", tmp_path / "rows")], flag="--output")


@pytest.mark.parametrize(("mode", "content"), [("wb", b"new\x00"), ("w", "neu: \u00e4\n")])
def test_content_appears_only_at_the_end(tmp_path, monkeypatch, mode, content):
    """The file is synced before the rename, and its directory after it."""
    path, steps = tmp_path / "file", []
    path.write_bytes(b"old")
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, name=name, call=call: (steps.append(name), call(*a))
        )
    with atomic_file(path, mode) as handle:
        handle.write(content)
        handle.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == (content if mode == "wb" else content.encode("utf-8"))
    assert steps == ["fsync", "replace", "fsync"]
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt("x"), FileNotFoundError("x")])
def test_a_failing_body_leaves_nothing(tmp_path, error):
    """And its error is its own, even where that is the system's: it is no error of writing."""
    (tmp_path / "file").write_bytes(b"old")

    def write_half():
        with atomic_file(tmp_path / "file") as handle:
            handle.write(b"half")
            raise error

    with pytest.raises(type(error), match="x"):
        write_half()
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_failing_steps_are_output_errors(tmp_path, monkeypatch, step, code):
    failing = mock.Mock(side_effect=OSError(code, os.strerror(code)))
    monkeypatch.setattr(os, step, failing)
    expected = os.strerror(code) if code == errno.EIO else "no space left on the device"
    with pytest.raises(OutputError, match=f"file: .*{expected}"):
        write_json(tmp_path / "file", {})
    assert names(tmp_path) == []


@pytest.mark.parametrize("mode", ["w", "wb"])
def test_a_real_write_that_fails_is_an_output_error(tmp_path, mode):
    """The kernel refuses to let a file of this process grow past 4 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OutputError) as caught, atomic_file(tmp_path / "file", mode) as handle:
            handle.writelines(["x" * 1024 if mode == "w" else b"x" * 1024] * 64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert str(caught.value).startswith(f"{tmp_path / 'file'}: cannot write: File too large")
    assert names(tmp_path) == []


def test_output_errors_name_the_file_and_the_cause(tmp_path, monkeypatch):
    with pytest.raises(OutputError) as missing, atomic_file(tmp_path / "no" / "file"):
        pass
    assert str(missing.value).startswith(f"{tmp_path}/no/file: cannot write: No such file or ")
    assert str(output_error("x", OSError("odd"))).startswith("x: cannot write: odd.")
    made = make_directory(tmp_path / "a" / "b")
    assert made.is_dir()
    assert make_directory(str(made)) == made
    assert names(made) == []
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match=r"file.*: cannot write"):
            make_directory(path)
    refusal = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(Path, "touch", mock.Mock(side_effect=refusal))
    with pytest.raises(OutputError, match="cannot write: Permission denied"):
        make_directory(tmp_path)


def test_write_json_is_sorted_and_whole(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"b": 1, "a": [2]})
    text = path.read_text()
    assert list(json.loads(text).items()) == [("a", [2]), ("b", 1)]
    with pytest.raises(TypeError):
        write_json(path, {"c": object()})
    assert path.read_text() == text
    assert names(tmp_path) == ["x.json"]


def test_sha256_depends_on_names_cuts_and_contents_not_on_order(tmp_path):
    def digest(**contents):
        paths = [tmp_path / name for name in contents]
        for path in paths:
            path.write_bytes(contents[path.name])
        assert sha256_of_files(paths) == sha256_of_files(paths[::-1])
        return sha256_of_files(paths)

    variants = [
        digest(a=b"12", b=b"3"),
        digest(a=b"1", b=b"23"),  # the same bytes in a row, cut elsewhere
        digest(a=b"12", c=b"3"),
        digest(a=b"12", b=b"4"),
        digest(a=b"12"),
    ]
    assert len(set(variants)) == len(variants)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """``clock[0]`` is the time; only the test moves it."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_ten_seconds_and_at_the_end(clock):
    stream = io.StringIO()
    with Progress("collect", 400, "documents", stream=stream, initial=100) as bar:
        clock[0] += 9.9
        bar.advance(99)
        assert stream.getvalue() == ""
        clock[0] += 0.1
        bar.advance(1, "loss 1.25")
        assert stream.getvalue() == (
            "collect: 200/400 documents (50 %), 10.0/s, elapsed 00:10, ETA 00:20, loss 1.25\n"
        )
        clock[0] += 9.9
        bar.advance(100)  # the interval counts from the line before
        assert stream.getvalue().count("\n") == 1
        bar.advance(100)
        assert stream.getvalue().splitlines()[-1].startswith("collect: 400/400 documents (100 %)")


@pytest.mark.parametrize(
    ("total", "initial", "seconds", "done", "expected"),
    [
        (8, 0, 3, 0, "0/8 steps (0 %), 0.000/s, elapsed 00:03, ETA ?"),
        (8, 0, 3700, 1, "1/8 steps (12 %), 0.000/s, elapsed 1:01:40, ETA 7:11:40"),
        (8, 0, 100, 4, "4/8 steps (50 %), 0.040/s, elapsed 01:40, ETA 01:40"),
        (8, 0, 4, 8, "8/8 steps (100 %), 2.0/s, elapsed 00:04, ETA 00:00"),
        (8, 0, 1, 9, "9/8 steps (112 %), 9.0/s, elapsed 00:01, ETA 00:00"),
        (5, 5, 1, 0, "5/5 steps (100 %), 0.000/s, elapsed 00:01, ETA 00:00"),
        (0, 0, 1, 0, "0/0 steps (100 %), 0.000/s, elapsed 00:01, ETA 00:00"),
    ],
)
def test_rates_and_times(clock, total, initial, seconds, done, expected):
    bar = Progress("train", total, "steps", initial=initial, stream=io.StringIO())
    clock[0] += seconds
    bar.advance(done)
    assert bar.line() == f"train: {expected}"


@pytest.mark.parametrize("enabled", [True, False])
def test_a_bar_on_a_terminal_is_closed_also_when_the_work_fails(enabled):
    """So that the prompt starts on its own line."""
    terminal = Terminal()
    bar = Progress("read", 4, "rows", stream=terminal, initial=1, enabled=enabled)

    def work():
        with bar:
            bar.advance(3, "loss 2.0")
            raise ValueError("work")

    with pytest.raises(ValueError, match="work"):
        work()
    assert bar.done == 4
    text = terminal.getvalue()
    assert all((part in text) is enabled for part in ("\r", "read: 100%", "4/4", "rows"))
    assert text.endswith("\n" if enabled else "")
