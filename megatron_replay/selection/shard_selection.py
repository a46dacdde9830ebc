"""What a rank does for candidate selection, without communication, and its torch backend.

Tokens are ordered by (logit descending, id ascending), so every order has one answer. Nothing here
shifts bits, sorts integers, or sums int64 cumulatively: NPUs do these on a scalar processor.

A token's mass is exp(z - max) in units of 2^-38, an integer with the same bits everywhere.
``torch.exp`` differs in its last bit between processors, and between the lanes of one vector
register. This exponential consists of fp32 operations that IEEE 754 rounds alike on every device,
each rounded separately (none is fused with another):

    t = log2(e) max(z - max, -28)     k = round(t)     mass = round(2^(k + 38) p(t - k))
    p(f) = ((c5 f + c4) f^2 + (c3 f + c2)) f^2 + (c1 f + 1)

with halves rounded to even; t - k is exact. Over all fp32 differences in [-28, 0] the relative
error is at most 2^-19.05, nearly all of it from rounding t; the largest mass is 2^38, at 0. At -28
the power is 0.19, so a mass below that is 0. Whether denormals are flushed to zero makes no
difference.

Shapes: T positions, n of a chunk, V ids of this rank's shard, B blocks of 64 ids (the last may be
short), C tokens to choose from, K = min(count, V).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

MAX_VOCAB_SIZE = 1 << 24
#: Ids of a block: it minimises about B + 64 K, block maxima plus tokens in the chosen blocks.
BLOCK = 64
#: Logits per chunk; temporaries are 24 bytes for each, 96 MiB. On the host those of a row of 152k
#: should stay in the cache: chunks of 2^22 take three times as long.
_CHUNK_ENTRIES = 1 << 22
_CHUNK_ENTRIES_HOST = 1 << 17
MASS_BITS = 38
#: Masses are summed cumulatively in two halves: int32 holds the sums of up to 2^12 of each.
_HALF = 1 << MASS_BITS // 2
#: Logit differences below this have mass 0.
LOWEST = -28.0
# All constants are fp32 numbers.
LOG2_E = float.fromhex("0x1.715476p+0")
#: c5 to c1. Least relative error to 2^f for |f| <= 1/2, found by iterated least squares with p(0)
#: held at 1: 2^-23.1, and 2^-22.3 with p's roundings.
POLYNOMIAL = (
    float.fromhex("0x1.5bb9fcp-10"),
    float.fromhex("0x1.3cea9ep-7"),
    float.fromhex("0x1.c6b754p-5"),
    float.fromhex("0x1.ebf9bcp-3"),
    float.fromhex("0x1.62e42ap-1"),
)


class ShardTokens(NamedTuple):
    """The mass and first tokens of a rank's shard.

    Attributes:
        max_T: fp32, the maxima that masses are relative to.
        total_T: int64, sum of the shard's masses.
        values_TK: fp32, the logits of the shard's first K tokens, in their order.
        ids_TK: int32, their ids.
    """

    max_T: Tensor
    total_T: Tensor
    values_TK: Tensor
    ids_TK: Tensor


class Cut(NamedTuple):
    """The candidate sets of T positions, cut from their first tokens.

    Attributes:
        ids: int32 [nnz], the sets one after another, each ascending.
        offsets: int64 [T + 1] into ``ids``.
        num_candidates_T: int64, the size of the set before the label was added.
        label_appended_T: bool, the label was not among them.
        inside_T: int64, the set's mass.
    """

    ids: Tensor
    offsets: Tensor
    num_candidates_T: Tensor
    label_appended_T: Tensor
    inside_T: Tensor


def row_maxima(logits_TV: Tensor) -> Tensor:
    """Each row's largest logit, fp32 [T]; +inf where the row has a NaN."""
    return _nan_as_inf(logits_TV.amax(1).float())


def shard_tokens(
    logits_TV: Tensor, max_T: Tensor | None, *, vocab_start: int, count: int
) -> ShardTokens:
    """The shard's mass and its first ``count`` tokens (all, if it has fewer).

    Args:
        logits_TV: [T, V] logits of ids ``vocab_start`` to ``vocab_start + V``, decided on in fp32.
        max_T: fp32 [T], maxima over all shards. None: this is the only shard, and the
            maxima are computed as by ``row_maxima``. Tokens and mass of a row whose maximum is not
            finite are undefined.
    """
    entries = _CHUNK_ENTRIES_HOST if logits_TV.is_cpu else _CHUNK_ENTRIES
    rows = max(1, entries // logits_TV.shape[1])
    chunks = logits_TV.split(rows)
    maxima = [None] * len(chunks) if max_T is None else max_T.split(rows)
    parts = [
        _chunk_tokens(chunk.float(), max_n, vocab_start, count)
        for chunk, max_n in zip(chunks, maxima, strict=True)
    ]
    return ShardTokens(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _chunk_tokens(
    logits_nV: Tensor, max_n: Tensor | None, vocab_start: int, count: int
) -> ShardTokens:
    maxima_nB = _block_maxima(logits_nV)
    max_n = _nan_as_inf(maxima_nB.amax(1)) if max_n is None else max_n
    values_nK, ids_nK = first_tokens(logits_nV, maxima_nB, vocab_start, count)
    return ShardTokens(max_n, token_masses(logits_nV, max_n).sum(1), values_nK, ids_nK)


def _block_maxima(logits_nV: Tensor) -> Tensor:
    whole, rest = divmod(logits_nV.shape[1], BLOCK)
    blocks, tail = logits_nV.split([whole * BLOCK, rest], 1)
    maxima_nB = blocks.unflatten(1, (whole, BLOCK)).amax(2)
    return torch.cat([maxima_nB, tail.amax(1, keepdim=True)], 1) if rest else maxima_nB


def first_tokens(
    logits_nV: Tensor, maxima_nB: Tensor, vocab_start: int, count: int
) -> tuple[Tensor, Tensor]:
    """Logits and ids of the first ``count`` tokens (all, if there are fewer), as by ``first``.

    They are in the first ``count`` blocks by (maximum descending, block ascending). Suppose one of
    them, t, is in a block b that ``count`` blocks come before. In each of these, the first token
    with the block's maximum comes before t: its logit is larger than b's maximum, or equal to it
    with a smaller id than any in b. So ``count`` tokens come before t, a contradiction.
    """
    V, B = logits_nV.shape[1], maxima_nB.shape[1]
    count = min(count, V)
    ids = torch.arange(B * BLOCK, dtype=torch.int32, device=logits_nV.device)
    if count >= B:
        return first(logits_nV.float(), ids[:V] + vocab_start, count)
    _, blocks_nK = first(maxima_nB, ids[:B], count)
    ids_nC = (blocks_nK[:, :, None] * BLOCK + ids[:BLOCK]).flatten(1)
    values_nC = logits_nV.gather(1, ids_nC.clamp(max=V - 1).long()).float()
    if len(ids) > V:
        # Absent ids of a short block sort after every token; every block has a token.
        values_nC.masked_fill_(ids_nC >= V, -math.inf)
    return first(values_nC, ids_nC + vocab_start, count)


def first(values_nC: Tensor, ids_nC: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` tokens by (value descending, id ascending): fp32 and int32 [n, count].

    Args:
        values_nC: fp32 [n, C].
        ids_nC: int32 [n, C] or [C], in any order; below 2^24, so that fp32 represents them.
    """
    values_nC = values_nC + 0.0  # -0.0 becomes +0.0: they tie
    least_n1 = values_nC.topk(count, dim=1).values[:, -1:]
    # Distinct numbers: the ids above the least value, made negative, come before its ties.
    ids_nC = ids_nC.float()
    order_nC = torch.where(values_nC > least_n1, ids_nC - MAX_VOCAB_SIZE, ids_nC)
    order_nC.masked_fill_(values_nC < least_n1, math.inf)
    order_nK, places_nK = order_nC.topk(count, dim=1, largest=False)
    ids_nK = torch.where(order_nK < 0, order_nK + MAX_VOCAB_SIZE, order_nK).int()
    values_nK, ranks_nK = values_nC.gather(1, places_nK).sort(dim=1, descending=True, stable=True)
    return values_nK, ids_nK.gather(1, ranks_nK)


def cut_tokens(
    values_TK: Tensor,
    ids_TK: Tensor,
    total_T: Tensor,
    max_T: Tensor,
    labels_T: Tensor,
    label_logit_T: Tensor,
    *,
    coverage: float,
) -> Cut:
    """Cut the ordered tokens where the mass after the cut is at most 1 - coverage; add the labels.

    Args:
        values_TK, ids_TK: logits and ids of the first K tokens of all shards, as by ``first``.
        total_T, max_T: mass and maxima over all shards.
        labels_T, label_logit_T: int64 ids of the labels, and their fp32 logits.
    """
    masses_TK = token_masses(values_TK, max_T)
    # The condition is on the mass after the cut, an integer: rho <= 1 - coverage then holds as
    # computed, and a coverage of 1 takes all of the mass rather than a rounding of it.
    # In fp64, which NPUs have no vector unit for: on the host.
    allowed_T = (total_T.cpu().double() * (1.0 - coverage)).long().to(total_T.device)
    high_TK, low_TK = (
        half.cumsum(1, dtype=torch.int32) for half in (masses_TK // _HALF, masses_TK % _HALF)
    )
    behind_TK = total_T[:, None] - (high_TK.long() * _HALF + low_TK)
    num_T = ((behind_TK > allowed_T[:, None]).sum(1) + 1).clamp_(max=ids_TK.shape[1])
    chosen_TK = torch.arange(ids_TK.shape[1], device=ids_TK.device) < num_T[:, None]
    appended_T = ~(chosen_TK & (ids_TK == labels_T[:, None])).any(1)

    # One column more for the label; tokens left out sort after every id. Sorted as fp32, which
    # represents ids exactly: NPUs sort integers on a scalar processor.
    with_label = torch.cat([ids_TK, labels_T[:, None].int()], 1)
    keep = torch.cat([chosen_TK, appended_T[:, None]], 1)
    ordered = with_label.masked_fill(~keep, MAX_VOCAB_SIZE).float().sort(1).values.int()
    label_mass_T = token_masses(label_logit_T[:, None], max_T).squeeze(1)
    return Cut(
        ids=ordered[ordered < MAX_VOCAB_SIZE],
        offsets=torch.nn.functional.pad(keep.sum(1).cumsum(0, dtype=torch.int32), (1, 0)).long(),
        num_candidates_T=num_T,
        label_appended_T=appended_T,
        inside_T=(masses_TK * chosen_TK).sum(1) + label_mass_T * appended_T,
    )


def token_masses(logits: Tensor, max_T: Tensor) -> Tensor:
    """int64 [T, ...] masses of fp32 [T, ...] logits, given each row's maximum."""
    t = (logits - max_T[:, None]).clamp_(min=LOWEST).mul_(LOG2_E)
    k = t.round()
    f = t.sub_(k)
    c5, c4, c3, c2, c1 = POLYNOMIAL
    square = f * f
    p = (f * c5).add_(c4).mul_(square).add_((f * c3).add_(c2)).mul_(square).add_((f * c1).add_(1.0))
    # A normal fp32 number, whose exponent field is biased by 127: the product is exact.
    power = k.int().add_(MASS_BITS + 127).mul_(1 << 23).view(torch.float32)
    return p.mul_(power).round_().long()


def _nan_as_inf(max_T: Tensor) -> Tensor:
    return torch.where(max_T.isnan(), math.inf, max_T)


class SelectionBackend(NamedTuple):
    """A backend of this file's functions; all give the same bits."""

    row_maxima: Callable[[Tensor], Tensor]
    shard_tokens: Callable[..., ShardTokens]
    cut_tokens: Callable[..., Cut] = cut_tokens


TORCH_SELECTION = SelectionBackend(row_maxima, shard_tokens)
