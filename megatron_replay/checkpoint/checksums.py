"""``checksums.json``: size and crc32 of each other file of an iteration, checked before loading.

torch would load a file with a flipped bit, which may change a weight slightly or by 10^30.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from pathlib import Path

from megatron_replay.errors import CheckpointError
from megatron_replay.files import open_regular, read_json, write_json
from megatron_replay.parallel import Parallel

FILE = "checksums.json"
_BLOCK = 1 << 22


def write_checksums(directory: Path, known: Mapping[str, tuple[int, int]]) -> None:
    """Write the sums of all files in ``directory``.

    Args:
        known: (bytes, crc32) by name, computed while writing; the other files are read again.
    """
    names = sorted(path.name for path in directory.iterdir() if path.name != FILE)
    sums = {name: known.get(name) or _read(directory / name) for name in names}
    files = {name: {"bytes": size, "crc32": crc} for name, (size, crc) in sums.items()}
    write_json(directory / FILE, {"files": files})


def require_intact(directory: Path, parallel: Parallel) -> None:
    """Read every file of an iteration and compare; each rank reads its share.

    Collective over the world.

    Raises:
        CheckpointError: a file is missing or damaged; raised on every rank.
    """
    parallel.agreed(lambda: _check(directory, parallel.rank, parallel.world_size))


def require_file(directory: Path, name: str) -> None:
    """Raise CheckpointError unless this file of an iteration has its recorded size and crc32."""
    expected = _expected(directory)
    if name not in expected:
        raise CheckpointError(f"does not list {name}", where=directory / FILE)
    _compare(directory / name, expected[name])


def _check(directory: Path, rank: int, world_size: int) -> None:
    expected = _expected(directory)
    # Every world_size-th file, the largest first, gives the ranks similar shares.
    names = sorted(expected, key=lambda name: (-expected[name][0], name))
    for name in names[rank::world_size]:
        _compare(directory / os.path.basename(name), expected[name])


def _expected(directory: Path) -> dict[str, tuple[int, int]]:
    """(bytes, crc32) by name, from the file."""
    files = read_json(directory / FILE, CheckpointError).get("files")
    try:
        return {
            str(name): (int(about["bytes"]), int(about["crc32"]))
            for name, about in files.items()  # type: ignore[union-attr]
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError("damaged", where=directory / FILE) from error


def _compare(path: Path, expected: tuple[int, int]) -> None:
    found = _read(path)
    if found != expected:
        raise CheckpointError(
            "damaged: the file differs from what was written",
            where=path,
            expected="{} bytes, crc32 {}".format(*expected),
            found="{} bytes, crc32 {}".format(*found),
            fix="Copy it again from an intact copy, or use another iteration",
        )


def _read(path: Path) -> tuple[int, int]:
    """(bytes, crc32) of a file."""
    size = crc = 0
    with open_regular(path, CheckpointError) as handle:
        while block := handle.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc
