"""Many records at once: compiled, or one by one where the package was installed without kernels.

The compiled form checks what ``require_valid`` checks and only names the record it does not like.
What is wrong with it is then said by the definition: ``format.decode_record``, ``require_valid``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from megatron_replay.errors import StoreError
from megatron_replay.store.document import (
    CandidateBatch,
    DocumentCandidates,
    decode_logits,
    require_numbers,
)
from megatron_replay.store.format import high_bits

try:
    from megatron_replay.store._records import decode_records
except ImportError:  # installed without compiled kernels
    decode_records = None  # type: ignore[assignment]

#: Decodes and checks one record of those given, by its place among them.
One = Callable[[int], DocumentCandidates]


def decode_batch(
    records: Sequence[memoryview],
    *,
    vocab_size: int,
    logits: str,
    one: One,
    keep_logits: bool = True,
) -> CandidateBatch:
    """``records`` end to end, every rule of the format checked.

    ``logits``: how they are stored; without ``keep_logits`` those that are are not looked at.

    Raises:
        StoreError: as ``one`` raises it, of the first record that breaks a rule.
    """
    if decode_records is not None:
        found = decode_records(
            records,
            vocab_size=vocab_size,
            high_bits=high_bits(vocab_size),
            has_logits=logits != "none",
        )
        if not isinstance(found, int):
            kept = logits if keep_logits else "none"
            batch = _batch(*found, logits=kept)
            try:
                require_numbers(batch, logits=kept)
            except StoreError:
                found = 0  # of some record: look at all
            else:
                return batch
        for i in range(found, len(records)):
            one(i)
        raise AssertionError(f"record {found}: refused by one form of the reader alone")
    batch = CandidateBatch.of([one(i) for i in range(len(records))])
    return batch if keep_logits else dataclasses.replace(batch, logits=None)


def _batch(
    document_offsets: np.ndarray,
    positions: np.ndarray,
    offsets: np.ndarray,
    halves: np.ndarray,
    ids: np.ndarray,
    stored_logits: np.ndarray,
    *,
    logits: str,
) -> CandidateBatch:
    lse, gold_logprob, tail_mass = halves.view("<f2").reshape(3, -1).astype(np.float32)
    return CandidateBatch(
        document_offsets=document_offsets,
        positions=positions,
        offsets=offsets,
        ids=ids,
        lse=lse,
        gold_logprob=gold_logprob,
        tail_mass=tail_mass,
        logits=None if logits == "none" else decode_logits(stored_logits.data, logits),
    )
