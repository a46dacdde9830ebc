"""Files of rows that are not plain JSON lines: read, or named for what they are."""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import hashlib
import lzma
import os
from pathlib import Path

import pytest

from megatron_replay.data.rows import Input, read_lines, readable_often
from megatron_replay.errors import DataError, OutputError

LINES = b'{"text": "a"}\n{"text": "\xc3\xa9"}\n'
compressed = functools.partial(gzip.compress, mtime=0)
READ = [b'{"text": "a"}\n', b'{"text": "\xc3\xa9"}\n']


@pytest.mark.parametrize(
    "content",
    [
        LINES,
        b"\xef\xbb\xbf" + LINES,
        compressed(LINES),
        compressed(LINES[:14]) + compressed(LINES[14:]),
        compressed(b"\xef\xbb\xbf" + LINES),
        LINES + b"\n \n\t\n",
    ],
)
def test_a_byte_order_mark_gzip_and_blank_lines_at_the_end_are_read(tmp_path, content):
    path = tmp_path / "rows"  # known by its content, not by its name
    path.write_bytes(content)
    assert list(read_lines(path)) == [(f"{path}:1", READ[0]), (f"{path}:2", READ[1])]


def test_blank_lines_in_between_keep_their_numbers(tmp_path):
    path = tmp_path / "rows"
    path.write_bytes(b"\n" + READ[0] + b"\n\n" + READ[1] + b"\n")
    assert list(read_lines(path, "shown")) == [
        ("shown:1", b"\n"), ("shown:2", READ[0]), ("shown:3", b"\n"), ("shown:4", b"\n"),
        ("shown:5", READ[1]),
    ]  # fmt: skip
    path.write_bytes(b"")
    assert list(read_lines(path)) == []


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"PAR1" + bytes(99), "a Parquet file"),
        (b"ARROW1\0\0", "an Arrow file"),
        (b"PK\x03\x04" + bytes(99), "a zip file"),
        (bz2.compress(LINES), "a file compressed by bzip2"),
        (lzma.compress(LINES), "a file compressed by xz"),
        (b"\x28\xb5\x2f\xfd" + bytes(9), "a file compressed by zstd"),
        (LINES.decode().encode("utf-16"), "text in UTF-16"),
        (compressed(b"PAR1" + bytes(99)), "a Parquet file"),
    ],
)
def test_other_files_are_named(tmp_path, content, kind):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"one JSON object per line, .*found {kind}"):
        list(read_lines(path))


@pytest.mark.parametrize("damage", [slice(0, -9), slice(0, 20), slice(0, 2)])
def test_damaged_gzip_is_one_line(tmp_path, damage):
    path = tmp_path / "rows.gz"
    path.write_bytes(compressed(LINES)[damage])
    with pytest.raises(DataError, match=r"rows.gz: cannot read: "):
        list(read_lines(path))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_neither_waited_for_nor_read(tmp_path, make):
    make(tmp_path / "rows")
    with pytest.raises(DataError, match=r"rows: cannot read \(expected a regular file"):
        list(read_lines(tmp_path / "rows"))


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_replay.data.rows.MAX_TEXT_BYTES", 1000)
    path = tmp_path / "rows.gz"
    path.write_bytes(compressed(READ[0] + b"x" * 2000))
    with pytest.raises(DataError, match=r"rows.gz:2: the line is too long"):
        list(read_lines(path))


@contextlib.contextmanager
def piped(content):
    """The path of a pipe that holds ``content``, as ``<(cat FILE)`` gives one."""
    reader, writer = os.pipe()
    os.write(writer, content)
    os.close(writer)
    try:
        yield Path(f"/dev/fd/{reader}")
    finally:
        os.close(reader)


def test_a_pipe_is_copied_to_a_file_without_a_name(tmp_path):
    with piped(LINES * 1000) as pipe, readable_often(pipe, tmp_path) as copy:
        assert copy.shown == str(pipe)
        assert [line for _, line in read_lines(copy.path)] == READ * 1000
        assert len(list(read_lines(copy.path))) == 2000  # again
        assert copy.sha256 == hashlib.sha256(LINES * 1000).hexdigest()
        assert list(tmp_path.iterdir()) == []
    for path in (tmp_path, tmp_path / "nothing"):
        with readable_often(path, tmp_path) as same:
            assert same == Input(path, str(path))
    nowhere = Path("/proc/nowhere")
    with piped(LINES) as pipe, pytest.raises(OutputError), readable_often(pipe, nowhere):
        pass
