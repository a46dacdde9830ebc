"""The candidate sets of documents, and what must hold of them, in memory and on disk.

Shapes: D documents, P positions, C candidates (of all those positions together).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_replay.errors import StoreError

#: |S| - 1 is stored in a byte.
MAX_SET_SIZE = 256
#: What a store may keep of the candidates' logits.
LOGITS = ("none", "fp16", "bf16")

Array = npt.NDArray[Any]


def offsets_of_counts(counts_N: Array) -> npt.NDArray[np.int64]:
    """Where each of N runs of ``counts_N`` items starts when laid end to end, and the total last.

    int64 [N + 1]: run i is ``[offsets[i]:offsets[i + 1]]``.
    """
    offsets = np.zeros(len(counts_N) + 1, np.int64)
    np.cumsum(counts_N, out=offsets[1:])
    return offsets


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
    label_logprob: npt.NDArray[np.float32]
    """float32 [P]: the base model's log-probability of the label."""
    tail_mass: npt.NDArray[np.float32]
    """float32 [P]: the base model's probability outside the set (rho)."""
    logits: npt.NDArray[np.float32] | None
    """float32 [C], one for each of ``ids``, if the store has logits; stored as fp16 or bf16."""

    def take(self, rows: npt.NDArray[np.int64]) -> DocumentCandidates:
        """The sets of some positions, by their place in ``positions``, ascending."""
        starts, sizes = self.offsets[rows], np.diff(self.offsets)[rows]
        offsets = offsets_of_counts(sizes)
        kept = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], sizes)
        return DocumentCandidates(offsets=offsets, **_cut(self, rows, kept))

    @property
    def stop(self) -> int:
        """The last position plus one; 0 without positions."""
        return int(self.positions[-1]) + 1 if len(self.positions) else 0


def no_candidates(logits: str) -> DocumentCandidates:
    """A document without recorded positions, for a store that keeps ``logits`` (``LOGITS``)."""
    return DocumentCandidates(
        positions=np.empty(0, np.int32),
        offsets=np.zeros(1, np.int64),
        ids=np.empty(0, np.int32),
        lse=np.empty(0, np.float32),
        label_logprob=np.empty(0, np.float32),
        tail_mass=np.empty(0, np.float32),
        logits=None if logits == "none" else np.empty(0, np.float32),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class CandidateBatch:
    """The sets of several documents, end to end; the other fields are DocumentCandidates'."""

    document_offsets: npt.NDArray[np.int64]
    """int64 [D + 1]: document d has positions ``[document_offsets[d]:document_offsets[d + 1]]``."""
    positions: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int32]
    lse: npt.NDArray[np.float32]
    label_logprob: npt.NDArray[np.float32]
    tail_mass: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32] | None

    @property
    def stops(self) -> npt.NDArray[np.int64]:
        """int64 [D]: each document's last position plus one; 0 without positions."""
        with_none = np.concatenate(([-1], self.positions))  # what an empty document ends with
        ends, empty = self.document_offsets[1:], np.diff(self.document_offsets) == 0
        return with_none[np.where(empty, 0, ends)].astype(np.int64) + 1

    def documents(self) -> Iterator[DocumentCandidates]:
        """Each document alone, as views of these arrays."""
        for first, last in pairwise(self.document_offsets.tolist()):
            start, stop = self.offsets[first], self.offsets[last]
            offsets = self.offsets[first : last + 1] - start
            yield DocumentCandidates(
                offsets=offsets, **_cut(self, slice(first, last), slice(start, stop))
            )

    @staticmethod
    def of(documents: Sequence[DocumentCandidates]) -> CandidateBatch:
        """Those documents end to end; all with logits or none."""

        def joined(name: str, dtype: type[np.generic]) -> Array:
            return np.concatenate([np.empty(0, dtype), *(getattr(d, name) for d in documents)])

        sizes = [np.empty(0, np.int64), *(np.diff(document.offsets) for document in documents)]
        has_logits = any(document.logits is not None for document in documents)
        counts_D = np.array([len(document.positions) for document in documents], np.int64)
        return CandidateBatch(
            document_offsets=offsets_of_counts(counts_D),
            positions=joined("positions", np.int32),
            offsets=offsets_of_counts(np.concatenate(sizes)),
            ids=joined("ids", np.int32),
            lse=joined("lse", np.float32),
            label_logprob=joined("label_logprob", np.float32),
            tail_mass=joined("tail_mass", np.float32),
            logits=joined("logits", np.float32) if has_logits else None,
        )


def _cut(sets: DocumentCandidates | CandidateBatch, positions: Any, candidates: Any) -> Any:
    """The fields of some positions and of their candidates, all but the offsets."""
    names = ("positions", "lse", "label_logprob", "tail_mass")
    return {name: getattr(sets, name)[positions] for name in names} | {
        "ids": sets.ids[candidates],
        "logits": None if sets.logits is None else sets.logits[candidates],
    }


def require(
    condition: bool | np.bool_,
    what: str,
    expected: object = None,
    found: object = None,
    *,
    where: object = None,
    fix: str | None = None,
) -> None:
    """Raise StoreError unless ``condition`` holds."""
    if not condition:
        raise StoreError(what, where=where, expected=expected, found=found, fix=fix)


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


def encode_logits(array: Array, kind: str) -> bytes:
    """``array`` as "fp16" or "bf16", to nearest, ties to even; what does not fit: infinite."""
    if kind == "fp16":
        return to_half(array).tobytes()
    bits = array.astype("<f4").view("<u4")
    rounded = bits + (0x7FFF + (bits >> 16 & 1))
    return (np.where(np.isnan(array), bits, rounded) >> 16).astype("<u2").tobytes()


def decode_logits(content: bytes | memoryview, kind: str) -> npt.NDArray[np.float32]:
    """Inverse of ``encode_logits``."""
    if kind == "fp16":
        return np.frombuffer(content, "<f2").astype(np.float32)
    return (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32)


def _require_arrays(document: DocumentCandidates, has_logits: bool) -> None:
    """Every field is a vector of the right kind and length."""
    require(
        has_logits == (document.logits is not None),
        "logits differ from the store's description",
        "logits" if has_logits else "no logits",
        "no logits" if has_logits else "logits",
    )
    lengths = {"offsets": len(document.positions) + 1, "ids": len(document.ids)}
    for name, array in vars(document).items():
        if array is None:
            continue
        kinds = "iu" if name in ("positions", "offsets", "ids") else "f"
        length = lengths.get("ids" if name == "logits" else name, len(document.positions))
        require(
            array.dtype.kind in kinds and array.shape == (length,),
            f"wrong {name}",
            f"{'integers' if kinds == 'iu' else 'floats'} [{length}]",
            f"{array.dtype} {list(array.shape)}",
        )


def _require_sets(document: DocumentCandidates, vocab_size: int) -> None:
    """Positions ascend; sets hold 1 to 256 ascending ids of the vocabulary."""
    positions_P, offsets, ids_C = document.positions, document.offsets, document.ids
    spans = offsets[0] == 0 and offsets[-1] == len(ids_C)
    require(spans, "offsets do not span the ids", len(ids_C))
    if len(positions_P) == 0:
        return
    ascends = (positions_P[1:] > positions_P[:-1]).all()
    require(
        ascends and positions_P[0] >= 0 and positions_P[-1] < 2**31,
        "positions do not ascend from 0 or above",
    )
    set_sizes = np.diff(offsets)
    require(
        set_sizes.min() >= 1 and set_sizes.max() <= MAX_SET_SIZE,
        "a candidate set has an impossible size",
        f"1 to {MAX_SET_SIZE}",
        f"{set_sizes.min()} to {set_sizes.max()}",
    )
    ascends_C = ids_C[1:] > ids_C[:-1]
    ascends_C[offsets[1:-1] - 1] = True  # from one position to the next, ids may fall
    require(ascends_C.all(), "candidate ids do not ascend inside each position")
    # Ids ascend, so the ends of the sets bound them all.
    least, most = ids_C[offsets[:-1]].min(), ids_C[offsets[1:] - 1].max()
    require(
        least >= 0 and most < vocab_size,
        "a candidate id lies outside the vocabulary",
        f"0 to {vocab_size - 1}",
        f"{least} to {most}",
    )


def missing_label(
    ids_C: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], labels_P: Array
) -> int:
    """The first position whose label is not in its set, or -1; every set has at least one id."""
    if len(labels_P) == 0:
        return -1
    is_label_C = ids_C == np.repeat(labels_P, np.diff(offsets))
    missing_P = ~np.logical_or.reduceat(is_label_C, offsets[:-1])
    return int(np.argmax(missing_P)) if missing_P.any() else -1


def require_labels(
    batch: CandidateBatch, document_P: Array, labels_P: Array, carries_loss_P: Array
) -> None:
    """Raise StoreError unless every position's label carries loss and is in its set.

    Args:
        document_P, labels_P: of each position, the document's number and the token that follows.
        carries_loss_P: whether that token is trained on.
    """

    def place(p: np.integer[Any] | int) -> str:
        return f"document {document_P[p]}, position {batch.positions[p]}"

    fix = "Use the corpus that the store was made from"
    if not carries_loss_P.all():
        where = place(np.argmin(carries_loss_P))
        raise StoreError(f"{where} is recorded, but its label carries no loss", fix=fix)
    first = missing_label(batch.ids, batch.offsets, labels_P)
    if first >= 0:
        raise StoreError(
            f"{place(first)}: the label {labels_P[first]} is not in its candidate set",
            fix=f"{fix}, or run Stage 0 again",
        )


#: Largest finite numbers of the two.
_LARGEST = {"fp16": 65_504.0, "bf16": 3.3895314e38}


def require_numbers(document: DocumentCandidates | CandidateBatch, *, logits: str) -> None:
    """Every number is finite as it is stored, and tail masses are probabilities."""
    for name, kind in (("lse", "fp16"), ("label_logprob", "fp16"), ("logits", logits)):
        array = getattr(document, name)
        if array is None:
            continue
        lost = ~np.isfinite(decode_logits(encode_logits(array, kind), kind))
        if lost.any():
            most = f"at most {_LARGEST[kind]:g} in size"
            raise StoreError(f"{name} does not fit {kind}", expected=most, found=array[lost][0])
    tail_mass_P = document.tail_mass
    if not ((tail_mass_P >= 0) & (tail_mass_P <= 1)).all():
        found = f"{tail_mass_P.min()} to {tail_mass_P.max()}"
        raise StoreError("tail_mass is no probability", expected="0 to 1", found=found)


def require_valid(document: DocumentCandidates, *, vocab_size: int, logits: str) -> None:
    """The rules that every document of a store obeys, when it is written and when it is read.

    Raises:
        StoreError: a field is missing, of another length or kind, out of order or out of range.
    """
    _require_arrays(document, logits != "none")
    _require_sets(document, vocab_size)
    require_numbers(document, logits=logits)
