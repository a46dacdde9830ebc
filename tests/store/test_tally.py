"""Counts of parts add up to those of the whole, and numbers are those of slow loops."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_replay.errors import StoreError
from megatron_replay.store import CandidateReader, CandidateWriter, DocumentCandidates
from megatron_replay.store.summary import QUANTILES, Tally, summary, summary_text, tally
from tests.store.examples import describe, draw_document, write_store

CAP, COVERAGE = 20, 0.9


def draw(document_id: int) -> DocumentCandidates:
    rng = np.random.default_rng(document_id)
    set_sizes = np.minimum(rng.integers(1, 30, document_id % 9), CAP + 1).tolist()
    return draw_document(rng, vocab_size=151_936, set_sizes=set_sizes, has_logits=True)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Any:
    description = describe(
        num_documents=40,
        documents_per_shard=6,
        logits="fp16",
        selection={"coverage": COVERAGE, "max_candidates": CAP},
    )
    directory = tmp_path_factory.mktemp("store")
    writer = CandidateWriter(directory, description)
    for number in writer.missing_shards():
        with writer.shard(number) as shard:
            for document_id in description.documents(number):
                shard.add(document_id, draw(document_id))
    writer.finish()
    return CandidateReader(directory)


def test_numbers_are_those_of_a_loop(reader: CandidateReader) -> None:
    documents = [draw(i) for i in range(40)]
    rows = [
        (int(stop - start), float(tail), float(label))
        for d in documents
        for start, stop, tail, label in zip(
            d.offsets[:-1], d.offsets[1:], d.tail_mass, d.label_logprob, strict=True
        )
    ]
    n, found = len(rows), summary(reader.description, tally(reader, range(7)))
    assert found["positions"] == n

    def ranked(values: list[float]) -> dict[str, float]:
        values = sorted(values)
        return {f"{q:g}": values[math.ceil(q * n) - 1] for q in QUANTILES}

    columns = {
        "set_size": [size for size, _, _ in rows],
        "tail_mass": [tail for _, tail, _ in rows],
        "coverage": [1 - tail for _, tail, _ in rows],
        "label_logprob": [label for _, _, label in rows],
    }
    for name, values in columns.items():
        assert found[name]["mean"] == pytest.approx(sum(values) / n)
        assert found[name]["quantiles"] == ranked(values), name
    assert found["tail_mass"]["max"] == max(columns["tail_mass"])
    assert found["label_logprob"]["min"] == min(columns["label_logprob"])
    appended = sum(
        size > CAP or 1 - tail - math.exp(label) >= COVERAGE for size, tail, label in rows
    )
    assert 0 < appended < n
    assert found["share_label_appended"] == appended / n


def test_parts_add_up_in_any_order(reader: CandidateReader) -> None:
    whole = tally(reader, range(7))
    parts = [tally(reader, shards) for shards in ([6, 1], [], [0, 2, 3], [5], [4])]
    added = Tally(label_appended=0)
    for part in parts:
        added += pickle.loads(pickle.dumps(part))
    assert whole.documents == 40
    assert whole.bin_bytes == sum(row.bin_bytes for row in reader.rows)
    assert summary(reader.description, added) == summary(reader.description, whole)
    for name in ("sizes", "tail_masses", "label_logprobs"):
        np.testing.assert_array_equal(getattr(added, name), getattr(whole, name))


def test_what_a_part_cannot_tell_the_whole_cannot(reader: CandidateReader) -> None:
    assert (tally(reader, [0]) + Tally()).label_appended is None


def verdict_of(found: dict[str, Any], **changes: float) -> tuple[str, str]:
    """The verdict and the advice for these numbers."""
    found = copy.deepcopy(found)
    found["share_label_appended"] = changes["missed"]
    found["coverage"]["mean"] = changes["coverage"]
    found["cap"] = {
        "max_candidates": changes.get("cap", 200),
        "share_at_or_above": changes["at_cap"],
        "share_above": 0.0,
    }
    lines = summary_text(found).splitlines()
    [verdict] = [line for line in lines if line.startswith("is replay worth it? ")]
    hints = [line for line in lines if line.startswith("advice: ")]
    assert lines[-1 - len(hints) :] == [verdict, *hints]  # where a reader looks
    return verdict, " ".join(hints)


def test_the_verdict_is_always_told_with_what_helps(reader: CandidateReader) -> None:
    found = summary(reader.description, tally(reader, range(7)))
    verdict, hints = verdict_of(found, missed=0.0, coverage=1.0, at_cap=0.0)
    assert "No evidence either way" in verdict
    assert hints == ""
    verdict, hints = verdict_of(found, missed=0.0, coverage=0.99, at_cap=0.0)  # it has leaked there
    assert "Perhaps, not with the paper's loss" in verdict
    assert hints == ""
    verdict, hints = verdict_of(found, missed=0.013, coverage=0.966, at_cap=0.02)
    assert "Perhaps" in verdict
    assert "--candidate-scope document --tail ghost" in verdict
    verdict, hints = verdict_of(found, missed=0.2, coverage=0.95, at_cap=0.0)
    assert "Not with the paper's loss: the base model missed 20.0% of labels" in verdict
    assert "--loss full" in hints
    assert "--coverage in Stage 0" in hints
    # At the cap a higher coverage changes nothing, and no cap helps such a model.
    verdict, hints = verdict_of(found, missed=0.5, coverage=0.25, at_cap=1.0)
    assert "Not with" in verdict
    assert "--loss full" in hints
    assert "--coverage" not in hints.replace("--candidate-scope", "")
    assert "--max-candidates" not in hints
    _, hints = verdict_of(found, missed=0.0, coverage=0.93, at_cap=0.3)
    assert "raise --max-candidates (at most 255)" in hints
    _, hints = verdict_of(found, missed=0.0, coverage=0.93, at_cap=0.3, cap=255)
    assert "--max-candidates" not in hints


def test_damage_is_not_counted(tmp_path: Path) -> None:
    write_store(tmp_path, describe())
    path = tmp_path / "0000/shard-0000001.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(StoreError, match="document 3: damaged: the crc32 differs"):
        tally(CandidateReader(tmp_path), range(3))
