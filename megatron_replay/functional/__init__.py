"""The mathematics: torch and explicit process groups, nothing of Megatron.

Works on one process without any group; a vocabulary shard enters as ``vocab_start``, ``tp_group``.
What is called from here runs in the fastest form for its tensors; the modules below know no form
but torch's.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from megatron_replay.functional import candidates
from megatron_replay.functional import restricted_cross_entropy as _restricted
from megatron_replay.functional.candidates import CandidateSets
from megatron_replay.functional.full_cross_entropy import (
    outside_mass,
    vocab_parallel_cross_entropy,
)
from megatron_replay.functional.positions import select_positions
from megatron_replay.functional.restricted_cross_entropy import restricted_cross_entropy_dense
from megatron_replay.functional.shard_head import HeadForm
from megatron_replay.functional.shard_selection import SelectionKernel

__all__ = [
    "CandidateSets",
    "outside_mass",
    "restricted_cross_entropy",
    "restricted_cross_entropy_dense",
    "select_candidates",
    "select_positions",
    "vocab_parallel_cross_entropy",
]


def restricted_cross_entropy(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    candidate_ids: Tensor,
    candidate_offsets: Tensor,
    labels_T: Tensor,
    *,
    form: HeadForm | None = None,
    weight_grad_out: Tensor | Literal["main_grad"] | None = "main_grad",
    **options: Any,
) -> Tensor:
    """Loss of each position over its candidate set, without ever forming [T, V]: fp32 [T].

    As ``functional.restricted_cross_entropy.restricted_cross_entropy``, which has the arguments,
    the errors and the communication, with the fast choices where nothing is given.

    Args:
        form: None: the compiled one of the device, or else union-GEMM in torch (``kernels.HEAD``).
        weight_grad_out: "main_grad": the weight's own fp32 ``main_grad`` where Megatron has given
            it one, so that nothing of the weight's size is made. None: a gradient by autograd.
    """
    from megatron_replay.kernels import HEAD  # which imports the modules of this package

    if weight_grad_out == "main_grad":
        weight_grad_out = getattr(weight_VH, "main_grad", None)
    return _restricted.restricted_cross_entropy(
        hidden_TH,
        weight_VH,
        candidate_ids,
        candidate_offsets,
        labels_T,
        form=HEAD.choose("auto", weight_VH) if form is None else form,
        weight_grad_out=weight_grad_out,
        **options,
    )


def select_candidates(
    logits_TV: Tensor, labels_T: Tensor, *, kernel: SelectionKernel | None = None, **options: Any
) -> CandidateSets:
    """Select S_t = {i_1, ..., i_K} + {x_t} with K = min(K*, max_candidates).

    As ``functional.candidates.select_candidates``, which has the arguments and the errors.

    Args:
        kernel: None: the compiled one of the device, or else torch's; all give the same sets.
    """
    from megatron_replay.kernels import SELECTION  # which imports the modules of this package

    kernel = SELECTION.choose("auto", logits_TV) if kernel is None else kernel
    return candidates.select_candidates(logits_TV, labels_T, kernel=kernel, **options)
