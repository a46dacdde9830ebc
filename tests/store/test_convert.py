"""Converting there and back, what may become what, and what an interruption leaves."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from megatron_replay.errors import ConfigError, StoreError
from megatron_replay.store import CandidateReader, DocumentCandidates
from megatron_replay.store.convert import convert
from megatron_replay.store.writer import CandidateWriter, ShardWriter
from tests.store.examples import assert_same, contents, describe, write_store
from tools.inspect_store import main

SHARDS = 4


def make(directory: Path, **changes: object) -> CandidateReader:
    fields: dict[str, object] = {"num_documents": 11, "documents_per_shard": 3, "logits": "fp16"}
    write_store(directory, describe(**(fields | changes)))
    return CandidateReader(directory)


@pytest.mark.parametrize("workers", [1, 2])
def test_there_and_back_is_the_same_store(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], workers: int
) -> None:
    reader = make(tmp_path / "planar")
    archive, back = tmp_path / "archive", tmp_path / "back"
    flags = [f"--workers={workers}", "--codec"]
    assert main(["convert", str(tmp_path / "planar"), str(archive), *flags, "archive"]) == 0
    out = capfd.readouterr().out
    assert out.startswith(f"{archive}: codec archive, logits fp16; reads as {tmp_path}/planar")
    found = CandidateReader(archive)
    assert found.description == dataclasses.replace(reader.description, codec="archive")
    for one, other in zip(found, reader, strict=True):
        assert_same(one, other)
    assert main(["convert", str(archive), str(back), *flags, "planar"]) == 0
    assert contents(back) == contents(tmp_path / "planar")


@pytest.mark.parametrize(("given", "kept"), [("fp16", "bf16"), ("bf16", "fp16"), ("bf16", "none")])
def test_logits_are_rounded_or_dropped(tmp_path: Path, given: str, kept: str) -> None:
    reader = make(tmp_path / "in", logits=given)
    convert(reader, tmp_path / "out", codec="planar", logits=kept)
    for one, other in zip(CandidateReader(tmp_path / "out"), reader, strict=True):
        # The examples' numbers have 8 significant bits, which both formats hold.
        assert_same(one, other if kept != "none" else dataclasses.replace(other, logits=None))


def test_logits_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    description = describe(num_documents=1, logits="bf16")
    writer = CandidateWriter(tmp_path / "in", description)
    one = np.ones(1, np.float32)
    with writer.shard(0) as shard:
        shard.add(
            0,
            DocumentCandidates(
                positions=np.array([3], np.int32), offsets=np.array([0, 1]),
                ids=np.array([7], np.int32), lse=one, gold_logprob=one, tail_mass=one,
                logits=np.array([1e6], np.float32),
            ),
        )  # fmt: skip
    writer.finish()
    with pytest.raises(StoreError, match="document 0: logits does not fit fp16"):
        convert(CandidateReader(tmp_path / "in"), tmp_path / "o", codec="planar", logits="fp16")
    assert not (tmp_path / "o/manifest.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--logits", "fp16"], "holds no logits (expected fp16; found none)"),
        (["--workers", "0"], "--workers: too few (expected 1 or more; found 0)"),
    ],
)
def test_refusals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    make(tmp_path / "in", logits="none")
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), *flags]) in (2, 5)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_neither_itself_nor_another_store_is_overwritten(tmp_path: Path) -> None:
    reader = make(tmp_path / "in")
    before = contents(tmp_path / "in")
    with pytest.raises(ConfigError, match="the output is also read, as IN"):
        convert(reader, tmp_path / "in" / ".." / "in", codec="archive", logits="fp16")
    make(tmp_path / "other", checkpoint_fingerprint="other")
    with pytest.raises(StoreError, match="another codec, checkpoint_fingerprint"):
        convert(reader, tmp_path / "other", codec="archive", logits="fp16")
    assert contents(tmp_path / "in") == before


def test_an_interrupted_conversion_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, out = make(tmp_path / "in"), tmp_path / "out"
    convert(reader, tmp_path / "whole", codec="archive", logits="none")
    add, added = ShardWriter.add, []

    def dies_in_the_third_shard(
        self: ShardWriter, document_id: int, candidates: DocumentCandidates
    ) -> None:
        added.append(document_id)
        if len(added) == 8:
            raise KeyboardInterrupt
        add(self, document_id, candidates)

    monkeypatch.setattr(ShardWriter, "add", dies_in_the_third_shard)
    with pytest.raises(KeyboardInterrupt):
        convert(reader, out, codec="archive", logits="none")
    assert not (out / "manifest.json").exists()
    convert(reader, out, codec="archive", logits="none")
    assert added == [*range(8), *range(6, 11)]
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("what", ["ids", "lse", "logits"])
def test_a_copy_that_reads_differently_is_no_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A codec that loses something, say: found by reading, whatever wrote it."""
    reader, out, add = make(tmp_path / "in"), tmp_path / "out", ShardWriter.add

    def loses(self: ShardWriter, document_id: int, candidates: DocumentCandidates) -> None:
        if document_id == 7:
            changed = getattr(candidates, what).copy()
            changed[-1] += 1
            candidates = dataclasses.replace(candidates, **{what: changed})
        add(self, document_id, candidates)

    monkeypatch.setattr(ShardWriter, "add", loses)
    with pytest.raises(StoreError, match=f"out, documents 6 to 8: {what} differ"):
        convert(reader, out, codec="archive", logits="bf16")
    assert not (out / "manifest.json").exists()
