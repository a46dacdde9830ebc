"""Defines what runs on one rank: the protocol of a restricted-head backend, and shared parts.

A backend does one rank's arithmetic over its rows of the output layer, without communication;
``sharded`` combines the ranks and is the same for all backends. ``kernels.HEAD`` chooses one:

    torch    blocks.py                 the definition, at the cost of full softmax
    union    blocks.py                 dense products over unions of neighbours' sets, any device
    cpu      kernels/cpu_head.py       compiled, SIMD and threads
    triton   kernels/triton_head.py    two operators over pairs (pairs.py), for CUDA
    ascend   kernels/ascend_head.py    the same two operators, for NPUs

Shapes: N positions, V rows of this rank's shard of the output layer, H hidden channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_replay.loss.candidate_sets import CandidateSets


class Partials(NamedTuple):
    """The partial sums over each position's candidates in this shard, fp32 [N] each.

    Attributes:
        max_N: the largest logit; -inf if there is none.
        sum_N: sum of exp(z - max); 0 if there is none.
        label_logit_N: the label's logit; -inf if the label is not among them.
    """

    max_N: Tensor
    sum_N: Tensor
    label_logit_N: Tensor


class Softmax(NamedTuple):
    """p = exp(z - top) / total, over all shards and with the tail; fp32 [N] each.

    Two numbers rather than one log-sum-exp: the quotient keeps the bits that z - lse rounds off.
    """

    top_N: Tensor
    total_N: Tensor


class ShardHead(Protocol):
    """A backend bound to one batch. ``forward`` comes first, ``backward`` once after it.

    Computes in fp32 whatever the operands' dtype, except that ``blocks`` multiplies bf16 as it is
    on accelerators. Equal input gives equal bits on every run: for any number of threads where the
    arithmetic is the backend's own; for the same number of threads where BLAS computes it, because
    BLAS splits its sums over threads.
    """

    def forward(self, hidden_NH: Tensor, weight_VH: Tensor) -> Partials:
        """z[p] = <hidden[n], weight[id]> of every pair, reduced to each position's partials."""
        ...

    def backward(
        self,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        softmax: Softmax,
        grad_N: Tensor,
        *,
        hidden_grad: bool,
        weight_grad_out: Tensor | None,
    ) -> Tensor | None:
        """With dz = (exp(z - top) / total - [label]) * grad: dH = dz W, and dW = dz^T H.

        Args:
            hidden_NH, weight_VH: those of ``forward``.
            softmax: of every position, over all shards.
            grad_N: fp32, the upstream gradient of each position's loss.
            weight_grad_out: fp32 [V, H]; dW is added to the rows of candidates, others are not
                changed. None: dW is not computed.

        Returns:
            dH of this shard's candidates, fp32 [N, H]; None unless ``hidden_grad``.
        """
        ...


@dataclass(frozen=True)
class HeadBackend:
    """Binds a batch's sets to code that runs on a device.

    Attributes:
        bind: takes sets that are cut to this rank's shard, on the device of the operands.
        reads_transpose: whether it reads ``CandidateSets.transpose``.
    """

    bind: Callable[[CandidateSets], ShardHead]
    reads_transpose: bool = False


_LOWEST = torch.finfo(torch.float32).min


def rescale(old_N: Tensor, new_N: Tensor) -> Tensor:
    """exp(old - new), which rescales a sum from maximum old to new; 0 where old is -inf."""
    return torch.exp(old_N - finite(new_N))


def finite(max_N: Tensor) -> Tensor:
    """Replaces -inf, the maximum without a candidate, because -inf - -inf is NaN."""
    return max_N.clamp(min=_LOWEST)


def no_partials(like_NH: Tensor) -> Partials:
    """The partials of positions without a candidate."""
    max_N, label_logit_N = like_NH.new_full((2, len(like_NH)), -math.inf, dtype=torch.float32)
    return Partials(max_N, torch.zeros_like(max_N), label_logit_N)


def zeros(like: Tensor) -> Tensor:
    """A zero gradient to sum into: fp32, contiguous, of the shape of ``like``."""
    return like.new_zeros(like.shape, dtype=torch.float32)
