"""Segments in tiles of 64, for kernels that multiply densely: plain torch, on any device.

Shapes: S segments, P pairs of a segment and an index; a tile has 64 places for segments, and the
union of their indices; Q members of all unions, B blocks of up to 64 members of one union.

In a block each place has a word, whose bit u says that the segment there has member u. As members
ascend, and indices in a segment, the number of the pair is that of the place's first one in the
block plus the bits below u: 12 bytes a place tell what a map of the block would take 256 for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Places of a tile, the bits of a word; members of a block.
TILE = BLOCK = 64


class TileMap(NamedTuple):
    """Segments in tiles, and the unions of their indices in blocks.

    Attributes:
        segments: int32 [tiles, 64], the segment at each place, -1 at those left over.
        members: int32 [Q], the unions, each ascending, one after the other.
        member_offsets: int32 [tiles + 1] into ``members``.
        block_offsets: int32 [tiles + 1], the first block of each tile.
        tile_of_B: int32 [B], the tile of each block; the number of tiles for those left over.
        words: int64 [B, 64], which members the segment at each place has, a bit each.
        first_pairs: int32 [B, 64], its first pair in the block.
    """

    segments: Tensor
    members: Tensor
    member_offsets: Tensor
    block_offsets: Tensor
    tile_of_B: Tensor
    words: Tensor
    first_pairs: Tensor


def tile_map(indices: Tensor, offsets: Tensor, bound: int, order_S: Tensor) -> TileMap:
    """Tiles of the segments in ``order_S``, a permutation; one device sync.

    ``indices`` int32 [P], below ``bound`` and ascending in each segment; ``offsets`` [S + 1].
    """
    S, device = len(order_S), indices.device
    tiles = -(-S // TILE)
    segments = torch.full((tiles, TILE), -1, device=device)
    segments.view(-1)[:S] = order_S
    place_S = torch.empty_like(order_S)
    place_S[order_S] = torch.arange(S, device=device)
    segment_P = _segment_P(indices, offsets)
    place_P = place_S[segment_P]
    tile_P = place_P // TILE
    union_Q, member_P = (tile_P * bound + indices).unique(return_inverse=True)
    numbers = torch.arange(tiles + 1, device=device)
    member_offsets = torch.searchsorted(union_Q, numbers * bound)
    blocks = (member_offsets.diff() + BLOCK - 1) // BLOCK
    block_offsets = torch.nn.functional.pad(blocks.cumsum(0), (1, 0))

    B = (len(union_Q) + tiles * (BLOCK - 1)) // BLOCK  # no fewer than there are
    block_B = torch.arange(B, device=device)
    tile_of_B = torch.searchsorted(block_offsets, block_B, right=True) - 1
    number_P = member_P - member_offsets[tile_P]
    block_P = block_offsets[tile_P] + number_P // BLOCK
    words = torch.zeros(B, TILE, dtype=torch.int64, device=device)
    words.view(-1).index_add_(0, block_P * TILE + place_P % TILE, 1 << number_P % BLOCK)
    # (segment, block) as one number ascends with the pairs: where would a place's first one be?
    wanted = segments[tile_of_B.clamp(max=tiles - 1)] * B + block_B[:, None]
    first_pairs = torch.searchsorted(segment_P * B + block_P, wanted)
    return TileMap(
        segments.int(),
        (union_Q % bound).int(),
        member_offsets.int(),
        block_offsets.int(),
        tile_of_B.int(),
        words,
        first_pairs.int(),
    )


def overlap_order(indices: Tensor, offsets: Tensor) -> Tensor:
    """Segments whose indices are likely to be shared side by side: int64 [S].

    By size, to a power of two, the largest first: one large segment would make the union of 63
    small ones large. Then by the least hash among the indices, which two segments share with the
    probability |A and B| / |A or B|.
    """
    S = len(offsets) - 1
    segment_P = _segment_P(indices, offsets)
    # Knuth's multiplicative hash: odd, so that no two 32-bit ids share one.
    hash_P = indices.long() * 2654435761 & 0xFFFFFFFF
    key_S = hash_P.new_full((S,), 1 << 32).scatter_reduce(0, segment_P, hash_P, "amin")
    key_S -= torch.frexp(offsets.diff().double()).exponent.long() << 33
    return key_S.sort(stable=True).indices


def _segment_P(indices: Tensor, offsets: Tensor) -> Tensor:
    segments = torch.arange(len(offsets) - 1, device=indices.device)
    return segments.repeat_interleave(offsets.diff(), output_size=len(indices))
