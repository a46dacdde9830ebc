"""The loss and the candidate rule for a training loop of your own: torch in, torch out.

The functions of ``loss`` and ``selection`` with the fastest backend for their tensors. They work
in one process without any group; a vocabulary shard enters as ``vocab_start`` and
``tp_group``.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from megatron_replay.kernels import HEAD, SELECTION
from megatron_replay.loss import sharded
from megatron_replay.loss.backends import HeadBackend
from megatron_replay.loss.definition import restricted_cross_entropy_dense
from megatron_replay.loss.full import vocab_parallel_cross_entropy
from megatron_replay.selection import candidates
from megatron_replay.selection.candidates import SelectedCandidates
from megatron_replay.selection.positions import select_positions
from megatron_replay.selection.shard_selection import SelectionBackend

__all__ = [
    "SelectedCandidates",
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
    backend: HeadBackend | None = None,
    weight_grad_out: Tensor | Literal["main_grad"] | None = "main_grad",
    **options: Any,
) -> Tensor:
    """Loss of each position over its candidate set, without ever forming [T, V]: fp32 [T].

    ``loss.sharded.restricted_cross_entropy`` documents the arguments, errors and communication;
    this function chooses fast defaults.

    Args:
        backend: None: the one compiled for the device, or else union-GEMM in torch.
        weight_grad_out: "main_grad": the weight's own fp32 ``main_grad`` where Megatron has given
            it one, so that nothing of the weight's size is made. None: a gradient by autograd.
    """
    if weight_grad_out == "main_grad":
        weight_grad_out = getattr(weight_VH, "main_grad", None)
    return sharded.restricted_cross_entropy(
        hidden_TH,
        weight_VH,
        candidate_ids,
        candidate_offsets,
        labels_T,
        backend=HEAD.choose("auto", weight_VH) if backend is None else backend,
        weight_grad_out=weight_grad_out,
        **options,
    )


def select_candidates(
    logits_TV: Tensor, labels_T: Tensor, *, backend: SelectionBackend | None = None, **options: Any
) -> SelectedCandidates:
    """Select S_t = {i_1, ..., i_K} + {x_t} with K = min(K*, max_candidates).

    ``selection.candidates.select_candidates`` documents the arguments and errors.

    Args:
        backend: None: the compiled one of the device, or else torch's; all give the same sets.
    """
    backend = SELECTION.choose("auto", logits_TV) if backend is None else backend
    return candidates.select_candidates(logits_TV, labels_T, backend=backend, **options)
