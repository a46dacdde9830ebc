"""Attention of documents laid end to end, each to itself and to what it shares of others before it.

    out_s = sum_{r on the path of s} softmax_r(scale <q_s, k_r>) v_r

A document's path is its tokens from the first on: positions that earlier documents computed (see
``data.forest``), then its own. Where nothing is shared that is causal attention inside a document.

The rows are cut into segments, and torch's fused kernel runs once a segment, over the keys before
it on the path of its first row, and its own. That is exact, and computes no matrix of all rows
squared.

Shapes: T rows of a micro-batch, N query heads, G key-value groups, D channels; a segment has L rows
and K keys; R selected rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

#: Documents are put into one segment as long as it has at most this many rows: a call of the kernel
#: costs tens of microseconds, as much as a few hundred rows under a mask.
ROWS_TOGETHER = 256

#: Rows ``start`` to ``stop``.
Stretch = tuple[int, int]
#: The rows of a document's positions, in order.
Path = tuple[Stretch, ...]


@dataclass(frozen=True, eq=False)
class Segment:
    """Rows ``start`` to ``stop``, whose keys are ``prefix`` and themselves.

    Attributes:
        prefix: the rows before ``start`` on the path of its first row.
        mask: bool [L, K], may a row look at a key; None: causal from the lower right, so that the
            last row sees every key.
    """

    start: int
    stop: int
    prefix: Path = ()
    mask: Tensor | None = None

    @property
    def num_keys(self) -> int:
        """K."""
        return self.stop - self.start + _size(self.prefix)


@dataclass(frozen=True, eq=False)
class Documents:
    """Who attends to whom.

    Attributes:
        stops: the row behind each document's own rows; documents without any are left out. Rows
            behind the last are padding, whose output is not used.
        segments: what one call of the kernel attends to.
        key_rows: int64, the keys of all segments one after another.
        path_stops, path_rows: as ``stops`` and ``key_rows``, of each document's path. Rows are None
            where they are those of the micro-batch, in order.
    """

    stops: list[int]
    segments: list[Segment]
    key_rows: Tensor | None
    path_stops: list[int]
    path_rows: Tensor | None

    @staticmethod
    def of(
        own: Sequence[int], shared: Sequence[int], *, together: int = ROWS_TOGETHER
    ) -> Documents:
        """Documents of ``own`` rows each, which begin with ``shared`` positions of the one before.

        ``together``: most rows of a segment of several documents.
        """
        paths: list[Path] = []
        path: Path = ()
        row = 0
        for size, common in zip(own, shared, strict=True):
            path = _first(path, common)
            if size:
                path = (*path, (row, row + size))
                paths.append(path)
                row += size
        segments = list(_segments(paths, together))
        return Documents(
            stops=[path[-1][1] for path in paths],
            segments=segments,
            key_rows=_rows_of([(*x.prefix, (x.start, x.stop)) for x in segments]),
            path_stops=list(itertools.accumulate(map(_size, paths))),
            path_rows=_rows_of(paths),
        )

    def to(self, device: torch.device) -> Documents:
        """The same documents, with masks and key rows on ``device``."""
        if device.type == "cpu":
            return self
        segments = [
            s if s.mask is None else replace(s, mask=s.mask.to(device, non_blocking=True))
            for s in self.segments
        ]
        rows = [
            None if rows is None else rows.to(device, non_blocking=True)
            for rows in (self.key_rows, self.path_rows)
        ]
        return replace(self, segments=segments, key_rows=rows[0], path_rows=rows[1])

    @property
    def rows(self) -> int:
        """Rows of documents; those behind are padding."""
        return self.stops[-1] if self.stops else 0

    def keys_of(self, x_TGD: Tensor) -> list[Tensor]:
        """The keys, or values, of each segment: [K, G, D].

        Memory: one [sum K, G, D] a layer where anything is shared, else nothing.
        """
        sizes = [segment.num_keys for segment in self.segments]
        if self.key_rows is None:
            return list(x_TGD[: self.rows].split(sizes))
        return list(gather_rows(x_TGD, self.key_rows).split(sizes))


def gather_rows(x_TGD: Tensor, rows_K: Tensor) -> Tensor:
    """``x_TGD[rows_K]``; in backward a row's gradients are added in fp32, in the order of rows."""
    gathered_KGD: Tensor = _GatherRows.apply(x_TGD, rows_K)  # type: ignore[no-untyped-call]
    return gathered_KGD


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TGD: Tensor, rows_K: Tensor) -> Tensor:
        ctx.save_for_backward(rows_K)
        ctx.length = len(x_TGD)
        return x_TGD.index_select(0, rows_K)

    @staticmethod
    def backward(ctx: Any, grad_KGD: Tensor) -> tuple[Tensor, None]:
        (rows_K,) = ctx.saved_tensors
        dtype = torch.promote_types(grad_KGD.dtype, torch.float32)
        summed_TGD = grad_KGD.new_zeros((ctx.length, *grad_KGD.shape[1:]), dtype=dtype)
        grad = grad_KGD.to(dtype)
        if grad.is_cpu:
            summed_TGD.index_add_(0, rows_K, grad)
        else:  # index_add_ would add in any order there
            summed_TGD.index_put_((rows_K,), grad, accumulate=True)
        return summed_TGD.to(grad_KGD.dtype), None


def _size(path: Path) -> int:
    return sum(stop - start for start, stop in path)


def _first(path: Path, size: int) -> Path:
    """The first ``size`` rows of a path."""
    kept = []
    for start, stop in path:
        if size <= 0:
            break
        kept.append((start, min(stop, start + size)))
        size -= stop - start
    return tuple(kept)


def _rows_of(paths: Sequence[Path]) -> Tensor | None:
    """The rows of all ``paths``, int64; None where each is but one stretch."""
    if all(len(path) == 1 for path in paths):
        return None
    return torch.cat([torch.arange(*stretch) for path in paths for stretch in path])


def _segments(paths: Sequence[Path], together: int) -> Iterator[Segment]:
    """Whole documents up to ``together`` rows; a longer one alone."""
    first = 0
    while first < len(paths):
        *prefix, (start, stop) = paths[first]
        last = first + 1
        while last < len(paths) and paths[last][-1][1] - start <= together:
            stop = paths[last][-1][1]
            last += 1
        mask = _mask(paths[first:last]) if last > first + 1 else None
        yield Segment(start, stop, tuple(prefix), mask)
        first = last


def _mask(paths: Sequence[Path]) -> Tensor:
    """[L, K] of consecutive documents: a row sees a key of its own document up to its position, and
    one of an earlier document where all documents since share the key's position.

    The keys before the segment are positions of its first document.
    """
    count, shared = len(paths), [_size(path[:-1]) for path in paths]
    sizes, shared_E = torch.tensor([_size(path[-1:]) for path in paths]), torch.tensor(shared)
    # limit[d, e]: the positions of document e that document d shares.
    limit_EE = torch.zeros(count, count, dtype=torch.int64)
    for d in range(1, count):
        limit_EE[d, d - 1] = shared[d]
        limit_EE[d, : d - 1] = limit_EE[d - 1, : d - 1].clamp(max=shared[d])
    document_L = torch.arange(count).repeat_interleave(sizes)
    starts_E = sizes.cumsum(0) - sizes
    position_L = torch.arange(len(document_L)) - (starts_E - shared_E)[document_L]
    document_K = torch.cat([document_L.new_zeros(shared[0]), document_L])
    position_K = torch.cat([torch.arange(shared[0]), position_L])
    is_own_LK = document_L[:, None] == document_K
    limit_LK = limit_EE[document_L][:, document_K]
    return position_K < torch.where(is_own_LK, position_L[:, None] + 1, limit_LK)


def packed_attention(
    query_TND: Tensor, key_TGD: Tensor, value_TGD: Tensor, documents: Documents, *, scale: float
) -> Tensor:
    """[T, N, D] attended; zeros at padding. Differentiable."""
    segments, rows = documents.segments, documents.rows
    if not segments:  # nothing but padding: the operands get a gradient of zeros
        return _nothing(query_TND, key_TGD, value_TGD)
    # Cut and joined by one operation each: slices would each make a full-size gradient.
    queries = query_TND[:rows].split([segment.stop - segment.start for segment in segments])
    parts = [
        _attend(query, key, value, segment.mask, scale)
        for segment, query, key, value in zip(
            segments,
            queries,
            documents.keys_of(key_TGD),
            documents.keys_of(value_TGD),
            strict=True,
        )
    ]
    padding = query_TND.new_zeros(len(query_TND) - rows, *query_TND.shape[1:])
    return torch.cat([*parts, padding])


class RowSegment(NamedTuple):
    """The next ``num_rows`` selected rows lie in segment ``number``, and see its first ``num_keys``
    keys under ``mask``, bool [num_rows, num_keys].
    """

    number: int
    num_rows: int
    num_keys: int
    mask: Tensor


def row_segments_of(documents: Documents, rows_N: Tensor) -> list[RowSegment]:
    """Where ``rows_N`` (on the host, ascending) look. None may be padding."""
    assert not len(rows_N) or int(rows_N[-1]) < documents.rows, "padding was selected"
    found = []
    bounds = torch.tensor([0, *(segment.stop for segment in documents.segments)])
    places = torch.searchsorted(rows_N, bounds).tolist()
    for number, segment in enumerate(documents.segments):
        first, stop = places[number : number + 2]
        if first == stop:
            continue
        place_R = rows_N[first:stop] - segment.start
        before = segment.num_keys - (segment.stop - segment.start)
        num_keys = before + int(place_R[-1]) + 1
        if segment.mask is None:
            mask = before + place_R[:, None] >= torch.arange(num_keys)
        else:
            mask = segment.mask[place_R, :num_keys]
        found.append(RowSegment(number, stop - first, num_keys, mask))
    return found


def row_attention(
    query_RND: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    documents: Documents,
    rows_N: Tensor,
    row_segments: Sequence[RowSegment],
    *,
    scale: float,
) -> Tensor:
    """[R, N, D]: ``packed_attention`` at the rows ``rows_N``, whose queries are the first N of R.

    The other queries attend to nothing: zeros. Differentiable: without a row, the operands get a
    gradient of zeros.

    Args:
        rows_N: int64, ascending, none of them padding; not read here.
        row_segments: ``row_segments_of`` them.
    """
    if not row_segments:
        return _nothing(query_RND, key_TGD, value_TGD)
    sizes = [segment.num_rows for segment in row_segments]
    keys, values = documents.keys_of(key_TGD), documents.keys_of(value_TGD)
    parts = [
        _attend(
            query,
            keys[segment.number][: segment.num_keys],
            values[segment.number][: segment.num_keys],
            segment.mask,
            scale,
        )
        for segment, query in zip(row_segments, query_RND[: sum(sizes)].split(sizes), strict=True)
    ]
    rest = query_RND.new_zeros(len(query_RND) - sum(sizes), *query_RND.shape[1:])
    return torch.cat([*parts, rest])


def _nothing(query_RND: Tensor, key_TGD: Tensor, value_TGD: Tensor) -> Tensor:
    """Zeros as the queries, with gradients of zero for all three."""
    nothing_GD = 0 * (key_TGD[0] + value_TGD[0])
    return 0 * query_RND + nothing_GD.repeat_interleave(query_RND.shape[1] // len(nothing_GD), 0)


def _attend(
    query_LND: Tensor, key_KGD: Tensor, value_KGD: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """[L, N, D]; causal from the lower right where there is no mask."""
    is_causal = mask is None and len(query_LND) == len(key_KGD)
    if mask is None and not is_causal:
        mask = _lower_right(len(query_LND), len(key_KGD), query_LND.device)
    # Groups are shared by the kernel, not repeated in memory.
    return F.scaled_dot_product_attention(
        query_LND.transpose(0, 1)[None],
        key_KGD.transpose(0, 1)[None],
        value_KGD.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=True,
    )[0].transpose(0, 1)


def _lower_right(rows: int, keys: int, device: torch.device) -> Tensor:
    """[L, K], the last row sees every key. A matrix on a CPU, and where a GPU has no fused kernel
    for the dtype.
    """
    if device.type == "cpu":
        return torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
    # Here: its import brings torch's compiler, which takes seconds.
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(rows, keys)


class AttentionBackend(NamedTuple):
    """Attention on one kind of device.

    Attributes:
        everywhere: as ``packed_attention``; of padding, anything finite.
        at_rows: as ``row_attention``.
    """

    everywhere: Callable[..., Tensor]
    at_rows: Callable[..., Tensor]


TORCH_ATTENTION = AttentionBackend(packed_attention, row_attention)
