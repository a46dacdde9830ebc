"""The restricted head on Ascend NPUs: a form as in ``functional.shard_head``.

Position scope on the vector cores, by the operators of csrc/ascend; document scope is dense
products, which are for the cube units, through torch. Importing this fails where the operators were
not built.

Run on an emulated core (tests/kernels/test_head.py); not run on an NPU yet.
"""

from __future__ import annotations

from megatron_replay.functional.pair_head import PairHead
from megatron_replay.functional.shard_head import ShardHead, ShardSets
from megatron_replay.functional.tiled_head import union_head
from megatron_replay.kernels.ascend import operators

_OPERATORS = operators.PairOperators(operators.load())


def head(sets: ShardSets) -> ShardHead:
    """The operators in position scope, dense products in document scope."""
    if sets.group_offsets is None:
        return PairHead(sets, _OPERATORS)
    return union_head(sets)


head.reads_by_id = True  # type: ignore[attr-defined]
