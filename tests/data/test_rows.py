"""Files of rows: lines are read, or the file is named for what it is."""

from __future__ import annotations

import bz2
import functools
import gzip
import lzma
import os

import pytest

from megatron_replay.data.rows import parse_row, read_lines
from megatron_replay.errors import DataError

FIRST, SECOND = b'{"text": "a"}\n', b'{"text": "\xc3\xa9"}\n'
LINES, MARK = FIRST + SECOND, b"\xef\xbb\xbf"
compressed = functools.partial(gzip.compress, mtime=0)


@pytest.mark.parametrize(
    "content",
    [
        LINES,
        MARK + LINES,
        compressed(LINES),
        compressed(FIRST) + compressed(SECOND),
        compressed(MARK + LINES),
        LINES + b"\n \n\t\n",
    ],
)
def test_a_byte_order_mark_gzip_and_blank_lines_at_the_end_are_read(tmp_path, content):
    path = tmp_path / "rows"  # recognised by its content, not by its name
    path.write_bytes(content)
    assert list(read_lines(path)) == [(f"{path}:1", FIRST), (f"{path}:2", SECOND)]


def test_blank_lines_in_between_keep_their_numbers(tmp_path):
    path = tmp_path / "rows"
    path.write_bytes(b"\n" + FIRST + b"\n\n" + SECOND + b"\n")
    lines = [b"\n", FIRST, b"\n", b"\n", SECOND]
    assert list(read_lines(path)) == [(f"{path}:{n}", line) for n, line in enumerate(lines, 1)]
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
    path.write_bytes(compressed(FIRST + b"x" * 2000))
    with pytest.raises(DataError, match=r"rows.gz:2: .*expected at most 1000 bytes"):
        list(read_lines(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ', r"not JSON: .* \(expected one JSON object per line\)"),
        (b'{"text": "a", "text": "b"}', "the key 'text'"),
        (b'{"text": "a", "meta": {"b": 1, "c": 1, "b": 2}}', "the key 'b'"),
        (b'{"text": "\xff"}', "not JSON: 'utf-8' codec can't decode"),
        (b"\n", "empty line"),
        (b"[1]", r"not a row \(expected one JSON object per line; found a JSON array\)"),
        (b"[\n", r"not a row \(expected one JSON object per line; found a JSON array\)"),
        (b"3", "not a row .*found a number"),
        (b'{"text":' + b"[" * 100_000, "not JSON"),
    ],
)
def test_a_line_that_is_no_row(line, message):
    with pytest.raises(DataError, match=rf"^f:1: {message}"):
        parse_row("f:1", line)
