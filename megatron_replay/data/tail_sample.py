"""Which ids ``--tail sampled`` draws for a micro-batch, and what a rank needs of them.

On the host, beside the step, as ``shard.sets_of_shard``: which of them are candidates is told by
numbers for which the host would have to wait.

Shapes: R drawn ids, P pairs of a set and a candidate of the shard.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from megatron_replay.data.loader import to_device
from megatron_replay.functional.sampled_tail import TailSample, TailSpan
from megatron_replay.functional.shard_head import ShardSets, VocabShard

#: Apart from the words that order documents: a seed's last word of zero is as none (numpy).
_STREAM = int.from_bytes(b"tail", "big")
#: Positions, and logits, multiplied at one time.
_SPAN_POSITIONS = 1024
_SPAN_LOGITS = 1 << 24


def draw_ids(
    vocab_size: int, num_samples: int, *, seed: int, iteration: int, micro_batch: int
) -> npt.NDArray[np.int64]:
    """``num_samples`` distinct ids, ascending: a uniform draw, a pure function of the arguments.

    Those with the least raw Philox words (``packing.document_order`` says why raw).
    """
    assert 0 < num_samples <= vocab_size, (num_samples, vocab_size)
    entropy = np.random.SeedSequence([seed, iteration, micro_batch, _STREAM])
    words = np.random.Philox(entropy).random_raw(vocab_size)
    if num_samples == vocab_size:
        return np.arange(vocab_size)
    return np.sort(np.argpartition(words, num_samples)[:num_samples])


def tail_sample(
    sets: ShardSets, shard: VocabShard, ids_R: npt.NDArray[np.int64], *, vocab_size: int
) -> TailSample:
    """The drawn ids cut to ``shard``, and which of them are in which of ``sets``, on the host."""
    rows, inside = shard.rows(cast(Any, ids_R))
    rows = cast(Any, rows)[cast(Any, inside)]
    place_V = np.full(shard.num_rows, -1, np.int64)
    place_V[rows] = np.arange(len(rows))
    place_P = place_V[sets.ids.numpy()]
    pairs = np.flatnonzero(place_P >= 0)
    set_of_pair = np.searchsorted(sets.offsets.numpy(), pairs, side="right") - 1
    set_of_N = None
    if sets.group_offsets is not None:
        positions_G = np.diff(sets.group_offsets.numpy())
        set_of_N = np.repeat(np.arange(len(positions_G)), positions_G)
    return TailSample(
        rows_R=torch.from_numpy(rows),
        excluded_E=torch.from_numpy(set_of_pair * len(rows) + place_P[pairs]),
        set_of_N=None if set_of_N is None else torch.from_numpy(set_of_N),
        log_weight=math.log(vocab_size / len(ids_R)),
        spans=_spans(len(sets.labels_N), set_of_N, set_of_pair, len(rows)),
    )


def sample_to_device(sample: TailSample, device: torch.device) -> TailSample:
    """The same sample on ``device``."""
    return sample.moved(lambda tensor: to_device(tensor, device))


def _spans(
    num_positions: int,
    set_of_N: npt.NDArray[np.int64] | None,
    set_of_pair: npt.NDArray[np.int64],
    num_rows: int,
) -> list[TailSpan]:
    """None where the shard has no drawn row."""
    if not num_rows:
        return []
    step = max(1, min(_SPAN_POSITIONS, _SPAN_LOGITS // num_rows))
    spans = []
    for first in range(0, num_positions, step):
        last = min(first + step, num_positions)
        sets = slice(first, last)
        if set_of_N is not None:
            sets = slice(int(set_of_N[first]), int(set_of_N[last - 1]) + 1)
        start, stop = np.searchsorted(set_of_pair, (sets.start, sets.stop)).tolist()
        spans.append(TailSpan(slice(first, last), sets, slice(start, stop)))
    return spans
