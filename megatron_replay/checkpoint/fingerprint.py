"""Which weights these are, and whether a store was made with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_replay.errors import CheckpointError, StoreError, few
from megatron_replay.files import differing, sha256_of_files
from megatron_replay.store import CandidateReader


def digests_of(paths: Sequence[Path]) -> str:
    """The SHA-256 of each file, a JSON object by name; each is read whole, side by side.

    Raises:
        CheckpointError: one cannot be read.
    """
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda path: sha256_of_files([path], error=CheckpointError), paths)
        found = {path.name: digest for path, digest in zip(paths, digests, strict=True)}
    return json.dumps(found, sort_keys=True)


def differing_files(one: str, other: str) -> str:
    """Which files tell one ``base_fingerprint`` from another, for a message."""
    try:
        return few(differing(json.loads(one), json.loads(other)))
    except (ValueError, TypeError):  # of another version, or not of a model
        return "its fingerprint"


def require_store_of_base(reader: CandidateReader, base: str, *, flag: str, fix: str) -> None:
    """Raise StoreError unless Stage 0 ran on these very weights.

    Args:
        base: ``base_fingerprint`` of what ``flag`` gives.
    """
    made_with = reader.description.checkpoint_fingerprint
    if made_with != base:
        raise StoreError(
            f"the store was made with another base model than {flag}, by "
            f"{differing_files(made_with, base)}",
            where=reader.directory,
            fix=fix,
        )
