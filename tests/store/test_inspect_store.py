"""tools/inspect_store.py: its numbers against slow loops, its views, its errors."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_replay.errors import ConfigError, StoreError
from megatron_replay.store import CandidateReader, DocumentCandidates, StoreDescription
from megatron_replay.store.summary import QUANTILES, Tally, summary, summary_text, tally
from tests.store.examples import describe, draw_document, write_store
from tools.inspect_store import describe_document, document_text, main

CAP, COVERAGE, SHARDS = 20, 0.9, 7
DESCRIPTION = describe(
    num_documents=40, documents_per_shard=6, logits="fp16",
    selection={"coverage": COVERAGE, "max_candidates": CAP},
)  # fmt: skip


def draw(_: StoreDescription, document_id: int) -> DocumentCandidates:
    rng = np.random.default_rng(document_id)
    set_sizes = np.minimum(rng.integers(1, 30, document_id % 9), CAP + 1).tolist()
    return draw_document(rng, vocab_size=151_936, set_sizes=set_sizes, has_logits=True)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> CandidateReader:
    """Not to be changed."""
    return write_store(tmp_path_factory.mktemp("store"), DESCRIPTION, draw)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_summary_is_what_a_loop_counts(
    reader: CandidateReader, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    assert main([str(reader.directory), "--json", f"--workers={workers}"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    documents = [draw(DESCRIPTION, i) for i in range(40)]
    columns = {
        "set_size": [int(size) for d in documents for size in np.diff(d.offsets)],
        "tail_mass": [float(mass) for d in documents for mass in d.tail_mass],
        "label_logprob": [float(logprob) for d in documents for logprob in d.label_logprob],
    }
    columns["coverage"] = [1 - mass for mass in columns["tail_mass"]]
    n, sizes = len(columns["set_size"]), columns["set_size"]
    bin_bytes = sum(path.stat().st_size for path in reader.directory.rglob("*.bin"))
    assert (found["documents"], found["positions"], found["candidates"]) == (40, n, sum(sizes))
    assert found["documents_with_positions"] == sum(len(d.positions) > 0 for d in documents)
    assert found["bytes_per_position"] == bin_bytes / n
    for name, values in columns.items():
        assert found[name]["mean"] == pytest.approx(sum(values) / n)
        ranked = {f"{q:g}": sorted(values)[math.ceil(q * n) - 1] for q in QUANTILES}
        assert found[name]["quantiles"] == ranked, name
    assert found["tail_mass"]["max"] == max(columns["tail_mass"])
    for name in ("set_size", "coverage", "label_logprob"):
        assert found[name]["min"] == min(columns[name])
    assert (found["set_size"]["max"], found["set_size"]["median"]) == (
        max(sizes),
        sorted(sizes)[n // 2 - 1 + n % 2],
    )
    for row in found["set_size"]["histogram"]:
        assert row["positions"] == sum(row["from"] <= size <= row["to"] for size in sizes)
    assert sum(row["positions"] for row in found["set_size"]["histogram"]) == n
    assert found["cap"] == {
        "max_candidates": CAP,
        "share_at_or_above": sum(size >= CAP for size in sizes) / n,
        "share_above": sum(size > CAP for size in sizes) / n,
    }
    rows = zip(sizes, columns["tail_mass"], columns["label_logprob"], strict=True)
    appended = sum(
        size > CAP or 1 - tail - math.exp(label) >= COVERAGE for size, tail, label in rows
    )
    assert 0 < appended < n
    assert found["share_label_appended"] == appended / n


def test_parts_add_up_in_any_order(reader: CandidateReader) -> None:
    whole, added = tally(reader, range(SHARDS)), Tally(label_appended=0)
    for shards in ([6, 1], [], [0, 2, 3], [5], [4]):
        added += tally(reader, shards)
    assert summary(DESCRIPTION, added) == summary(DESCRIPTION, whole)
    assert (whole + Tally()).label_appended is None  # what a part does not know


def test_the_summary_as_text(
    reader: CandidateReader, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def text(store: Path) -> str:
        assert main([str(store)]) == 0
        return capsys.readouterr().out

    for part in ("at the cap of 20", "|S|: mean", "#" * 40, "'max_candidates': 20"):
        assert part in text(reader.directory)
    write_store(tmp_path / "empty", describe(num_documents=1))
    assert "positions: 0" in text(tmp_path / "empty")
    write_store(tmp_path / "merge", describe(selection={}))  # the name of a command
    assert "has no max_candidates" in text(tmp_path / "merge")
    write_store(tmp_path / "huge", describe(selection={"coverage": 0.9, "max_candidates": 10**30}))
    assert "at the cap of 1000" in text(tmp_path / "huge")


@pytest.mark.parametrize(
    ("missed", "coverage", "verdict"),
    [
        (0.0, 1.0, "No evidence either way"),
        (0.0, 0.99, "Perhaps: the base model missed 0.0% of labels"),
        (0.019, 0.95, "compare both"),
        (0.021, 0.95, "Probably not: the base model missed 2.1% of labels"),
        (0.25, 0.95, "use --loss full"),
        (0.26, 0.95, "No: the base model missed 26.0% of labels, and the sets cover 95.0%"),
        (0.0, 0.89, "No: "),
        (None, 0.99, "unknown"),
    ],
)
def test_the_verdict_ends_the_text(
    reader: CandidateReader, missed: float | None, coverage: float, verdict: str
) -> None:
    found = copy.deepcopy(summary(DESCRIPTION, tally(reader, range(SHARDS))))
    found["share_label_appended"], found["coverage"]["mean"] = missed, coverage
    last = summary_text(found).splitlines()[-1]  # where a reader looks
    assert last.startswith("is replay worth it? ")
    assert verdict in last


def test_a_document_with_its_tokens(reader: CandidateReader) -> None:
    expected = draw(DESCRIPTION, 8)
    tokens = np.arange(5000)
    tokens[expected.positions + 1] = expected.ids[expected.offsets[:-1]]  # each set's first
    tokens[expected.positions[0] + 1] = 151_000  # but one label is not in its set
    corpus: Any = {8: SimpleNamespace(tokens=tokens)}
    tokenizer: Any = SimpleNamespace(decode=lambda ids: f"<{ids[0]}>")
    view = describe_document(reader, 8, tokenizer, corpus)
    rows = view["positions"]
    assert [row["position"] for row in rows] == expected.positions.tolist()
    assert [row["label_in_set"] for row in rows] == [False] + [True] * 7
    candidates = [candidate for row in rows for candidate in row["candidates"]]
    assert [c["id"] for c in candidates] == expected.ids.tolist()
    assert [c["text"] for c in candidates] == [f"<{i}>" for i in expected.ids.tolist()]
    assert expected.logits is not None
    assert [c["logit"] for c in candidates] == expected.logits.tolist()
    for row in rows:
        assert sum(c["probability"] for c in row["candidates"]) == pytest.approx(row["coverage"])
        assert row["label_probability"] == pytest.approx(math.exp(row["label_logprob"]))

    _, first_row, shown, *_ = document_text(view).splitlines()
    assert "-> 151000 '<151000>', NOT IN THE SET" in first_row
    best = max(rows[0]["candidates"], key=lambda c: c["logit"])
    share = f"{100 * best['probability']:.3g} %"
    assert shown.strip().startswith(f"{best['id']} '<{best['id']}>' ({share}), ")
    assert shown.endswith(f"and {len(rows[0]['candidates']) - 8} more")

    last = int(expected.positions[-1])
    corpus[8].tokens = np.arange(last + 1)
    with pytest.raises(StoreError, match=f"expected positions below {last}; found {last}"):
        describe_document(reader, 8, None, corpus)


def test_probabilities_are_those_of_the_base_model(tmp_path: Path) -> None:
    """exp(logit - lse), up to fp16: of a real softmax, whatever the rounding of lse."""
    logits = np.random.default_rng(0).normal(20, 3, 1000)
    lse = np.log(np.exp(logits).sum())
    ids = np.sort(np.argsort(-logits)[:50]).astype(np.int32)
    exact = np.exp(logits[ids] - lse)
    lse_P, label_logprob_P, tail_mass_P = np.array([[lse], [6e4], [1 - exact.sum()]], np.float32)
    document = DocumentCandidates(
        positions=np.zeros(1, np.int32), offsets=np.array([0, 50]), ids=ids, lse=lse_P,
        label_logprob=label_logprob_P, tail_mass=tail_mass_P,
        logits=logits[ids].astype(np.float32),
    )  # fmt: skip
    description = describe(num_documents=1, logits="fp16")
    reader = write_store(tmp_path, description, lambda *_: document)
    [row] = describe_document(reader, 0, None, None)["positions"]
    found = [c["probability"] for c in row["candidates"]]
    np.testing.assert_allclose(found, exact, rtol=0.015)  # logits near 30 are 1/128 off at most
    assert row["label_probability"] == 1  # of an impossible log-probability: 6e4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--document", "40"], "--document: no such document (expected 0 to 39; found 40)"),
        (["--tokenizer", "x"], "--tokenizer: shows nothing without a document"),
        (["--data-path", "x"], "--data-path: requires --document or --verify"),
        (["--workers", "0"], "--workers: too few (expected 1 or more; found 0)"),
    ],
)
def test_mistakes_are_one_line(
    reader: CandidateReader, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([str(reader.directory), *arguments]) == ConfigError.exit_code
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
