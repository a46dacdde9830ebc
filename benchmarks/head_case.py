"""What the heads of benchmarks.head work on, and what they must give.

N positions, V rows of the output layer, H channels, P pairs of a position and a candidate, U
distinct candidates of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.real_sets import Sets, real_sets
from megatron_replay.loss.candidate_sets import CandidateSets

MEAN_SIZE, LARGEST_SIZE = 100, 200
REGIMES = ("real", "zipf", "uniform")


def sets_of(regime: str, positions: int, vocab_size: int) -> Sets:
    """real: the store of benchmarks.real_sets. Others: 1 to 200 ids a set, 100 on average, drawn
    with p ~ 1 / (rank + 3), ranks shuffled, or alike: next to no id twice, the worst case.
    """
    if regime == "real":
        return real_sets().first(positions)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, LARGEST_SIZE + 1, (positions,), generator=generator)
    log_p_V = -torch.log(torch.randperm(vocab_size, generator=generator) + 3.0)
    if regime == "uniform":
        log_p_V.zero_()
    sets = []
    for size in sizes.tolist():  # without replacement: the largest of log p + Gumbel noise
        noise_V = torch.rand(vocab_size, generator=generator).log_().neg_().log_()
        sets.append((log_p_V - noise_V).topk(size).indices.sort().values.int())
    places = (torch.rand(positions, generator=generator) * sizes).long()
    offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    ids = torch.cat(sets)
    return Sets(ids, offsets, ids[offsets[:-1] + places].long(), torch.tensor([0, positions]))


@dataclass(eq=False)
class Batch:
    """Operands, and the gradients that a pass leaves.

    ``weight_grad`` is Megatron's main_grad, fp32 [V, H]; contenders that cannot add to it leave a
    dense gradient in ``weight.grad``.
    """

    hidden: Tensor
    weight: Tensor
    weight_grad: Tensor
    sets: Sets
    document_sets: Sets

    def __post_init__(self) -> None:
        self.hidden.requires_grad_()
        self.weight.requires_grad_()

    @property
    def num_positions(self) -> int:
        return len(self.hidden)

    @property
    def num_pairs(self) -> int:
        return len(self.sets.ids)

    @property
    def num_document_pairs(self) -> int:
        return int((self.document_sets.offsets.diff() * self.sets.starts.diff()).sum())

    def cut(self) -> CandidateSets:
        """Sets as a backend takes them; made anew, so that nothing is cached in them."""
        V, device = len(self.weight), self.weight.device
        arrays = (t.cpu().numpy() for t in (self.sets.ids, self.sets.offsets, self.sets.labels))
        sets = CandidateSets.of(*arrays, vocab_size=V).shard(0, V).with_transpose()
        return sets.moved(lambda tensor: tensor.to(device))

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def rounded(self) -> Batch:
        """With operands of bf16, and the same main_grad."""
        hidden, weight = self.hidden.detach().bfloat16(), self.weight.detach().bfloat16()
        return Batch(hidden, weight, self.weight_grad, self.sets, self.document_sets)

    def first(self, positions: int) -> Batch:
        """The first of the positions, on the same weight."""
        positions = min(positions, self.num_positions)
        sets, hidden = self.sets.first(positions), self.hidden.detach()[:positions]
        return Batch(hidden, self.weight.detach(), self.weight_grad, sets, sets.by_document())


def make_batch(
    sets: Sets, *, hidden_size: int, vocab_size: int, device: torch.device, constant: bool = False
) -> Batch:
    """Random operands; ``constant`` ones are quicker to make, where only memory is asked about."""
    N, generator = len(sets.labels), torch.Generator(device).manual_seed(0)
    hidden_NH = torch.full((N, hidden_size), 0.01, device=device)
    weight_VH = torch.full((vocab_size, hidden_size), 0.01, device=device)
    if not constant:
        hidden_NH.normal_(generator=generator)
        weight_VH.normal_(generator=generator).mul_(0.02)
    documents = sets.by_document()
    grad_VH = torch.full_like(weight_VH, 0.0)
    return Batch(hidden_NH, weight_VH, grad_VH, sets.to(device), documents.to(device))


def restricted_reference(batch: Batch, *, documents: bool = False) -> tuple[Tensor, Tensor]:
    """dH [N, H] and rows of dW [U, H] in float64, position by position."""
    sets = batch.document_sets if documents else batch.sets
    set_of = torch.arange(batch.num_positions)
    if documents:
        set_of = torch.arange(len(sets.offsets) - 1).repeat_interleave(sets.starts.diff().cpu())
    dH_NH = torch.zeros_like(batch.hidden, dtype=torch.float64, requires_grad=False)
    union = sets.ids.unique()
    dW_UH = dH_NH.new_zeros(len(union), dH_NH.shape[1])
    weight, hidden = batch.weight.detach(), batch.hidden.detach().double()
    offsets = sets.offsets.tolist()
    for n, group in enumerate(set_of.tolist()):
        place = sets.ids[offsets[group] : offsets[group + 1]]
        rows_KH = weight[place.long()].double()
        slope_K = (rows_KH @ hidden[n]).softmax(0) - (place == sets.labels[n]).double()
        dH_NH[n] = slope_K @ rows_KH
        dW_UH[torch.searchsorted(union, place)] += slope_K[:, None] * hidden[n]
    return dH_NH, dW_UH


def full_reference(batch: Batch) -> tuple[Tensor, Tensor]:
    """Of the full softmax: dH [N, H] and the candidates' rows of dW [U, H] in float64."""
    hidden_NH, weight_VH = batch.hidden.detach().double(), batch.weight.detach()
    blocks = weight_VH.split(1 << 13)
    p_NV = torch.cat([hidden_NH @ block.double().T for block in blocks], 1).softmax(1)
    p_NV[torch.arange(len(p_NV)), batch.sets.labels] -= 1
    dH_NH = sum(
        slope @ block.double() for slope, block in zip(p_NV.split(1 << 13, 1), blocks, strict=True)
    )
    assert isinstance(dH_NH, Tensor)
    return dH_NH, p_NV[:, batch.sets.ids.unique().long()].T @ hidden_NH


def gradient_error(batch: Batch, reference: tuple[Tensor, Tensor], *, documents: bool) -> float:
    """Largest error of either gradient, over its largest entry."""
    sets = batch.document_sets if documents else batch.sets
    dense = batch.weight_grad if batch.weight.grad is None else batch.weight.grad
    assert batch.hidden.grad is not None
    found = batch.hidden.grad, dense[sets.ids.unique().long()]
    return max(
        float((one.double() - exact).abs().max() / exact.abs().max())
        for one, exact in zip(found, reference, strict=True)
    )
