"""Heads side by side: each makes, for a batch, one pass forward and backward.

A pass leaves dH in ``batch.hidden.grad`` and dW in ``batch.weight.grad`` (dense, through autograd)
or added to ``batch.weight_grad``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from benchmarks.head_case import Batch
from megatron_replay.functional import restricted_cross_entropy
from megatron_replay.kernels import HEAD

Pass = Callable[[], object]
#: Positions that torch gathers at a time: more would not fit the caches, nor soon the memory.
GATHERED = 32


@dataclass(frozen=True)
class Contender:
    """A row of the table.

    Attributes:
        flops: of a pass, as the maths asks for; None where a rate says nothing.
        full: over the whole vocabulary: measured on fewer positions, and scaled.
        has_gradients: False: forward alone, or something beside the head.
    """

    name: str
    make: Callable[[Batch], Pass]
    flops: Callable[[Batch], int] | None = None
    full: bool = False
    documents: bool = False
    bf16: bool = False
    has_gradients: bool = True
    why_not: str | None = None


def pair_flops(batch: Batch) -> int:
    return 6 * batch.num_pairs * batch.hidden.shape[1]


def document_flops(batch: Batch) -> int:
    return 6 * batch.num_document_pairs * batch.hidden.shape[1]


def full_flops(batch: Batch) -> int:
    return 6 * batch.hidden.numel() * len(batch.weight)


def ours(form: str, *, documents: bool = False, validate: bool = False) -> Callable[[Batch], Pass]:
    """As Stage 1 calls it; it leaves ``validate`` out, as the reader and the join have checked."""

    def make(batch: Batch) -> Pass:
        sets = batch.document_sets if documents else batch.sets
        bind = HEAD.choose(form, batch.hidden)

        def run() -> None:
            batch.clear()
            restricted_cross_entropy(
                batch.hidden,
                batch.weight,
                sets.ids,
                sets.offsets,
                sets.labels,
                backend=bind,
                group_offsets=sets.starts if documents else None,
                weight_grad_out=batch.weight_grad,
                validate=validate,
            ).sum().backward()

        return run

    return make


def without_arguments(batch: Batch) -> Pass:
    """The public function as its users call it first; autograd makes a dense dW."""
    sets = batch.sets

    def run() -> None:
        batch.clear()
        loss_N = restricted_cross_entropy(
            batch.hidden, batch.weight, sets.ids, sets.offsets, sets.labels
        )
        loss_N.sum().backward()

    return run


def by_autograd(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Batch], Pass]:
    """A sum of losses out of hidden, weight and labels."""

    def make(batch: Batch) -> Pass:
        def run() -> None:
            batch.clear()
            loss(batch.hidden, batch.weight, batch.sets.labels).backward()

        return run

    return make


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(linear(hidden, weight).float(), labels, reduction="sum")


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """In one chunk: "auto" took 3 to 5 times as long. Without options it is ``plain``."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=len(hidden))
    return torch.nn.functional.linear_cross_entropy(
        hidden, weight, labels, reduction="sum", options=options
    )


def megatron(hidden: Tensor, weight: Tensor, labels: Tensor, *, fused: bool) -> Tensor:
    """megatron-core's [s, b, v] logits; its fused form rounds their gradient to bf16."""
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    _join_alone()
    logits, labels = linear(hidden, weight)[:, None], labels[:, None]
    if fused:
        group = parallel_state.get_tensor_model_parallel_group()
        return fused_vocab_parallel_cross_entropy(logits, labels, group).sum()
    return vocab_parallel_cross_entropy(logits, labels).sum()


@functools.cache
def _join_alone() -> None:
    """megatron-core's groups, of this one process."""
    from megatron_replay.config import ParallelConfig
    from megatron_replay.parallel import initialize
    from megatron_replay.platform import select

    os.environ.setdefault("RANK", "0")
    initialize(ParallelConfig(), select("cpu"))


def gather_and_bmm(batch: Batch) -> Pass:
    """Rows gathered and padded to the largest set, a batched product, dW by index_add_."""
    sets, N = batch.sets, batch.num_positions
    sizes_N = sets.offsets.diff()
    within_K = torch.arange(int(sizes_N.max()), device=sizes_N.device)
    valid_NK = within_K < sizes_N[:, None]
    ids_NK = sets.ids.new_zeros(valid_NK.shape).masked_scatter_(valid_NK, sets.ids).long()
    label_NK = (ids_NK == sets.labels[:, None]) & valid_NK
    weight_VH = batch.weight.detach()

    def run() -> None:
        batch.clear()
        dH_NH = torch.empty_like(batch.hidden, requires_grad=False)
        for first in range(0, N, GATHERED):
            at = slice(first, first + GATHERED)
            hidden_nH = batch.hidden.detach()[at]
            rows_nKH = weight_VH[ids_NK[at]]
            z_nK = torch.bmm(rows_nKH, hidden_nH[:, :, None]).squeeze(2)
            slope_nK = z_nK.masked_fill_(~valid_NK[at], -torch.inf).softmax(1)
            slope_nK -= label_NK[at].float()
            dH_NH[at] = torch.bmm(slope_nK[:, None], rows_nKH).squeeze(1)
            dW_nKH = torch.mul(slope_nK[:, :, None], hidden_nH[:, None], out=rows_nKH)
            batch.weight_grad.index_add_(0, ids_NK[at].flatten(), dW_nKH.flatten(0, 1))
        batch.hidden.grad = dH_NH

    return run


def sampled_addmm(batch: Batch) -> Pass:
    """z alone: torch's sampled product over CSR; nothing of backward."""
    mask = _csr(batch, torch.zeros(batch.num_pairs, device=batch.hidden.device))
    hidden_NH, weight_HV = batch.hidden.detach(), batch.weight.detach().T

    def run() -> None:
        torch.sparse.sampled_addmm(mask, hidden_NH, weight_HV, beta=0.0)

    return run


def sparse(batch: Batch) -> Pass:
    """All three products by torch.sparse; softmax over pairs; the transpose is made beforehand."""
    sets, N = batch.sets, batch.num_positions
    order, positions, rows, starts = batch.cut().transpose
    position_P = batch.cut().position_P
    is_label_P = (sets.ids == sets.labels[position_P]).float()
    weight_VH, hidden_NH = batch.weight.detach(), batch.hidden.detach()
    mask = _csr(batch, torch.zeros(batch.num_pairs, device=hidden_NH.device))

    def run() -> None:
        batch.clear()
        z_P = torch.sparse.sampled_addmm(mask, hidden_NH, weight_VH.T, beta=0.0).values()
        max_N = z_P.new_empty(N).scatter_reduce_(0, position_P, z_P, "amax", include_self=False)
        e_P = (z_P - max_N[position_P]).exp_()
        slope_P = e_P / z_P.new_zeros(N).index_add_(0, position_P, e_P)[position_P]
        slope_P -= is_label_P
        batch.hidden.grad = _csr(batch, slope_P) @ weight_VH
        transposed = torch.sparse_csr_tensor(
            starts, positions, slope_P[order], (len(rows), N), check_invariants=False
        )
        batch.weight_grad.index_add_(0, rows, transposed @ hidden_NH)

    return run


def _csr(batch: Batch, values_P: Tensor) -> Tensor:
    shape = batch.num_positions, len(batch.weight)
    ids, offsets = batch.sets.ids.long(), batch.sets.offsets
    return torch.sparse_csr_tensor(offsets, ids, values_P, shape, check_invariants=False)


def cutting(batch: Batch) -> Pass:
    return batch.cut


def sorting(batch: Batch) -> Pass:
    return lambda: batch.cut().transpose


def zeroing(batch: Batch) -> Pass:
    return batch.weight_grad.zero_


def making(batch: Batch) -> Pass:
    """As autograd must, where it is to give a dense gradient."""
    return lambda: torch.full_like(batch.weight_grad, 0.0)


def needs_cuda(package: str, loss: Callable[[Any, Tensor, Tensor, Tensor], Tensor]) -> Any:
    """A loss out of a package that runs on CUDA only."""
    return by_autograd(lambda *operands: loss(importlib.import_module(package), *operands))


def _cut_cross_entropy(module: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return module.linear_cross_entropy(hidden, weight, labels, reduction="sum")


def _liger(module: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return module.LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, labels)


def contenders(device: torch.device) -> list[Contender]:
    like = torch.empty(0, device=device)
    best = HEAD.best(like) or "union"
    reason = HEAD.why_not(best, like)
    forms = functools.partial(Contender, why_not=reason)

    def foreign(name: str, package: str, loss: Any, *, bf16: bool) -> Contender:
        missing = None if importlib.util.find_spec(package.partition(".")[0]) else "not installed"
        why_not = "needs CUDA; not run" if device.type == "cpu" else missing
        make = needs_cuda(package, loss)
        return Contender(name, make, full_flops, full=True, bf16=bf16, why_not=why_not)

    partial = functools.partial
    return [
        forms(f"{best} form", ours(best), pair_flops),
        forms(f"{best} form, bf16 operands", ours(best), pair_flops, bf16=True),
        forms(f"{best} form, sets checked too", ours(best, validate=True), pair_flops),
        forms("no arguments, dense gradient", without_arguments, pair_flops),
        Contender("union form: union-GEMM in torch", ours("union"), pair_flops),
        Contender("torch gather + bmm, padded", gather_and_bmm, pair_flops),
        Contender("torch.sparse, forward and backward", sparse, pair_flops),
        Contender(
            "torch.sparse.sampled_addmm, forward alone", sampled_addmm, has_gradients=False
        ),
        forms(
            f"documents' unions: {best} form", ours(best, documents=True), document_flops,
            documents=True,
        ),
        Contender("cutting sets to the shard", cutting, has_gradients=False),
        Contender("the same and sorting by id, torch", sorting, has_gradients=False),
        Contender("zeroing a dense fp32 [V, H]", zeroing, has_gradients=False),
        Contender("making one of zeros", making, has_gradients=False),
        Contender("F.linear + F.cross_entropy", by_autograd(plain), full_flops, full=True),
        Contender(
            "F.linear + F.cross_entropy, bf16", by_autograd(plain), full_flops, full=True,
            bf16=True,
        ),
        Contender(
            "F.linear_cross_entropy, one chunk", by_autograd(linear_cross_entropy), full_flops,
            full=True,
        ),
        Contender(
            "megatron-core vocab-parallel", by_autograd(partial(megatron, fused=False)),
            full_flops, full=True,
        ),
        Contender(
            "megatron-core fused", by_autograd(partial(megatron, fused=True)), full_flops,
            full=True,
        ),
        Contender("torch form: the definition", ours("torch"), None, full=True),
        foreign("Liger fused linear CE", "liger_kernel.transformers", _liger, bf16=True),
        foreign("cut-cross-entropy", "cut_cross_entropy", _cut_cross_entropy, bf16=True),
    ]  # fmt: skip
