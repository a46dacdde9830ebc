"""Hold out every tenth row of the user's own data, and write general text to measure forgetting.

python -m examples.quickstart.split_data --input FILE.jsonl --output DIR

train.jsonl            nine of ten rows, as they are
heldout.jsonl          every tenth row, 200 at most
general_heldout.jsonl  {"text"}: documentation of Python and numpy, found in this installation
data.json              counts
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from examples.quickstart.general_text import general_documents
from megatron_replay.checkpoint.staging import publish, start_directory
from megatron_replay.data.rows import read_lines
from megatron_replay.errors import DataError, ReplayError
from megatron_replay.files import atomic_file, write_json

EVERY, MOST_HELD_OUT, GENERAL_DOCUMENTS = 10, 200, 200


def split(source: Path, output: Path) -> dict[str, int]:
    """Write the directory ``output``; how many rows each of its files holds.

    Raises:
        DataError: there is nothing to read, or too little to hold anything out.
        OutputError: ``output`` holds something, or cannot be written.
    """
    lines = [line.rstrip(b"\r\n") for _, line in read_lines(source) if line.strip()]
    if len(lines) < EVERY:
        raise DataError(
            "too few rows", where=source, expected=f"at least {EVERY}", found=len(lines)
        )
    staged = start_directory(output)
    heldout = lines[::EVERY][:MOST_HELD_OUT]
    train = [line for i, line in enumerate(lines) if i % EVERY or i // EVERY >= MOST_HELD_OUT]
    texts = general_documents(seed=0)[:GENERAL_DOCUMENTS]
    general = [json.dumps({"text": text}).encode() for text in texts]
    files = {"train": train, "heldout": heldout, "general_heldout": general}
    counts = {name: len(rows) for name, rows in files.items()}
    for name, rows in files.items():
        with atomic_file(staged / f"{name}.jsonl") as handle:
            handle.writelines(row + b"\n" for row in rows)
    write_json(staged / "data.json", counts)
    publish(staged, output, overwrite=False)
    return counts


def main() -> int:
    """Split; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--input", type=Path, required=True, help="JSONL rows of any known format")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    try:
        counts = split(options.input, options.output)
    except ReplayError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{options.output}: {counts['train']} rows to train on, {counts['heldout']} held out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
