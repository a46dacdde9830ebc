"""What a rank does for candidate selection, without communication, and its torch backend.

Tokens are ordered by (logit descending, id ascending). A key is an int64 that holds both: keys sort
as tokens do, and each token has its own, so a top-k over keys has one answer.

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
short), C ids of a row's chosen blocks, K = min(count, V).
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
_ID_BITS = 32
MASS_BITS = 38
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
        keys_TK: int64, the shard's first K tokens, descending.
    """

    max_T: Tensor
    total_T: Tensor
    keys_TK: Tensor


class Cut(NamedTuple):
    """The candidate sets of T positions, cut from their keys.

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
    keys_nK = first_tokens(logits_nV, maxima_nB, vocab_start, count)
    return ShardTokens(max_n, token_masses(logits_nV, max_n).sum(1), keys_nK)


def _block_maxima(logits_nV: Tensor) -> Tensor:
    whole, rest = divmod(logits_nV.shape[1], BLOCK)
    blocks, tail = logits_nV.split([whole * BLOCK, rest], 1)
    maxima_nB = blocks.unflatten(1, (whole, BLOCK)).amax(2)
    return torch.cat([maxima_nB, tail.amax(1, keepdim=True)], 1) if rest else maxima_nB


def first_tokens(logits_nV: Tensor, maxima_nB: Tensor, vocab_start: int, count: int) -> Tensor:
    """Keys of the first ``count`` tokens (all, if there are fewer), descending.

    They are in the first ``count`` blocks by (maximum descending, block ascending). Suppose one of
    them, t, is in a block b that ``count`` blocks come before. In each of these, the first token
    with the block's maximum comes before t: its logit is larger than b's maximum, or equal to it
    with a smaller id than any in b. So ``count`` tokens come before t, a contradiction.
    """
    V, B = logits_nV.shape[1], maxima_nB.shape[1]
    count = min(count, V)
    ids = torch.arange(B * BLOCK, device=logits_nV.device)
    if count >= B:
        keys = token_keys(logits_nV.float(), ids[:V] + vocab_start)
    else:
        blocks_nK = token_keys(maxima_nB, ids[:B]).topk(count, dim=1, sorted=False).indices
        ids_nC = (blocks_nK[:, :, None] * BLOCK + ids[:BLOCK]).flatten(1)
        values_nC = logits_nV.gather(1, ids_nC.clamp(max=V - 1)).float()
        if len(ids) > V:
            # Absent ids of a short block sort after every token; every block has a token.
            values_nC.masked_fill_(ids_nC >= V, -math.inf)
        keys = token_keys(values_nC, ids_nC + vocab_start)
    return keys.topk(count, dim=1).values


def cut_tokens(
    keys_TK: Tensor,
    total_T: Tensor,
    max_T: Tensor,
    labels_T: Tensor,
    label_logit_T: Tensor,
    *,
    coverage: float,
) -> Cut:
    """Cut the ordered tokens where the mass after the cut is at most 1 - coverage; add the labels.

    Args:
        keys_TK: the first K tokens of all shards, descending.
        total_T, max_T: mass and maxima over all shards.
        labels_T, label_logit_T: int64 ids of the labels, and their fp32 logits.
    """
    values_TK, ids_TK = values_and_ids(keys_TK)
    masses_TK = token_masses(values_TK, max_T)
    # The condition is on the mass after the cut, an integer: rho <= 1 - coverage then holds as
    # computed, and a coverage of 1 takes all of the mass rather than a rounding of it.
    allowed_T = (total_T.double() * (1.0 - coverage)).long()
    behind_TK = total_T[:, None] - masses_TK.cumsum(1)
    num_T = ((behind_TK > allowed_T[:, None]).sum(1) + 1).clamp_(max=keys_TK.shape[1])
    chosen_TK = torch.arange(keys_TK.shape[1], device=ids_TK.device) < num_T[:, None]
    appended_T = ~(chosen_TK & (ids_TK == labels_T[:, None])).any(1)

    # One column more for the label; tokens left out sort after every id. Sorted as fp32, which
    # represents ids exactly: NPUs sort integers on a scalar processor.
    with_label = torch.cat([ids_TK, labels_T[:, None].int()], 1)
    keep = torch.cat([chosen_TK, appended_T[:, None]], 1)
    ordered = with_label.masked_fill(~keep, MAX_VOCAB_SIZE).float().sort(1).values.int()
    label_mass_T = token_masses(label_logit_T[:, None], max_T).squeeze(1)
    return Cut(
        ids=ordered[ordered < MAX_VOCAB_SIZE],
        offsets=torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0)),
        num_candidates_T=num_T,
        label_appended_T=appended_T,
        inside_T=(masses_TK * chosen_TK).sum(1) + label_mass_T * appended_T,
    )


def token_keys(values: Tensor, ids: Tensor) -> Tensor:
    """int64 keys that sort as (value ascending, id descending): value's bits high, id's low."""
    bits = (values + 0.0).view(torch.int32)  # -0.0 becomes +0.0: they tie
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats sort backwards as integers
    return (ordered.long() << _ID_BITS) + (MAX_VOCAB_SIZE - ids.long())


def values_and_ids(keys: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 values and int32 ids, the inverse of ``token_keys``."""
    ordered = (keys >> _ID_BITS).int()
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    ids = MAX_VOCAB_SIZE - (keys & ((1 << _ID_BITS) - 1))
    return bits.view(torch.float32), ids.int()


def token_masses(logits: Tensor, max_T: Tensor) -> Tensor:
    """int64 [T, ...] masses of fp32 [T, ...] logits, given each row's maximum."""
    t = (logits - max_T[:, None]).clamp_(min=LOWEST).mul_(LOG2_E)
    k = t.round()
    f = t.sub_(k)
    c5, c4, c3, c2, c1 = POLYNOMIAL
    square = f * f
    p = (f * c5).add_(c4).mul_(square).add_((f * c3).add_(c2)).mul_(square).add_((f * c1).add_(1.0))
    # A normal fp32 number, whose exponent field is biased by 127: the product is exact.
    power = k.int().add_(MASS_BITS + 127).bitwise_left_shift_(23).view(torch.float32)
    return p.mul_(power).round_().long()


def _nan_as_inf(max_T: Tensor) -> Tensor:
    return torch.where(max_T.isnan(), math.inf, max_T)


class SelectionBackend(NamedTuple):
    """A backend of this file's functions; all give the same bits."""

    row_maxima: Callable[[Tensor], Tensor]
    shard_tokens: Callable[..., ShardTokens]
    cut_tokens: Callable[..., Cut] = cut_tokens


TORCH_SELECTION = SelectionBackend(row_maxima, shard_tokens)
