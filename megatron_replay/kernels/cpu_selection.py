"""Candidate selection compiled for the CPU (csrc/cpu): ``selection.shard_selection``'s functions,
bit for bit, on fp32, bf16 and fp16 logits.

Rows are divided among ``torch.get_num_threads()`` threads. Where a row's maximum is not known
beforehand, the row is read from memory once. Importing this fails where the module was not built.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_replay.kernels import SELECTION, _cpu
from megatron_replay.selection.shard_selection import Cut, SelectionBackend, ShardTokens

#: The order is csrc/cpu/select_candidates.h's.
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def row_maxima(logits_TV: Tensor) -> Tensor:
    """As ``selection.shard_selection``'s. Raises ConfigError: as ``SELECTION.resolve``."""
    logits_TV = _checked(logits_TV)
    max_T = torch.empty(len(logits_TV), dtype=torch.float32)
    _cpu.row_maxima(_rows(logits_TV), max_T.data_ptr(), torch.get_num_threads())
    return max_T


def shard_tokens(
    logits_TV: Tensor, max_T: Tensor | None, *, vocab_start: int, count: int
) -> ShardTokens:
    """As ``selection.shard_selection``'s. Raises ConfigError: as ``row_maxima``."""
    logits_TV = _checked(logits_TV)
    T, V = logits_TV.shape
    count = min(count, V)
    assert count > 0
    # A copy: the compiled code finds maxima in the place where it otherwise reads them.
    maxima_T = torch.empty(T) if max_T is None else max_T.clone()
    assert maxima_T.is_cpu
    assert (maxima_T.dtype, maxima_T.shape) == (torch.float32, (T,))
    total_T = torch.empty(T, dtype=torch.int64)
    values_TK, ids_TK = torch.empty(T, count), torch.empty(T, count, dtype=torch.int32)
    _cpu.shard_tokens(
        _rows(logits_TV),
        vocab_start,
        count,
        max_T is not None,
        maxima_T.data_ptr(),
        total_T.data_ptr(),
        values_TK.data_ptr(),
        ids_TK.data_ptr(),
        torch.get_num_threads(),
    )
    return ShardTokens(maxima_T, total_T, values_TK, ids_TK)


def cut_tokens(
    values_TK: Tensor,
    ids_TK: Tensor,
    total_T: Tensor,
    max_T: Tensor,
    labels_T: Tensor,
    label_logit_T: Tensor,
    *,
    coverage: float,
) -> Cut:
    """As ``selection.shard_selection``'s."""
    T, K = ids_TK.shape
    values_TK, ids_TK = values_TK.contiguous(), ids_TK.contiguous()
    total_T, max_T = total_T.contiguous(), max_T.contiguous()
    labels_T, label_logit_T = labels_T.long().contiguous(), label_logit_T.contiguous()
    assert (ids_TK.dtype, total_T.dtype) == (torch.int32, torch.int64)
    assert values_TK.dtype == max_T.dtype == label_logit_T.dtype == torch.float32
    for part in (values_TK, ids_TK, total_T, max_T, labels_T, label_logit_T):
        assert part.is_cpu
        assert len(part) == T
    ids = torch.empty(T * (K + 1), dtype=torch.int32)
    cut = Cut(
        ids=ids,
        offsets=torch.empty(T + 1, dtype=torch.int64),
        num_candidates_T=torch.empty(T, dtype=torch.int64),
        label_appended_T=torch.empty(T, dtype=torch.bool),
        inside_T=torch.empty(T, dtype=torch.int64),
    )
    _cpu.cut_tokens(
        values_TK.data_ptr(),
        ids_TK.data_ptr(),
        T,
        K,
        total_T.data_ptr(),
        max_T.data_ptr(),
        labels_T.data_ptr(),
        label_logit_T.data_ptr(),
        1.0 - coverage,
        cut.ids.data_ptr(),
        cut.offsets.data_ptr(),
        cut.num_candidates_T.data_ptr(),
        cut.label_appended_T.data_ptr(),
        cut.inside_T.data_ptr(),
        torch.get_num_threads(),
    )
    return cut._replace(ids=ids[: int(cut.offsets[-1])].clone())


def _checked(logits_TV: Tensor) -> Tensor:
    """The logits, with each row's in one piece: a copy, if they are not."""
    SELECTION.resolve("cpu", logits_TV)
    return logits_TV if logits_TV.stride(1) == 1 else logits_TV.contiguous()


def _rows(logits_TV: Tensor) -> tuple[int, int, int, int, int]:
    address, type_ = logits_TV.data_ptr(), _TYPES.index(logits_TV.dtype)
    return address, type_, *logits_TV.shape, logits_TV.stride(0)


def backend() -> SelectionBackend:
    """The selection of CPUs."""
    return SelectionBackend(row_maxima, shard_tokens, cut_tokens)
