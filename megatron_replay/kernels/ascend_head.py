"""The restricted head on Ascend NPUs: the operators of csrc/ascend on the vector cores.

Shared sets are dense products, which are for the cube units, through torch. Importing this fails
where the operators were not built.

Run on an emulated core (tests/kernels/test_head.py); not run on an NPU yet.
"""

from __future__ import annotations

from megatron_replay.kernels import ascend_operators as operators
from megatron_replay.loss.pairs import pair_backend

operators.load()
BACKEND = pair_backend(operators.PairOperators())
