"""The candidate sets of one document, and what must hold of them, in memory and on disk.

Shapes: P positions of a document, C candidates of a document (all its positions together).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_replay.errors import StoreError

#: |S| - 1 is stored in a byte.
MAX_SET_SIZE = 256

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class DocumentCandidates:
    """The candidate sets of one document; position t predicts token t + 1.

    The float32 fields are stored as fp16: what is read back is the nearest fp16, and a tail mass
    below 3e-8 reads as 0.
    """

    positions: npt.NDArray[np.int32]
    """int32 [P], ascending."""
    offsets: npt.NDArray[np.int64]
    """int64 [P + 1]: the set of the i-th position is ``ids[offsets[i]:offsets[i + 1]]``."""
    ids: npt.NDArray[np.int32]
    """int32 [C], ascending inside each position."""
    lse: npt.NDArray[np.float32]
    """float32 [P]: log sum exp of the base model's logits over the whole vocabulary."""
    gold_logprob: npt.NDArray[np.float32]
    """float32 [P]: the base model's log-probability of the gold token."""
    tail_mass: npt.NDArray[np.float32]
    """float32 [P]: the base model's probability outside the set (rho)."""
    logits: npt.NDArray[np.float16] | None
    """float16 [C] beside ``ids``, when the store has logits."""


def require(
    condition: bool | np.bool_, what: str, expected: object = None, found: object = None
) -> None:
    """Raise StoreError unless ``condition`` holds."""
    if not condition:
        raise StoreError(what, expected=expected, found=found)


@contextmanager
def located(where: object) -> Iterator[None]:
    """Put ``where`` before the message of a StoreError that leaves the block."""
    try:
        yield
    except StoreError as error:
        raise StoreError(str(error), where=where) from error


def to_half(array: Array) -> npt.NDArray[np.float16]:
    """``array`` rounded to little-endian fp16; what does not fit becomes infinite."""
    with np.errstate(over="ignore"):
        return array.astype("<f2")


def _require_arrays(document: DocumentCandidates, has_logits: bool) -> None:
    """Every field is a vector of the right kind and length."""
    num_positions, num_ids = len(document.positions), len(document.ids)
    fields: list[tuple[str, Array | None, str, int]] = [
        ("positions", document.positions, "iu", num_positions),
        ("offsets", document.offsets, "iu", num_positions + 1),
        ("ids", document.ids, "iu", num_ids),
        ("lse", document.lse, "f", num_positions),
        ("gold_logprob", document.gold_logprob, "f", num_positions),
        ("tail_mass", document.tail_mass, "f", num_positions),
    ]
    require(
        has_logits == (document.logits is not None),
        "logits differ from the store's description",
        "logits" if has_logits else "no logits",
        "no logits" if has_logits else "logits",
    )
    if has_logits:
        fields.append(("logits", document.logits, "f", num_ids))
    for name, array, kinds, length in fields:
        assert array is not None
        found = f"{array.dtype} {list(array.shape)}"
        expected = f"{'integers' if kinds == 'iu' else 'floats'} [{length}]"
        require(
            array.dtype.kind in kinds and array.shape == (length,), f"wrong {name}", expected, found
        )


def _require_sets(document: DocumentCandidates, vocab_size: int) -> None:
    """Positions ascend; sets hold 1 to 256 ascending ids of the vocabulary."""
    positions_P, offsets, ids_C = document.positions, document.offsets, document.ids
    require(
        offsets[0] == 0 and offsets[-1] == len(ids_C), "offsets do not span the ids", len(ids_C)
    )
    if len(positions_P) == 0:
        return
    require(
        positions_P[0] >= 0
        and positions_P[-1] < 2**31
        and (positions_P[1:] > positions_P[:-1]).all(),
        "positions do not ascend from 0 or above",
    )
    set_sizes = np.diff(offsets)
    require(
        set_sizes.min() >= 1 and set_sizes.max() <= MAX_SET_SIZE,
        "a candidate set has an impossible size",
        f"1 to {MAX_SET_SIZE}",
        f"{set_sizes.min()} to {set_sizes.max()}",
    )
    ascends = ids_C[1:] > ids_C[:-1]
    ascends[offsets[1:-1] - 1] = True  # from one position to the next, ids may fall
    require(ascends.all(), "candidate ids do not ascend inside each position")
    # Ids ascend, so the ends of the sets bound them all.
    least, most = ids_C[offsets[:-1]].min(), ids_C[offsets[1:] - 1].max()
    require(
        least >= 0 and most < vocab_size,
        "a candidate id lies outside the vocabulary",
        f"0 to {vocab_size - 1}",
        f"{least} to {most}",
    )


def _require_numbers(document: DocumentCandidates) -> None:
    """Every number is finite as fp16, and tail masses are probabilities."""
    for name in ("lse", "gold_logprob", "tail_mass", "logits"):
        array = getattr(document, name)
        if array is None:
            continue
        lost = ~np.isfinite(to_half(array))
        if lost.any():
            raise StoreError(
                f"{name} does not fit fp16",
                expected=f"at most {np.finfo(np.float16).max:.0f} in size",
                found=array[lost][0],
            )
    tail_mass_P = document.tail_mass
    if not ((tail_mass_P >= 0) & (tail_mass_P <= 1)).all():
        raise StoreError(
            "tail_mass is no probability",
            expected="0 to 1",
            found=f"{tail_mass_P.min()} to {tail_mass_P.max()}",
        )


def require_valid(document: DocumentCandidates, *, vocab_size: int, has_logits: bool) -> None:
    """Raise StoreError unless ``document`` can be in a store; said once, for writing and reading.

    Raises:
        StoreError: a field is missing, of another length or kind, out of order or out of range.
    """
    _require_arrays(document, has_logits)
    _require_sets(document, vocab_size)
    _require_numbers(document)
