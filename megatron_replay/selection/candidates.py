"""Selects dynamic Top-K candidate sets (Eq. 1 and 2), the same for every vocabulary sharding.

Shapes: T positions, V ids of this rank's shard, K = min(max_candidates, V) or, over all shards,
max_candidates.

A set ends where a sum of probabilities reaches the coverage. Floating-point sums depend on their
order, and the order on the sharding, so a cut near the threshold would move with TP. Here a token's
mass exp(z - max) is an int64 in units of 2^-38 (``shard_selection``). Integer sums do not depend on
the order, nor a mass on the device, so equal logits give bitwise equal sets for any number of
processes and on any device.

The error against real arithmetic on the fp32 logits: the exponential and the fp32 difference
z - max err by less than 2^-18 of a mass (2^-19.05, and the difference rounds by half a unit of its
last place, 2^-20 where it is below 32). Where the masses before and after a cut have a relative
error e, the share of one errs by at most e / 2, 2^-19. Rounding to units errs by at most 2^-39 a
token, V * 2^-39 in all: 2.8e-7 for V = 151,936, where the largest mass is one. So a cut may differ
from that of real arithmetic only where a cumulative probability is within 2^-19 + V * 2^-39 of the
coverage. Tokens below e^-27.1 of the largest have mass 0. The total is below 2^63 for V <= 2^24.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_replay.errors import ConfigError, DataError, TrainingError
from megatron_replay.selection.shard_selection import (
    MASS_BITS,
    MAX_VOCAB_SIZE,
    TORCH_SELECTION,
    SelectionBackend,
    first,
)

#: The store has one byte for the number of a set's other members.
MAX_CANDIDATES = 255


@dataclass(frozen=True, eq=False)
class SelectedCandidates:
    """The candidate sets of T positions.

    Attributes:
        ids: int32 [nnz], the sets one after another, each ascending.
        offsets: int64 [T + 1] into ``ids``.
        num_candidates_T: int64, K: the size of the set before the label was added.
        label_appended_T: bool, the label was not among the first K.
        lse_T: fp32, log-sum-exp of the logits over the whole vocabulary.
        label_logprob_T: fp32, log p of the label.
        max_logprob_T: fp32, log of the largest probability: the position's confidence.
        tail_mass_T: fp32, probability outside the set.
    """

    ids: Tensor
    offsets: Tensor
    num_candidates_T: Tensor
    label_appended_T: Tensor
    lse_T: Tensor
    label_logprob_T: Tensor
    max_logprob_T: Tensor
    tail_mass_T: Tensor


@torch.no_grad()
def select_candidates(
    logits_TV: Tensor,
    labels_T: Tensor,
    *,
    coverage: float = 0.95,
    max_candidates: int = 200,
    vocab_start: int = 0,
    tp_group: dist.ProcessGroup | None = None,
    backend: SelectionBackend = TORCH_SELECTION,
) -> SelectedCandidates:
    """Select S_t = {i_1, ..., i_K} + {x_t} with K = min(K*, max_candidates).

    Tokens are ordered by (logit descending, id ascending); K* is the least k whose first k tokens
    hold a probability of at least ``coverage``. Decisions are made on fp32 logits.

    Args:
        logits_TV: [T, V] logits of ids ``vocab_start`` to ``vocab_start + V``; any float dtype. A
            shard may be of any size but zero; -inf is a token of probability 0.
        labels_T: int64 [T], the labels x_t, ids of the whole vocabulary.
        coverage: tau in (0, 1].
        max_candidates: K_max, 1 to 255.
        tp_group: processes that hold the other shards; all get the same result.
        backend: what does this rank's part.

    Returns:
        The sets, on the device of the logits; on equal logits, bitwise the same for every sharding
        and backend. On another host, fp32 fields may round differently, as its fp64 logarithm does;
        sets, K and tails do not.

    Raises:
        ConfigError: ``coverage`` or ``max_candidates`` is out of range.
        DataError: shapes do not fit, or a label is outside the vocabulary.
        TrainingError: a row has NaN or +inf, or only -inf, or its label has -inf.

    Communication over ``tp_group``, whatever T is: all-reduce MAX fp32 [T, 3], all-reduce SUM
    int64 [T], all-gather int32 [T, 2 max_candidates]. Memory beyond the logits: a chunk's
    temporaries, and the gathered tokens, 8 bytes * T * K_max * TP.
    """
    _check_arguments(logits_TV, labels_T, coverage, max_candidates, vocab_start)
    options = {"vocab_start": vocab_start, "count": max_candidates}
    if _is_shared(tp_group, labels_T):
        local_max_T = backend.row_maxima(logits_TV)
        label_logit_T, max_T = _label_and_max(
            logits_TV, labels_T, local_max_T, vocab_start, tp_group
        )
        _, total_T, values_TK, ids_TK = backend.shard_tokens(logits_TV, max_T, **options)
        dist.all_reduce(total_T, group=tp_group)
        values_TK, ids_TK = _merge(values_TK, ids_TK, max_candidates, tp_group)
    else:
        # No maxima to wait for: a backend can do a row in one go, while it is in the cache.
        max_T, total_T, values_TK, ids_TK = backend.shard_tokens(logits_TV, None, **options)
        label_logit_T, max_T = _label_and_max(logits_TV, labels_T, max_T, vocab_start, None)
    cut = backend.cut_tokens(
        values_TK, ids_TK, total_T, max_T, labels_T, label_logit_T, coverage=coverage
    )
    total, outside, largest, label = (
        x.cpu().double() for x in (total_T, total_T - cut.inside_T, max_T, label_logit_T)
    )
    log_total = torch.log(total * 2.0**-MASS_BITS)  # the largest has 2^38: log >= 0
    fields = largest + log_total, label - largest - log_total, 0.0 - log_total, outside / total
    lse_T, label_logprob_T, max_logprob_T, tail_mass_T = (
        x.float().to(logits_TV.device) for x in fields
    )
    return SelectedCandidates(
        ids=cut.ids,
        offsets=cut.offsets,
        num_candidates_T=cut.num_candidates_T,
        label_appended_T=cut.label_appended_T,
        lse_T=lse_T,
        label_logprob_T=label_logprob_T,
        max_logprob_T=max_logprob_T,
        tail_mass_T=tail_mass_T,
    )


def _label_and_max(
    logits_TV: Tensor,
    labels_T: Tensor,
    max_T: Tensor,
    vocab_start: int,
    tp_group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """The labels' logits and the rows' maxima over the whole vocabulary: fp32 [T] each.

    ``max_T`` has the shard's maxima, with +inf for NaN, since MAX drops NaN on some backends.
    Values are checked after the all-reduce, so that all ranks raise if one does.
    """
    V = logits_TV.shape[1]
    local_T = labels_T - vocab_start
    owned_T = (local_T >= 0) & (local_T < V)
    label_logit_T = logits_TV.gather(1, local_T.clamp(0, V - 1)[:, None]).squeeze(1).float()
    label_logit_T = torch.where(owned_T, label_logit_T, -math.inf)
    facts_T3 = torch.stack([label_logit_T, max_T, owned_T.float()], 1)
    if _is_shared(tp_group, labels_T):
        dist.all_reduce(facts_T3, op=dist.ReduceOp.MAX, group=tp_group)
    label_logit_T, max_T, owned_T = facts_T3.unbind(1)
    if (row := _first(owned_T == 0)) is not None:
        raise DataError(
            "a label is outside the vocabulary",
            where=f"row {row}",
            found=int(labels_T[row]),
            fix="Use the model's own tokenizer, and leave out positions without a label (-100)",
        )
    if (row := _first(~max_T.isfinite())) is not None:
        raise TrainingError(
            "the logits have NaN or infinity, or only -infinity",
            where=f"row {row}",
            found=f"{int((~max_T.isfinite()).sum())} such rows of {len(max_T)}",
        )
    if (row := _first(label_logit_T == -math.inf)) is not None:
        raise TrainingError(
            "the label's logit is -infinity: the loss would be infinite",
            where=f"row {row}",
            found=f"label {int(labels_T[row])}",
        )
    return label_logit_T, max_T


def _merge(
    values_TK: Tensor, ids_TK: Tensor, count: int, tp_group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """The first ``count`` tokens of all shards. One all-gather."""
    # A shard with fewer tokens sends absent ones, which sort after every token and have mass 0.
    missing = (0, count - ids_TK.shape[1])
    values_TK = torch.nn.functional.pad(values_TK, missing, value=-math.inf)
    ids_TK = torch.nn.functional.pad(ids_TK, missing, value=MAX_VOCAB_SIZE)
    both = torch.stack([values_TK.view(torch.int32), ids_TK])
    shards = [torch.empty_like(both) for _ in range(dist.get_world_size(tp_group))]
    dist.all_gather(shards, both, group=tp_group)
    bits, ids = torch.cat(shards, 2)
    return first(bits.view(torch.float32), ids, count)


def _is_shared(tp_group: dist.ProcessGroup | None, labels_T: Tensor) -> bool:
    """Whether ``tp_group`` has another rank, and there are rows to exchange."""
    return tp_group is not None and len(labels_T) > 0 and dist.get_world_size(tp_group) > 1


def _first(wrong_T: Tensor) -> int | None:
    rows = wrong_T.nonzero()
    return int(rows[0]) if len(rows) else None


def _check_arguments(
    logits_TV: Tensor, labels_T: Tensor, coverage: float, max_candidates: int, vocab_start: int
) -> None:
    for name, expected, found, fits in (
        ("coverage", "(0, 1]", coverage, 0 < coverage <= 1),
        ("max_candidates", "1 to 255", max_candidates, 1 <= max_candidates <= MAX_CANDIDATES),
    ):
        if not fits:
            raise ConfigError("out of range", where=name, expected=expected, found=found)
    if logits_TV.dim() != 2 or labels_T.shape != logits_TV.shape[:1] or not logits_TV.shape[1]:
        raise DataError(
            "shapes do not fit",
            expected="logits [T, V] with V > 0, labels [T]",
            found=f"{list(logits_TV.shape)} and {list(labels_T.shape)}",
        )
    if vocab_start < 0 or vocab_start + logits_TV.shape[1] > MAX_VOCAB_SIZE:
        raise ConfigError(
            "the vocabulary is too large for exact integer masses",
            expected=f"ids 0 to {MAX_VOCAB_SIZE - 1}",
            found=f"{vocab_start} to {vocab_start + logits_TV.shape[1] - 1}",
        )
