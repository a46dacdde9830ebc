"""Files of rows as streams of lines: plain or compressed by gzip; a pipe, spooled to a file."""

from __future__ import annotations

import gzip
import hashlib
import os
import stat
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_replay.errors import DataError
from megatron_replay.files import MAX_TEXT_BYTES, make_directory, open_regular, output_error

_GZIP = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"
#: First bytes of files that people take for rows.
_OTHERS = {
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"PK\x03\x04": "a zip file",
    b"BZh": "a file compressed by bzip2",
    b"\xfd7zXZ": "a file compressed by xz",
    b"\x28\xb5\x2f\xfd": "a file compressed by zstd",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}


@contextmanager
def open_rows(path: str | os.PathLike[str], name: str) -> Iterator[Iterator[bytes]]:
    """Open a regular file of text and give its lines, without a byte order mark.

    Args:
        name: shown in errors.

    Raises:
        DataError: it cannot be read, or is of a known other kind.
    """
    with open_regular(path, DataError) as raw:
        try:
            is_gzip = raw.read(2) == _GZIP
            raw.seek(0)
            handle = gzip.GzipFile(fileobj=raw) if is_gzip else raw
            start = handle.read(8)
            for magic, kind in _OTHERS.items():
                if start.startswith(magic):
                    raise DataError(
                        "not lines of JSON",
                        where=name,
                        expected="one JSON object per line, as text or compressed by gzip",
                        found=kind,
                        fix="Unpack it, or write its rows as JSON lines",
                    )
            handle.seek(len(_BOM) if start.startswith(_BOM) else 0)
            yield _lines(handle, name)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"cannot read: {error}", where=name) from error


def _lines(handle: Any, name: str) -> Iterator[bytes]:
    number = 0
    while line := handle.readline(MAX_TEXT_BYTES + 1):
        number += 1
        if len(line) > MAX_TEXT_BYTES:
            raise DataError(
                "the line is too long",
                where=f"{name}:{number}",
                expected=f"at most {MAX_TEXT_BYTES} bytes",
            )
        yield line


@dataclass(frozen=True)
class Input:
    """A file of rows.

    Attributes:
        path: where it is read.
        shown: what the user calls it.
        sha256: of a pipe, which is read from a copy; None for a file.
    """

    path: Path
    shown: str
    sha256: str | None = None


@contextmanager
def readable_often(path: Path, directory: Path) -> Iterator[Input]:
    """``path``; or a copy of it, where it is a pipe: ``<(zcat rows.gz)``, a FIFO, ``/dev/stdin``.

    The copy is a file without a name in ``directory``. It is gone when the block or the process
    ends, however it ends.

    Raises:
        DataError: the pipe cannot be read.
        OutputError: the copy cannot be written.
    """
    try:
        is_pipe = stat.S_ISFIFO(path.stat().st_mode)
    except OSError:
        is_pipe = False  # whoever opens it says why
    if not is_pipe:
        yield Input(path, str(path))
        return
    print(f"{path}: a pipe, copied until it ends", file=sys.stderr)
    digest = hashlib.sha256()
    make_directory(directory)
    with _written_in(directory):
        spool: IO[bytes] = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 the next line
    with spool:
        for block in _blocks(path):
            digest.update(block)
            with _written_in(directory):
                spool.write(block)
        with _written_in(directory):
            spool.flush()
        yield Input(Path(f"/proc/self/fd/{spool.fileno()}"), str(path), digest.hexdigest())


def _blocks(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb") as pipe:
            while block := pipe.read(1 << 20):
                yield block
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror or error}", where=path) from error


@contextmanager
def _written_in(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise output_error(directory, error) from error
