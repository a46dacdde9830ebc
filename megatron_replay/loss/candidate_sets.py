"""The candidate sets of some positions, from the store to the kernel that reads them.

Sets are built and cut on the host, in numpy, while a step runs; then they are copied to the device
once. Nothing here waits for a device, and no step reads the size of a set from it.

Shapes: N positions, G candidate sets, P pairs of a set and a candidate, V rows of a vocabulary (or
of one tensor-parallel rank's shard of it), U distinct candidates.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_replay.store import offsets_of_counts

#: numpy sorts 16-bit integers by counting, in linear time; ids have more bits.
_DIGIT = 16


@dataclass(frozen=True, eq=False, kw_only=True)
class CandidateSets:
    """Candidate sets over ``num_rows`` rows, of which row r is that of id ``vocab_start + r``.

    Attributes:
        ids: int32 [P], rows, ascending and distinct in each set.
        offsets: int64 [G + 1] into ``ids``; a set may be empty on a shard.
        group_offsets: None: position n has set n (G = N). Otherwise int64 [G + 1]: positions
            ``group_offsets[g]`` to ``group_offsets[g + 1]`` share set g.
        labels_N: int64, ids of the whole vocabulary.
        num_rows, vocab_start: V and the first id; the whole vocabulary starts at 0.
        values: float32 [P], one for each of ``ids``, such as the base model's logits; or None.
        label_rows_N: int64, the row of each label, -1 where this shard does not have it.
        transpose: the pairs sorted by id, for backends that read them so.
        host: the arrays that the host reads, without waiting for a device.
    """

    ids: Tensor
    offsets: Tensor
    group_offsets: Tensor | None
    labels_N: Tensor
    num_rows: int
    vocab_start: int = 0
    values: Tensor | None = None
    label_rows_N: Tensor
    host: HostArrays
    transpose: Transpose | None = None

    @staticmethod
    def of(
        ids: npt.NDArray[np.int32],
        offsets: npt.NDArray[np.int64],
        labels_N: npt.NDArray[np.int64],
        group_offsets: npt.NDArray[np.int64] | None = None,
        *,
        vocab_size: int,
        values: npt.NDArray[np.float32] | None = None,
    ) -> CandidateSets:
        """Sets of the whole vocabulary, with their labels in them; nothing is copied."""
        labels = torch.from_numpy(labels_N)
        return CandidateSets(
            ids=torch.from_numpy(ids),
            offsets=torch.from_numpy(offsets),
            group_offsets=None if group_offsets is None else torch.from_numpy(group_offsets),
            labels_N=labels,
            num_rows=vocab_size,
            values=None if values is None else torch.from_numpy(values),
            label_rows_N=labels,
            host=HostArrays(ids, offsets, group_offsets, labels_N),
        )

    @property
    def largest(self) -> int:
        """Number of candidates of the largest set."""
        return int(np.diff(self.host.offsets).max(initial=0))

    @functools.cached_property
    def set_P(self) -> Tensor:
        """int64 [P], the set of each pair, which is its position unless sets are shared."""
        sizes = self.offsets.diff()
        return torch.arange(len(sizes), device=sizes.device).repeat_interleave(
            sizes, output_size=len(self.ids)
        )

    def shard(self, vocab_start: int, num_rows: int) -> CandidateSets:
        """These sets of the whole vocabulary, cut to the shard's rows. On the host."""
        assert self.vocab_start == 0
        rows, inside = rows_of(self.host.ids, vocab_start, num_rows)
        offsets, values = self.host.offsets, self.values
        if not inside.all():
            rows, offsets = rows[inside], offsets_of_counts(inside)[offsets]
            values = None if values is None else torch.from_numpy(values.numpy()[inside])
        label_rows_N, found_N = rows_of(self.host.label_rows_N, vocab_start, num_rows)
        label_rows_N = np.where(found_N, label_rows_N, -1)
        return dataclasses.replace(
            self,
            ids=torch.from_numpy(rows),
            offsets=torch.from_numpy(offsets),
            num_rows=num_rows,
            vocab_start=vocab_start,
            values=values,
            label_rows_N=torch.from_numpy(label_rows_N),
            host=HostArrays(rows, offsets, self.host.group_offsets, label_rows_N),
        )

    def with_transpose(self) -> CandidateSets:
        """These sets with ``transpose``, unless positions share sets. On the host."""
        if self.group_offsets is not None:
            return self
        transpose = transpose_of(self.host.ids, self.host.offsets)
        return dataclasses.replace(self, transpose=transpose)

    def moved(self, move: Callable[[Tensor], Tensor]) -> CandidateSets:
        """The same sets, with ``move`` applied to each tensor."""
        tensors: dict[str, Any] = {
            field.name: move(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        if self.transpose is not None:
            tensors["transpose"] = Transpose(*map(move, self.transpose))
        return dataclasses.replace(self, **tensors)


class HostArrays(NamedTuple):
    """The arrays of this name in ``CandidateSets``."""

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    group_offsets: npt.NDArray[np.int64] | None
    label_rows_N: npt.NDArray[np.int64]


class Transpose(NamedTuple):
    """Pairs sorted by id, those of one id by position: CSC where the sets are CSR.

    Attributes:
        order: int64 [P], the pair at each place.
        positions: int64 [P], its position.
        rows: int32 [U], the distinct ids, ascending.
        offsets: int64 [U + 1] into ``order``.
    """

    order: Tensor
    positions: Tensor
    rows: Tensor
    offsets: Tensor


def rows_of(
    ids: npt.NDArray[Any], vocab_start: int, num_rows: int
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """(row of each id on a shard, whether the shard has it)."""
    rows = ids - ids.dtype.type(vocab_start)
    return rows, (rows >= 0) & (rows < num_rows)


def transpose_of(ids: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64]) -> Transpose:
    """The pairs in the order of their ids, those of one id by position."""
    order = np.argsort((ids & (1 << _DIGIT) - 1).astype(np.uint16), kind="stable")
    high = (ids >> _DIGIT).astype(np.uint16)
    if high.any():
        order = order[np.argsort(high[order], kind="stable")]
    sorted_ids = ids[order]
    starts = np.flatnonzero(np.diff(sorted_ids, prepend=-1))
    positions = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))[order]
    return Transpose(
        order=torch.from_numpy(order),
        positions=torch.from_numpy(positions),
        rows=torch.from_numpy(sorted_ids[starts]),
        offsets=torch.from_numpy(np.append(starts, len(ids))),
    )


def unions(
    ids: npt.NDArray[np.int32], spans: Iterable[tuple[int, int]]
) -> Iterator[npt.NDArray[np.int64]]:
    """The ascending distinct ids of ``ids[first:last]`` for each span.

    Marks a flag for each id, which is far faster than sorting; int64 indices are three times as
    fast as int32 ones, which numpy converts piece by piece.
    """
    seen = np.zeros(ids.max(initial=-1) + 1, dtype=np.bool_)
    for first, last in spans:
        seen[ids[first:last].astype(np.intp)] = True
        union = np.flatnonzero(seen)
        seen[union] = False
        yield union
