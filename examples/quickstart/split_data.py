"""Hold out every tenth row of the user's own data, and write general text to measure forgetting.

python -m examples.quickstart.split_data --input FILE.jsonl --output DIR

train.jsonl            nine of ten rows, as they are
heldout.jsonl          every tenth row, 200 at most
general_heldout.jsonl  {"text"}: pieces of Python's reference, found in this installation
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from examples.quickstart.general_text import general_texts
from megatron_replay.checkpoint.staging import publish, start_directory
from megatron_replay.cli import exit_code_of
from megatron_replay.data.rows import read_lines
from megatron_replay.errors import DataError
from megatron_replay.files import atomic_file

EVERY, MOST_HELD_OUT, GENERAL_TEXTS = 10, 200, 200


def split(source: Path, output: Path) -> tuple[int, int]:
    """Write the directory ``output``; returns the numbers of rows to train on and held out.

    Raises:
        DataError: there is nothing to read, or too little to hold anything out.
        OutputError: ``output`` is not empty, or cannot be written.
    """
    rows = [line.rstrip(b"\r\n") for _, line in read_lines(source) if line.strip()]
    if len(rows) < EVERY:
        raise DataError("too few rows", where=source, expected=f"at least {EVERY}", found=len(rows))
    staged = start_directory(output)
    heldout = rows[::EVERY][:MOST_HELD_OUT]
    train = [row for i, row in enumerate(rows) if i % EVERY or i // EVERY >= MOST_HELD_OUT]
    general = [json.dumps({"text": text}).encode() for text in general_texts(GENERAL_TEXTS)]
    for name, lines in (("train", train), ("heldout", heldout), ("general_heldout", general)):
        with atomic_file(staged / f"{name}.jsonl") as handle:
            handle.writelines(line + b"\n" for line in lines)
    publish(staged, output, overwrite=False)
    return len(train), len(heldout)


def main() -> int:
    """Split; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--input", type=Path, required=True, help="JSONL rows of any known format")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()

    def write() -> str:
        num_train, num_heldout = split(options.input, options.output)
        return f"{options.output}: {num_train} rows to train on, {num_heldout} held out"

    return exit_code_of(write)


if __name__ == "__main__":
    sys.exit(main())
