"""Documents to packs of ``seq_length`` positions, and documents to a micro-batch's tensors.

Which tokens are used of each document (``fit_documents``, ``usable_documents``), in which order
documents come (``document_order``), which of them fill a pack (``plan_packs``): pure functions of
lengths, seeds and the store's positions, which read no token. The documents of a step's packs are
then computed in micro-batches of their own length, prefixes once (``forest_of``, ``pack_batch``).

A document of n tokens occupies n - 1 positions: its inputs are ``tokens[:-1]`` and its labels
``tokens[1:]``, so no position predicts across a boundary.

Shape suffixes: D documents, T rows of a micro-batch.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from megatron_replay.config import DataConfig, Stage1Config
from megatron_replay.data.corpus import Corpus
from megatron_replay.data.forest import Forest, plant, without_sharing
from megatron_replay.errors import DataError
from megatron_replay.kernels.packed_attention import Documents
from megatron_replay.store import CandidateReader

Pack = npt.NDArray[np.int64]  # ids of the documents of a pack, in order


@dataclass(frozen=True, eq=False)
class FittedDocuments:
    """The tokens used of every document: its first ones.

    Attributes:
        lengths: int32 [D], tokens used of each document; 0 for a dropped one.
        num_dropped: documents left out.
        num_truncated: documents cut to their first ``seq_length + 1`` tokens.
        num_unlabelled: truncated documents of which no label is left, or no recorded one.
        num_tokens_lost: tokens of the corpus that are not used.
    """

    lengths: npt.NDArray[np.int32]
    num_dropped: int
    num_truncated: int
    num_unlabelled: int
    num_tokens_lost: int


def fit_documents(corpus: Corpus, data: DataConfig) -> FittedDocuments:
    """Apply ``--long-documents`` to documents that need more than ``seq_length`` positions.

    Raises:
        DataError: policy "error" and a document is too long; or nothing is left to learn.
    """
    lengths, first_labels = corpus.lengths, corpus.first_labels
    seq_length, policy = data.seq_length, data.long_documents
    too_long = lengths > seq_length + 1
    num_too_long = int(too_long.sum())
    if num_too_long and policy == "error":
        longest = int(np.argmax(lengths))
        raise DataError(
            f"{num_too_long} of {len(lengths)} documents are too long",
            where=corpus.prefix,
            expected=f"at most {seq_length + 1} tokens for --seq-length {seq_length}",
            found=f"{lengths[longest]} tokens in document {longest}, the longest",
            fix=f"Raise --seq-length to {lengths[longest] - 1}, or choose --long-documents drop or "
            "truncate",
        )
    if num_too_long == len(lengths) and policy == "drop":
        raise DataError(
            "--long-documents drop would leave no document",
            expected=f"documents of at most {seq_length + 1} tokens",
            found=f"at least {lengths.min()} tokens",
            fix="Raise --seq-length, or choose --long-documents truncate",
        )
    kept = 0 if policy == "drop" else seq_length + 1
    fitted = np.where(too_long, kept, lengths).astype(np.int32)
    has_label = first_labels < fitted
    if not has_label.any():
        raise DataError(
            "no answer token is left: every document's prompt is as long as a pack",
            expected=f"prompts below {seq_length} tokens for --seq-length {seq_length}",
            found=f"at least {first_labels.min()} tokens",
            fix="Raise --seq-length: nothing could be learnt",
        )
    return FittedDocuments(
        lengths=fitted,
        num_dropped=num_too_long if policy == "drop" else 0,
        num_truncated=num_too_long if policy == "truncate" else 0,
        num_unlabelled=int(((fitted > 0) & ~has_label & (first_labels < lengths)).sum()),
        num_tokens_lost=int((lengths - fitted).sum(dtype=np.int64)),
    )


def report_long_documents(fitted: FittedDocuments, policy: str) -> None:
    """Print to stderr what ``--long-documents`` left out, if anything."""
    num_documents = fitted.num_dropped + fitted.num_truncated
    if num_documents:
        print(
            f"--long-documents {policy}: {num_documents} of {len(fitted.lengths)} documents, "
            f"{fitted.num_tokens_lost} tokens not used",
            file=sys.stderr,
        )
    if fitted.num_unlabelled:
        print(
            f"warning: {fitted.num_unlabelled} of them have lost every answer token that could be "
            "learnt. Raise --seq-length, or choose --long-documents drop",
            file=sys.stderr,
        )


def without_unread(
    lengths: npt.NDArray[np.int32], stops: npt.NDArray[np.int32]
) -> npt.NDArray[np.int32]:
    """``lengths`` without the tokens after each document's last recorded position: int32 [D].

    Exact, since attention is causal: no recorded position looks at them. A document of which
    nothing is recorded gets 0.

    Args:
        stops: int32 [D], last recorded position plus one (``CandidateReader.stops``).
    """
    return np.where(stops > 0, np.minimum(lengths, stops + 1), 0).astype(np.int32)


def usable_documents(
    config: Stage1Config, corpus: Corpus, reader: CandidateReader | None
) -> tuple[FittedDocuments, npt.NDArray[np.int32]]:
    """The documents that Stage 1 may use, and the tokens it computes of each: int32 [D].

    ``--dry-run`` predicts a run with the same function. Where the loss is that of the store's
    positions, the tokens end with a document's last recorded one.

    Args:
        reader: the candidate store; None where there is none yet.

    Raises:
        DataError: nothing is left to learn.
    """
    fitted = fit_documents(corpus, config.data)
    if not config.loss.trains_on_store or reader is None:
        return fitted, fitted.lengths
    lengths, stops = fitted.lengths, reader.stops()
    recorded = stops > 0
    stops[lengths == 0] = 0
    # Only records of which less is used than Stage 0 recorded are read.
    for document in np.flatnonzero((stops >= lengths) & (stops > 0)).tolist():
        positions = reader[document].positions
        left = positions[positions + 1 < lengths[document]]
        stops[document] = left[-1] + 1 if len(left) else 0
    if not stops.any():
        raise DataError(
            "the store records no position of what is trained on: nothing is left to learn",
            where=reader.directory,
            found=f"{int(recorded.sum())} of {len(stops)} documents have a recorded position, and "
            f"none before --seq-length {config.data.seq_length}",
            fix="Raise --seq-length to that of Stage 0, or rerun Stage 0 with this run's",
        )
    num_unlabelled = int((recorded & (lengths > 0) & (stops == 0)).sum())
    return replace(fitted, num_unlabelled=num_unlabelled), without_unread(lengths, stops)


def document_order(
    num_documents: int,
    *,
    seed: int,
    epoch: int,
    stem_D: npt.NDArray[np.int64] | None = None,
    group: int = 1,
) -> npt.NDArray[np.int64]:
    """The order of documents in ``epoch`` (from 0): a pure function of its arguments.

    Sorting raw Philox words, rather than ``Generator.permutation``, because numpy keeps only the
    raw streams of its bit generators stable between versions (NEP 19).

    Args:
        stem_D: where given, up to ``group`` documents of one number come together: those of a
            number are shuffled and cut into groups, and the groups are shuffled.
    """
    generator = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    order = generator.random_raw(num_documents)
    if stem_D is None:
        return np.argsort(order, kind="stable").astype(np.int64)
    document_D = np.lexsort((generator.random_raw(num_documents), stem_D))
    begins_D = np.diff(stem_D[document_D], prepend=-1) != 0
    place_D = np.arange(num_documents)
    place_D -= np.maximum.accumulate(np.where(begins_D, place_D, 0))  # inside its stem
    starts = np.flatnonzero(place_D % group == 0)
    sizes = np.diff(starts, append=num_documents)
    by_group_D = np.repeat(order[document_D[starts]], sizes)
    return document_D[np.argsort(by_group_D, kind="stable")]


def plan_packs(
    lengths: npt.NDArray[np.int32],
    order: npt.NDArray[np.int64],
    seq_length: int,
    *,
    together: bool = True,
) -> list[Pack]:
    """Next-fit: documents in ``order``; a pack is closed when the next document does not fit.

    Next-fit keeps the order of documents, which a denser packing would not; its waste is at most
    half of the positions, and small where documents are short against ``seq_length``.

    Args:
        lengths: int32 [D], tokens used of each document; 0 leaves it out (``fit_documents``).
        order: document ids, each at most once.
        seq_length: positions of a pack.
        together: False gives each document a pack of its own.
    """
    order = order[lengths[order] > 0]
    if not together:
        return list(order[:, None])
    positions = lengths[order].astype(np.int64) - 1
    assert positions.max(initial=0) <= seq_length, "fit_documents comes first"
    stops = np.cumsum(positions)
    packs, first, used = [], 0, 0
    while first < len(order):
        last = int(np.searchsorted(stops, used + seq_length, side="right"))
        packs.append(order[first:last])
        first, used = last, int(stops[last - 1])
    return packs


def forest_of(
    corpus: Corpus, documents: Pack, lengths: npt.NDArray[np.int32], *, share: bool
) -> Forest:
    """``documents`` with what they share (``--share-prefixes``), or each by itself, in order."""
    alone = without_sharing(documents, lengths)
    if not share:
        return alone
    forest = plant(corpus, documents, lengths)
    # Where nothing is shared, the given order fills as many packs as were planned.
    return forest if forest.computed < alone.computed else alone


def micro_batches_of(
    corpus: Corpus,
    documents: Pack,
    lengths: npt.NDArray[np.int32],
    data: DataConfig,
    *,
    multiple: int | None = None,
) -> list[Forest]:
    """The documents of each micro-batch: as few as fit, of --micro-batch-size x --seq-length rows.

    ``multiple``: so many, or two, three, ... times as many, and as equal in rows as they can be.
    """
    forest = forest_of(corpus, documents, lengths, share=data.share_prefixes)
    capacity = data.micro_batch_size * data.seq_length
    return forest.cut(capacity) if multiple is None else forest.balanced_cut(capacity, multiple)


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """A micro-batch: the own positions of each document of ``forest``, one after another.

    Attributes:
        forest: its documents, in the order of their rows.
        first_row_D: int64; position p of document d is row ``first_row_D[d] + p`` for every p from
            ``forest.shared_D[d]`` on.
        token_T: int64, inputs; the padding token behind the last document.
        label_T: int64, the token after each input.
        loss_mask_T: bool, the label carries loss; False at padding.
        position_T: int32, position inside the document; 0 at padding.
        documents: who attends to whom.
    """

    forest: Forest
    first_row_D: npt.NDArray[np.int64]
    token_T: torch.Tensor
    label_T: torch.Tensor
    loss_mask_T: torch.Tensor
    position_T: torch.Tensor
    documents: Documents

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on ``device``."""
        return replace(
            self,
            token_T=to_device(self.token_T, device),
            label_T=to_device(self.label_T, device),
            loss_mask_T=to_device(self.loss_mask_T, device),
            position_T=to_device(self.position_T, device),
            documents=self.documents.to(device),
        )


def pack_batch(
    corpus: Corpus, forest: Forest, lengths: npt.NDArray[np.int32], *, multiple: int
) -> PackedBatch:
    """Read the own positions of the documents of ``forest`` into tensors.

    Args:
        lengths: int32 [D], tokens used of each document: its first ones.
        multiple: T is a multiple of it and at least 1, so that sequence parallelism can divide it.
    """
    own_D = forest.own_D
    stop_D = np.cumsum(own_D)
    length = max(1, -(-forest.computed // multiple)) * multiple
    token_T = np.full(length, corpus.pad_id, dtype=np.int64)
    label_T = np.full(length, corpus.pad_id, dtype=np.int64)
    loss_mask_T = np.zeros(length, dtype=np.bool_)
    position_T = np.zeros(length, dtype=np.int32)
    for number, shared, stop in zip(forest.document_D, forest.shared_D, stop_D, strict=True):
        document, used = corpus[int(number)], int(lengths[number])
        rows = slice(stop - (used - 1 - shared), stop)
        token_T[rows] = document.tokens[shared : used - 1]
        label_T[rows] = document.tokens[shared + 1 : used]
        loss_mask_T[rows] = document.loss_mask[shared + 1 : used]
        position_T[rows] = np.arange(shared, used - 1)
    return PackedBatch(
        forest=forest,
        first_row_D=stop_D - forest.positions_D,
        token_T=torch.from_numpy(token_T),
        label_T=torch.from_numpy(label_T),
        loss_mask_T=torch.from_numpy(loss_mask_T),
        position_T=torch.from_numpy(position_T),
        documents=Documents.of(own_D.tolist(), forest.shared_D.tolist()),
    )


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` on ``device``, by a copy from pinned memory that the host does not wait for.

    The copy is queued where the kernels of a step are, so they find it done.
    """
    if device.type == "cpu":
        return tensor.to(device)
    # A thread starts on the first device; pinning without this would open a context there.
    torch.get_device_module(device).set_device(device)
    return tensor.pin_memory().to(device, non_blocking=True)
