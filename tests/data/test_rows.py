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
    ("content", "lines"),
    [
        (LINES, [FIRST, SECOND]),
        (MARK + LINES, [FIRST, SECOND]),
        (compressed(LINES), [FIRST, SECOND]),
        (compressed(FIRST) + compressed(SECOND), [FIRST, SECOND]),
        (compressed(MARK + LINES), [FIRST, SECOND]),
        (LINES + b"\n \n\t\n", [FIRST, SECOND]),
        # Blank lines in between keep their numbers.
        (b"\n" + FIRST + b"\n\n" + SECOND + b"\n", [b"\n", FIRST, b"\n", b"\n", SECOND]),
        (b"", []),
    ],
)
def test_a_byte_order_mark_gzip_and_blank_lines(tmp_path, content, lines):
    path = tmp_path / "rows"  # recognised by its content, not by its name
    path.write_bytes(content)
    assert list(read_lines(path)) == [(f"{path}:{n}", line) for n, line in enumerate(lines, 1)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PAR1" + bytes(99), "found a Parquet file"),
        (b"ARROW1\0\0", "found an Arrow file"),
        (b"PK\x03\x04" + bytes(99), "found a zip file"),
        (bz2.compress(LINES), "found a file compressed by bzip2"),
        (lzma.compress(LINES), "found a file compressed by xz"),
        (b"\x28\xb5\x2f\xfd" + bytes(9), "found a file compressed by zstd"),
        (LINES.decode().encode("utf-16"), "found text in UTF-16"),
        (compressed(b"PAR1" + bytes(99)), "found a Parquet file"),
        (compressed(LINES)[:-9], "cannot read: "),
        (compressed(LINES)[:20], "cannot read: "),
        (compressed(LINES)[:2], "cannot read: "),
    ],
)
def test_other_files_are_named_and_damage_is_one_line(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"rows.jsonl: .*{message}") as caught:
        list(read_lines(path))
    assert ("one JSON object per line, " in str(caught.value)) == message.startswith("found")


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
