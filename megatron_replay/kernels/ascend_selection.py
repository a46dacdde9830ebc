"""Candidate selection on Ascend NPUs: ``selection.shard_selection``'s functions, bit for bit.

An operator on the vector cores (csrc/ascend/select_candidates) reads a row of logits once, and
computes the maxima of blocks of 64 ids and the row's mass. torch computes the rows' maxima before,
and afterwards chooses the first tokens, in few blocks.

fp32, bf16 or fp16 logits. Run on an emulated core (tests/ascemu); not run on an NPU yet.

Shapes: T positions, V ids of this rank's shard, B blocks of ids, L lanes of a sum.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_replay.errors import ConfigError
from megatron_replay.kernels.ascend_head import DTYPES, check, launch
from megatron_replay.selection.shard_selection import (
    BLOCK,
    SelectionBackend,
    ShardTokens,
    first_tokens,
    row_maxima,
)

#: Ids whose masses one lane sums in 32 bits: at most 2^19 units of 2^19 each.
LANE_IDS = 2048
MIN_LANES, MAX_LANES = 64, 2048
#: Tokens of chosen blocks in one step; temporaries take 40 bytes for each, 160 MiB.
CHUNK_ENTRIES = 1 << 22


def shard_tokens(
    logits_TV: Tensor,
    max_T: Tensor | None,
    *,
    vocab_start: int,
    count: int,
    module: Any = None,
) -> ShardTokens:
    """As ``selection.shard_selection``'s.

    Args:
        module: an emulated module, for tensors on a CPU; None for the one compiled for NPUs.

    Raises:
        ConfigError: operands that the operator cannot read.
    """
    T, V = logits_TV.shape
    if logits_TV.dtype not in DTYPES or V > LANE_IDS * MAX_LANES:
        raise ConfigError(
            "unusable logits",
            where="candidate selection's ascend kernel",
            expected=f"{', '.join(map(str, DTYPES))}, at most {LANE_IDS * MAX_LANES} ids",
            found=f"{logits_TV.dtype} {list(logits_TV.shape)}",
        )
    if logits_TV.stride(1) != 1:
        logits_TV = logits_TV.contiguous()
    max_T = row_maxima(logits_TV) if max_T is None else max_T.contiguous()
    check("max_T", max_T, torch.float32, (T,), logits_TV)
    lanes = MIN_LANES
    while LANE_IDS * lanes < V:
        lanes *= 2
    B = -(-V // BLOCK)
    # Rows of whole lines of 64 bytes: a core writes a line.
    new = partial(torch.empty, device=logits_TV.device)
    maxima_TB = new(T, -(-B // 16) * 16, dtype=torch.float32)[:, :B]
    sums_T2L = new(T, 2, lanes, dtype=torch.int32)
    if T:
        tensors = (logits_TV, max_T, maxima_TB, sums_T2L)
        launch(module, "select_candidates", *tensors, sizes=(T, V, logits_TV.stride(0), lanes))
    high_T, low_T = sums_T2L.sum(2).unbind(1)
    rows = max(1, CHUNK_ENTRIES // (count * BLOCK))
    tokens = [
        first_tokens(logits, maxima, vocab_start, count)
        for logits, maxima in zip(logits_TV.split(rows), maxima_TB.split(rows), strict=True)
    ]
    return ShardTokens(max_T, high_T * 2**19 + low_T, *map(torch.cat, zip(*tokens, strict=True)))


def backend(module: Any = None) -> SelectionBackend:
    """The selection of NPUs; ``module`` as for ``shard_tokens``."""
    return SelectionBackend(row_maxima, partial(shard_tokens, module=module))
