"""Hold out every tenth row of the user's own data, and write general text to measure forgetting.

python -m examples.quickstart.split_data --input FILE.jsonl --output DIR

train.jsonl            nine of ten rows, as they are
heldout.jsonl          every tenth row, 200 at most
general_heldout.jsonl  {"text"}: documentation of Python and numpy, found in this installation
data.json              counts, written last
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from examples.quickstart.general_text import general_documents
from megatron_replay.errors import DataError, ReplayError
from megatron_replay.files import atomic_file, make_directory, write_json

EVERY, MOST_HELD_OUT, GENERAL_DOCUMENTS = 10, 200, 200


def split(source: Path, output: Path) -> dict[str, int]:
    """Write the three files; how many rows each holds.

    Raises:
        DataError: there is nothing to read, or too little to hold anything out.
    """
    try:
        lines = [line for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read: {error}", where=source) from error
    if len(lines) < EVERY:
        raise DataError(
            "too few rows", where=source, expected=f"at least {EVERY}", found=len(lines)
        )
    heldout = lines[::EVERY][:MOST_HELD_OUT]
    train = [line for i, line in enumerate(lines) if i % EVERY or i // EVERY >= MOST_HELD_OUT]
    general = [json.dumps({"text": text}) for text in general_documents(seed=0)[:GENERAL_DOCUMENTS]]
    files = {"train": train, "heldout": heldout, "general_heldout": general}
    for name, rows in files.items():
        with atomic_file(output / f"{name}.jsonl", "w") as handle:
            handle.writelines(row + "\n" for row in rows)
    return {name: len(rows) for name, rows in files.items()}


def main() -> int:
    """Split; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--input", type=Path, required=True, help="JSONL rows of any known format")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    try:
        counts = split(options.input, make_directory(options.output))
        write_json(options.output / "data.json", counts)
    except ReplayError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{options.output}: {counts['train']} rows to train on, {counts['heldout']} held out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
