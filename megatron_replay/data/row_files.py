"""Files of rows as streams of lines: plain or compressed by gzip; a pipe, spooled to a file."""

from __future__ import annotations

import gzip
import hashlib
import os
import stat
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron_replay.errors import DataError
from megatron_replay.files import MAX_TEXT_BYTES, open_regular, output_error

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


def is_pipe(path: Path) -> bool:
    """Whether ``path`` can be read once only: ``<(zcat rows.gz)``, a FIFO, ``/dev/stdin``."""
    try:
        return stat.S_ISFIFO(path.stat().st_mode)
    except OSError:
        return False  # whoever opens it says why


@contextmanager
def spooled(path: Path, directory: Path) -> Iterator[tuple[Path, str]]:
    """Copy a pipe to a file without a name in ``directory``: (a path to open it, its SHA-256).

    The file is gone when the block or the process ends, however it ends.

    Raises:
        DataError: the pipe cannot be read.
        OutputError: the file cannot be written.
    """
    digest = hashlib.sha256()
    with _written_in(directory):
        spool: IO[bytes] = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 the next line
    with spool:
        for block in _blocks(path):
            digest.update(block)
            with _written_in(directory):
                spool.write(block)
        with _written_in(directory):
            spool.flush()
        yield Path(f"/proc/self/fd/{spool.fileno()}"), digest.hexdigest()


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
