"""Dynamic Top-K candidate sets (Eq. 1 and 2), exact and alike for every vocabulary sharding.

Shapes: T positions, V ids of this rank's shard, K = max_candidates, G = tensor parallel size.

The cut asks whether a sum of probabilities reaches the coverage. Floating-point sums depend on
their order, and the order on the sharding, so a cut near the threshold would move with TP. Here a
probability's numerator exp(z - max) is counted in units of 2^-38, as an int64: integer sums do not
depend on order, so equal logits give bitwise equal sets on one process and on many.

Rounding to units errs by at most 2^-39 a token, V * 2^-39 in all, where the largest numerator is
one: 2.8e-7 of the total for V = 151,936, about one unit in the last place of fp32. The total is
below 2^63 for V <= 2^24.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

MASS_BITS = 38
MAX_VOCAB_SIZE = 1 << 24
#: Entries of [rows, V] that exist as int64 at one time: 128 MiB.
_ENTRIES_AT_A_TIME = 1 << 24
_ID_BITS = 32


@dataclass(frozen=True, eq=False)
class CandidateSets:
    """The candidate sets of T positions.

    Attributes:
        ids: int32 [nnz], the sets one after another, each ascending.
        offsets: int64 [T + 1] into ``ids``.
        lse_T: fp32, log-sum-exp of the logits over the whole vocabulary.
        gold_logprob_T: fp32, log p of the label.
        tail_mass_T: fp32, probability outside the set.
        max_logprob_T: fp32, log of the largest probability: the position's confidence.
        gold_appended_T: bool, the label was not among the first K.
    """

    ids: Tensor
    offsets: Tensor
    lse_T: Tensor
    gold_logprob_T: Tensor
    tail_mass_T: Tensor
    max_logprob_T: Tensor
    gold_appended_T: Tensor


@torch.no_grad()
def select_candidates(
    logits_TV: Tensor,
    labels_T: Tensor,
    *,
    coverage: float = 0.95,
    max_candidates: int = 200,
    vocab_start: int = 0,
    tp_group: dist.ProcessGroup | None = None,
) -> CandidateSets:
    """Select S_t = {i_1, ..., i_K} + {x_t} with K = min(K*, max_candidates).

    Tokens are ordered by (logit descending, id ascending); K* is the least k whose first k tokens
    hold a probability of at least ``coverage``. Decisions are made on fp32 logits.

    Args:
        logits_TV: [T, V] logits of ids ``vocab_start`` to ``vocab_start + V``; any float dtype.
        labels_T: int64 [T], the gold tokens x_t, ids of the whole vocabulary.
        coverage: tau in (0, 1].
        max_candidates: K_max, 1 to 255.
        tp_group: processes that hold the other shards; all get the same result.

    Returns:
        The sets; on equal logits, bitwise the same for every sharding.

    Raises:
        ValueError: an argument is out of range, or a row of logits holds NaN or +inf.

    Communication over ``tp_group``: all-reduce MAX [T, 2], SUM int64 [T]; all-gather of
    max_candidates fp32 and int32 a row.
    """
    _check_arguments(logits_TV, labels_T, coverage, max_candidates)
    rows = max(1, _ENTRIES_AT_A_TIME // max(1, logits_TV.shape[1]))
    parts = [
        _select_rows(logits, labels, coverage, max_candidates, vocab_start, tp_group)
        for logits, labels in zip(logits_TV.split(rows), labels_T.split(rows), strict=True)
        if len(logits)
    ]
    if not parts:
        parts = [_no_rows(logits_TV.device)]
    sizes = torch.cat([part.offsets.diff() for part in parts])
    joined = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in CandidateSets.__dataclass_fields__
        if name != "offsets"
    }
    return CandidateSets(offsets=_offsets(sizes), **joined)


def _select_rows(
    logits_TV: Tensor,
    labels_T: Tensor,
    coverage: float,
    max_candidates: int,
    vocab_start: int,
    tp_group: dist.ProcessGroup | None,
) -> CandidateSets:
    logits_TV = logits_TV.float() + 0.0  # -0.0 becomes +0.0: they tie
    gold_T, max_T = _gold_and_max(logits_TV, labels_T, vocab_start, tp_group)
    total_T = _masses(logits_TV, max_T).sum(1)
    if tp_group is not None:
        dist.all_reduce(total_T, group=tp_group)
    values_TK, ids_TK = _top(logits_TV, vocab_start, max_candidates, tp_group)
    masses_TK = _masses(values_TK, max_T)
    # mass of the first k >= coverage * total, decided in integers
    needed_T = torch.ceil(total_T.double() * coverage).long()
    short_TK = masses_TK.cumsum(1) < needed_T[:, None]
    num_T = (short_TK.sum(1) + 1).clamp(max=values_TK.shape[1])
    chosen_TK = torch.arange(values_TK.shape[1], device=ids_TK.device) < num_T[:, None]
    gold_appended_T = ~(chosen_TK & (ids_TK == labels_T[:, None])).any(1)
    # One column more for the gold; absent entries sort behind every id.
    absent = torch.iinfo(torch.int32).max
    padded = torch.cat([ids_TK, labels_T[:, None].int()], 1)
    keep = torch.cat([chosen_TK, gold_appended_T[:, None]], 1)
    ordered, _ = padded.masked_fill(~keep, absent).sort(1)
    gold_mass_T = _masses(gold_T[:, None], max_T).squeeze(1)
    inside_T = (masses_TK * chosen_TK).sum(1) + gold_mass_T * gold_appended_T
    log_total_T = torch.log(total_T.double()) - MASS_BITS * math.log(2)
    lse_T = (max_T.double() + log_total_T).float()
    return CandidateSets(
        ids=ordered[ordered != absent],
        offsets=_offsets(keep.sum(1)),
        lse_T=lse_T,
        gold_logprob_T=(gold_T.double() - max_T.double() - log_total_T).float(),
        tail_mass_T=((total_T - inside_T).double() / total_T.double()).float(),
        max_logprob_T=(-log_total_T).float(),
        gold_appended_T=gold_appended_T,
    )


def _gold_and_max(
    logits_TV: Tensor, labels_T: Tensor, vocab_start: int, tp_group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """The labels' logits and the rows' maxima over the whole vocabulary. One all-reduce MAX."""
    local_T = labels_T - vocab_start
    owned_T = (local_T >= 0) & (local_T < logits_TV.shape[1])
    gold_T = logits_TV.gather(1, local_T.clamp(0, logits_TV.shape[1] - 1)[:, None]).squeeze(1)
    gold_T = torch.where(owned_T, gold_T, -math.inf)
    both_T2 = torch.stack([gold_T, logits_TV.amax(1)], 1)
    # MAX drops a NaN on some backends: it travels as +inf, which is refused as well.
    both_T2[:, 1] = torch.where(both_T2[:, 1].isnan(), math.inf, both_T2[:, 1])
    if tp_group is not None:
        dist.all_reduce(both_T2, op=dist.ReduceOp.MAX, group=tp_group)
    gold_T, max_T = both_T2.unbind(1)
    bad = (~max_T.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"row {bad[0]} of the logits holds NaN or infinity ({len(bad)} rows do)")
    if (gold_T == -math.inf).any():
        row = int((gold_T == -math.inf).nonzero()[0])
        raise ValueError(f"label {int(labels_T[row])} of row {row} is outside the vocabulary")
    return gold_T, max_T


def _masses(logits: Tensor, max_T: Tensor) -> Tensor:
    """exp(z - max) in units of 2^-38, int64."""
    return torch.exp(logits - max_T[:, None]).mul_(2.0**MASS_BITS).round_().long()


def _top(
    logits_TV: Tensor, vocab_start: int, count: int, tp_group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """The first ``count`` (values fp32, ids int32) of the whole vocabulary, in order."""
    values_TK, ids_TK = _top_of_shard(logits_TV, count)
    ids_TK = ids_TK + vocab_start
    if tp_group is None or dist.get_world_size(tp_group) == 1:
        return values_TK, ids_TK
    # Every shard sends the same number, padded with values that lose against any logit.
    missing = count - values_TK.shape[1]
    values_TK = torch.nn.functional.pad(values_TK, (0, missing), value=-math.inf)
    ids_TK = torch.nn.functional.pad(ids_TK, (0, missing), value=-1)
    size = dist.get_world_size(tp_group)
    all_values = [torch.empty_like(values_TK) for _ in range(size)]
    all_ids = [torch.empty_like(ids_TK) for _ in range(size)]
    dist.all_gather(all_values, values_TK.contiguous(), group=tp_group)
    dist.all_gather(all_ids, ids_TK.contiguous(), group=tp_group)
    values, ids = torch.cat(all_values, 1), torch.cat(all_ids, 1)
    real = int((ids[0] >= 0).sum())
    keys = torch.where(ids >= 0, _keys(values, ids), torch.iinfo(torch.int64).min)
    return _from_keys(keys.topk(min(count, real), dim=1).values)


def _top_of_shard(logits_TV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Like ``_top`` for one shard, ids from 0.

    ``torch.topk`` leaves open which of equal values it returns. Only a tie across the cut matters,
    so rows with one are done again on keys that hold value and id; in fp32 they are rare.
    """
    V = logits_TV.shape[1]
    count = min(count, V)
    values, ids = logits_TV.topk(min(count + 1, V), dim=1)
    keys = _keys(values[:, :count], ids[:, :count])
    if count < V:
        tied = (values[:, count - 1] == values[:, count]).nonzero().flatten()
        if len(tied):
            every_id = torch.arange(V, device=logits_TV.device)
            keys[tied] = _keys(logits_TV[tied], every_id).topk(count, dim=1).values
    return _from_keys(keys.sort(1, descending=True).values)


def _keys(values: Tensor, ids: Tensor) -> Tensor:
    """int64 keys that sort as (value ascending, id descending): value's bits high, id's low."""
    bits = values.contiguous().view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats sort backwards as integers
    return (ordered.long() << _ID_BITS) + (MAX_VOCAB_SIZE - ids.long())


def _from_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    ordered = (keys >> _ID_BITS).int()
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    ids = MAX_VOCAB_SIZE - (keys & ((1 << _ID_BITS) - 1))
    return bits.view(torch.float32), ids.int()


def _offsets(sizes: Tensor) -> Tensor:
    return torch.nn.functional.pad(sizes.long().cumsum(0), (1, 0))


def _no_rows(device: torch.device) -> CandidateSets:
    empty = torch.empty(0, device=device)
    return CandidateSets(
        ids=empty.int(),
        offsets=torch.zeros(1, dtype=torch.int64, device=device),
        lse_T=empty,
        gold_logprob_T=empty,
        tail_mass_T=empty,
        max_logprob_T=empty,
        gold_appended_T=empty.bool(),
    )


def _check_arguments(
    logits_TV: Tensor, labels_T: Tensor, coverage: float, max_candidates: int
) -> None:
    if logits_TV.dim() != 2 or labels_T.shape != logits_TV.shape[:1]:
        raise ValueError(
            f"expected logits [T, V] and labels [T], found {tuple(logits_TV.shape)} and "
            f"{tuple(labels_T.shape)}"
        )
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage must be above 0 and at most 1, found {coverage}")
    if not 1 <= max_candidates <= 255:
        raise ValueError(f"max_candidates must be 1 to 255, found {max_candidates}")
