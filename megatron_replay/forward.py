"""Runs micro-batches through megatron-core's pipeline schedule and returns the heads' outputs.

Both stages and the probe use it, so packing, masks and the pipeline are handled in one place.
Shapes: T rows of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_replay.data.packing import PackedBatch
from megatron_replay.model.attention import PackedDocuments
from megatron_replay.model.gpt import Head
from megatron_replay.model.selected_rows import SelectedRows


class MicroBatch(NamedTuple):
    """A micro-batch and the head to apply to its hidden states.

    ``rows``: those that the head uses, so the last layer computes no others; None: all.
    """

    batch: PackedBatch
    head: Head
    rows: SelectedRows | None = None


@torch.no_grad()
def forward_only(model: torch.nn.Module, micro_batches: Sequence[MicroBatch]) -> list[Any]:
    """The output of each micro-batch's head, on the last stage; [] on the others."""
    model.eval()
    outputs: list[Any] = _run_schedule(
        model,
        micro_batches,
        lambda output, non_loss_data: output,
        forward_only=True,
        collect_non_loss_data=True,
    )
    model.train()
    return outputs


def forward_backward(model: torch.nn.Module, micro_batches: Sequence[MicroBatch]) -> Tensor | None:
    """Run every micro-batch forward and backward; gradients end up in ``main_grad``.

    Heads return the loss of each of their positions. The gradient is that of the mean over all
    positions of the global batch: megatron-core sums, then divides by the number over DP.

    Returns:
        (sum of losses, number of positions) of this data-parallel rank on the last stage, fp32 [2];
        None on the others.
    """
    sums = _run_schedule(model, micro_batches, _sum_of_losses, forward_only=False)
    return torch.stack(sums).sum(0) if sums else None


def _run_schedule(
    model: torch.nn.Module,
    micro_batches: Sequence[MicroBatch],
    of_output: Callable[..., Any],
    **options: Any,
) -> Any:
    """megatron-core's schedule; ``of_output`` makes what it collects from a head's output."""

    def step(iterator: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Any, Any]:
        batch, head, rows = next(iterator)
        documents = PackedDocuments(batch.documents, rows, len(batch.token_T))
        return model(batch.token_T, batch.position_T, documents, head), of_output

    lengths = [len(micro_batch.batch.token_T) for micro_batch in micro_batches]
    groups = ProcessGroupCollection.use_mpu_process_groups()
    if groups.pp.size() > 1:
        planned = PlannedLengths(lengths, groups, get_model_config(model))
        options |= {"p2p_communicator": planned, "pg_collection": groups}
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(micro_batches),
        model=[model],
        num_microbatches=len(micro_batches),
        seq_length=lengths[0],
        micro_batch_size=1,
        **options,
    )


class PlannedLengths(P2PCommunicator):
    """Micro-batches of their own lengths between pipeline stages, which all ranks know.

    megatron-core would send each shape before its tensor, and the host would wait for the device.

    Args:
        lengths: T of each micro-batch, in the order in which all stages compute them.
    """

    def __init__(
        self, lengths: Sequence[int], groups: ProcessGroupCollection, config: TransformerConfig
    ) -> None:
        super().__init__(groups.pp, config)
        divisor = groups.tp.size() if config.sequence_parallel else 1
        shapes = [torch.Size([length // divisor, 1, config.hidden_size]) for length in lengths]
        self._forward, self._backward = iter(shapes), iter(shapes)

    def _communicate_shapes(
        self, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[torch.Size | None, torch.Size | None]:
        """Shapes of the next hidden states, and of the next gradients, of a micro-batch."""
        hidden = next(self._forward) if recv_prev else None
        return hidden, next(self._backward) if recv_next else None


def _sum_of_losses(loss_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum, number, and both. A loss that is not finite makes its gradient NaN.

    The update rule's own check then finds it before the step, on every rank, at no extra cost.
    """
    total = loss_N.sum()
    total = total * (1 + 0 * total.detach())  # 0 times NaN or infinity is NaN
    # Filled on the device: making a tensor from a number would copy, and the host waits for copies.
    count = torch.full((), loss_N.numel(), dtype=torch.int32, device=loss_N.device)
    return total, count, torch.stack([total.detach(), count.to(total.dtype)])
