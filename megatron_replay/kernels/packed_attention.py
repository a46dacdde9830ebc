"""Attention of packed documents, each to itself: no matrix of a whole pack's positions squared.

    out_s = sum_{r <= s, same document} softmax_r(scale <q_s, k_r>) v_r

A pack is cut into segments of whole documents, and torch's fused kernel runs once a segment: causal
where a segment is one document, under a small mask where short ones share it. That is exact, and
computes sum L^2 over segments instead of S^2.

Shapes: S positions of a pack, B packs, N query heads, G key-value groups, D channels; a segment has
L positions, of which R are selected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

#: Documents are put into one segment as long as it has at most this many positions: a call of the
#: kernel costs tens of microseconds, as much as a few hundred positions under a mask.
SHARED_POSITIONS = 256


@dataclass(frozen=True, eq=False)
class Segment:
    """Positions ``start`` to ``stop`` of a pack: whole documents, or padding.

    Attributes:
        stops: where each of its documents ends, the last at ``stop``; padding counts as one.
        mask: bool [L, L], may position s look at r; None where the segment is one document.
        is_padding: no document; its output is not used.
    """

    start: int
    stop: int
    stops: tuple[int, ...]
    mask: Tensor | None = None
    is_padding: bool = False


#: The segments of each pack, in order, together all its positions.
Segments = Sequence[Sequence[Segment]]


def segments_of(
    boundaries: Sequence[Sequence[int]], length: int, *, shared: int = SHARED_POSITIONS
) -> list[list[Segment]]:
    """Segments of packs whose documents begin at ``boundaries[b][:-1]``; the last is their end.

    Args:
        boundaries: of each pack, ascending; [0] where it is nothing but padding.
        length: positions of a pack, S.
        shared: most positions of a segment of several documents.
    """
    packs = []
    for starts in boundaries:
        segments, first = [], 0
        while first < len(starts) - 1:
            last = first + 1
            while last < len(starts) - 1 and starts[last + 1] - starts[first] <= shared:
                last += 1
            segments.append(_segment(starts[first : last + 1]))
            first = last
        if starts[-1] < length:
            segments.append(Segment(starts[-1], length, (length,), is_padding=True))
        packs.append(segments)
    return packs


def _segment(starts: Sequence[int]) -> Segment:
    start, stop, stops = starts[0], starts[-1], tuple(starts[1:])
    if len(starts) == 2:
        return Segment(start, stop, stops)
    sizes = torch.tensor(starts).diff()
    document_L = torch.arange(len(sizes)).repeat_interleave(sizes)
    same_LL = document_L[:, None] == document_L[None]
    return Segment(start, stop, stops, same_LL.tril())


def document_ends(segments: Segments, length: int) -> list[int]:
    """Where each document ends, and each pack's padding, in the packs laid end to end, [B * S]."""
    return [
        pack * length + stop
        for pack, of_pack in enumerate(segments)
        for segment in of_pack
        for stop in segment.stops
    ]


def segments_to(segments: Segments, device: torch.device) -> Segments:
    """The same segments, with their masks on ``device``."""
    if device.type == "cpu":
        return segments
    return [
        [
            s if s.mask is None else replace(s, mask=s.mask.to(device, non_blocking=True))
            for s in pack
        ]
        for pack in segments
    ]


def packed_attention(
    query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, segments: Segments, *, scale: float
) -> Tensor:
    """[S, B, N, D] attended; zeros behind a pack's last document. Differentiable."""
    packs = []
    for query, key, value, pack in zip(
        *(x.permute(1, 2, 0, 3).unbind() for x in (query_SBND, key_SBGD, value_SBGD)),
        segments,
        strict=True,
    ):
        # A pack of nothing but padding counts as a document: its operands, too, get a gradient.
        whole = [segment for segment in pack if not segment.is_padding] or pack
        sizes = [segment.stop - segment.start for segment in whole]
        stop = sum(sizes)
        # Cut and joined by one operation each: slices would each make a full-size gradient.
        parts = [
            _attend(q, k, v, segment.mask, scale)
            for segment, q, k, v in zip(
                whole, *(x[:, :stop].split(sizes, dim=1) for x in (query, key, value)), strict=True
            )
        ]
        padding = query.new_zeros(query.shape[0], query.shape[1] - stop, value.shape[2])
        packs.append(torch.cat([*parts, padding], dim=1))
    return torch.stack(packs).permute(2, 0, 1, 3)


@dataclass(frozen=True, eq=False)
class RowSegment:
    """Selected rows ``first_row`` to ``stop_row`` are positions of one segment.

    Attributes:
        pack, start, stop: the segment, its keys cut behind the last of the rows.
        mask: bool [R, stop - start], may the row look at the position.
    """

    pack: int
    start: int
    stop: int
    first_row: int
    stop_row: int
    mask: Tensor


def row_segments_of(segments: Segments, rows_N: Tensor, length: int) -> list[RowSegment]:
    """Where ``rows_N`` (on the host; ``b * S + s``, ascending) look. None may be padding."""
    found = []
    for pack, of_pack in enumerate(segments):
        for segment in of_pack:
            bounds = torch.tensor([segment.start, segment.stop]) + pack * length
            first, stop = torch.searchsorted(rows_N, bounds).tolist()
            if first == stop:
                continue
            assert not segment.is_padding, "padding was selected"
            place_R = rows_N[first:stop] - pack * length - segment.start
            seen = int(place_R[-1]) + 1
            if segment.mask is None:
                mask = place_R[:, None] >= torch.arange(seen)
            else:
                mask = segment.mask[place_R, :seen]
            found.append(RowSegment(pack, segment.start, segment.start + seen, first, stop, mask))
    return found


def row_attention(
    query_RND: Tensor,
    key_SBGD: Tensor,
    value_SBGD: Tensor,
    segments: Segments,
    rows_N: Tensor,
    row_segments: Sequence[RowSegment],
    *,
    scale: float,
) -> Tensor:
    """[R, N, D]: ``packed_attention`` at the rows ``rows_N``, whose queries are the first N of R.

    The other queries attend to nothing: zeros. Differentiable: without a row, the operands get a
    gradient of zeros.

    Args:
        rows_N: ``b * S + s``, int64, ascending, none of them padding; not read here.
        row_segments: ``row_segments_of`` them.
    """
    if not row_segments:
        nothing_GD = 0 * (key_SBGD[0, 0] + value_SBGD[0, 0])
        heads = query_RND.shape[1] // len(nothing_GD)
        return 0 * query_RND + nothing_GD.repeat_interleave(heads, dim=0)
    sizes = [segment.stop_row - segment.first_row for segment in row_segments]
    queries = query_RND[: sum(sizes)].split(sizes)
    parts = [
        _attend(
            query.transpose(0, 1),
            key_SBGD[segment.start : segment.stop, segment.pack].transpose(0, 1),
            value_SBGD[segment.start : segment.stop, segment.pack].transpose(0, 1),
            segment.mask,
            scale,
        ).transpose(0, 1)
        for segment, query in zip(row_segments, queries, strict=True)
    ]
    rest = query_RND.new_zeros(len(query_RND) - sum(sizes), *query_RND.shape[1:])
    return torch.cat([*parts, rest])


def _attend(
    query_NLD: Tensor,
    key_GLD: Tensor,
    value_GLD: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Causal where there is no mask."""
    # Groups are shared by the kernel, not repeated in memory.
    return F.scaled_dot_product_attention(
        query_NLD[None],
        key_GLD[None],
        value_GLD[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=True,
    )[0]


class AttentionBackend(NamedTuple):
    """Attention on one kind of device.

    Attributes:
        everywhere: as ``packed_attention``; of padding, anything finite.
        at_rows: as ``row_attention``.
    """

    everywhere: Callable[..., Tensor]
    at_rows: Callable[..., Tensor]


TORCH_ATTENTION = AttentionBackend(packed_attention, row_attention)
