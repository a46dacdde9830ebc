"""The numbers of tools/inspect_store.py against slow loops, its views, and its errors."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_replay.errors import ConfigError, StoreError
from megatron_replay.store import CandidateReader, CandidateWriter, DocumentCandidates
from tests.store.examples import describe, draw_document, write_store
from tools.inspect_store import describe_document, document_text, main

CAP = 20
#: Without processes, that take longer to start than these stores to read.
ALONE = ["--workers", "1"]


def draw(document_id: int) -> DocumentCandidates:
    rng = np.random.default_rng(document_id)
    set_sizes = np.minimum(rng.integers(1, 30, document_id % 9), CAP + 1).tolist()
    return draw_document(rng, vocab_size=151_936, set_sizes=set_sizes, has_logits=True)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    selection = {"coverage": 0.9, "max_candidates": CAP}
    description = describe(
        num_documents=40, documents_per_shard=16, logits="fp16", selection=selection
    )
    writer = CandidateWriter(tmp_path, description)
    for number in writer.missing_shards():
        with writer.shard(number) as shard:
            for document_id in description.documents(number):
                shard.add(document_id, draw(document_id))
    writer.finish()
    return tmp_path


def test_the_summary_is_what_a_loop_counts(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(store), "--json", *ALONE]) == 0
    summary: dict[str, Any] = json.loads(capsys.readouterr().out)
    documents = [draw(i) for i in range(40)]
    sizes = sorted(int(n) for d in documents for n in np.diff(d.offsets))
    tails = [float(m) for d in documents for m in d.tail_mass]
    labels = [float(g) for d in documents for g in d.label_logprob]
    n = len(sizes)
    assert summary["documents"] == 40
    assert summary["documents_with_positions"] == sum(len(d.positions) > 0 for d in documents)
    assert summary["positions"] == n
    assert summary["candidates"] == sum(sizes)
    bin_bytes = sum(p.stat().st_size for p in store.rglob("*.bin"))
    assert summary["bytes_per_position"] == pytest.approx(bin_bytes / n)
    size = summary["set_size"]
    assert size["mean"] == pytest.approx(sum(sizes) / n)
    assert (size["min"], size["max"]) == (sizes[0], sizes[-1])
    assert size["median"] == sizes[math.ceil(0.5 * n) - 1]
    assert size["quantiles"] == {
        f"{q:g}": sizes[math.ceil(q * n) - 1] for q in (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
    }
    for row in size["histogram"]:
        assert row["positions"] == sum(row["from"] <= s <= row["to"] for s in sizes)
    assert sum(row["positions"] for row in size["histogram"]) == n
    assert summary["coverage"]["mean"] == pytest.approx(1 - sum(tails) / n)
    assert summary["coverage"]["min"] == pytest.approx(1 - max(tails))
    assert summary["cap"] == {
        "max_candidates": CAP,
        "share_at_or_above": pytest.approx(sum(s >= CAP for s in sizes) / n),
        "share_above": pytest.approx(sum(s > CAP for s in sizes) / n),
    }
    assert summary["label_logprob"]["mean"] == pytest.approx(sum(labels) / n)


def test_the_summary_as_text(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(store), "--verify", *ALONE]) == 0
    captured = capsys.readouterr()
    assert "every byte as written" in captured.err
    assert "at the cap of 20" in captured.out
    assert "|S|: mean" in captured.out
    assert "#" * 40 in captured.out  # the longest bar
    assert "'max_candidates': 20" in captured.out


def test_a_store_without_positions_or_cap(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_store(tmp_path / "empty", describe(num_documents=1))
    assert main([str(tmp_path / "empty"), *ALONE]) == 0
    assert "positions: 0" in capsys.readouterr().out
    write_store(tmp_path / "no-cap", describe(selection={}))
    assert main([str(tmp_path / "no-cap"), *ALONE]) == 0
    assert "has no max_candidates" in capsys.readouterr().out


def test_a_document_with_its_tokens(store: Path) -> None:
    reader, expected = CandidateReader(store), draw(8)
    labels = expected.ids[expected.offsets[:-1]]  # the first candidate of each set
    tokens = np.arange(5000)
    tokens[expected.positions + 1] = labels
    tokens[expected.positions[0] + 1] = 151_000  # but one label is not in its set
    corpus: Any = {8: SimpleNamespace(tokens=tokens)}
    tokenizer: Any = SimpleNamespace(decode=lambda ids: f"<{ids[0]}>")
    view = describe_document(reader, 8, tokenizer, corpus)
    assert [row["position"] for row in view["positions"]] == expected.positions.tolist()
    assert [row["label_in_set"] for row in view["positions"]] == [False] + [True] * 7
    candidates = [c for row in view["positions"] for c in row["candidates"]]
    assert [c["id"] for c in candidates] == expected.ids.tolist()
    assert [c["text"] for c in candidates] == [f"<{i}>" for i in expected.ids.tolist()]
    assert expected.logits is not None
    assert [c["logit"] for c in candidates] == expected.logits.tolist()

    for row in view["positions"]:
        exps = [math.exp(c["logit"]) for c in row["candidates"]]
        shares = [row["coverage"] * x / sum(exps) for x in exps]
        assert [c["probability"] for c in row["candidates"]] == pytest.approx(shares)
        assert row["label_probability"] == pytest.approx(math.exp(row["label_logprob"]))

    text = document_text(view)
    first_row = text.splitlines()[1]
    assert "-> 151000 '<151000>', NOT IN THE SET" in first_row
    shown = text.splitlines()[2]
    best = max(view["positions"][0]["candidates"], key=lambda c: c["logit"])
    share = f"{100 * best['probability']:.3g} %"
    assert shown.strip().startswith(f"{best['id']} '<{best['id']}>' ({share}), ")
    assert shown.endswith(f"and {len(view['positions'][0]['candidates']) - 8} more")


def test_a_corpus_shorter_than_its_positions_is_refused(store: Path) -> None:
    last = int(draw(8).positions[-1])
    corpus: Any = {8: SimpleNamespace(tokens=np.arange(last + 1))}
    with pytest.raises(StoreError, match=f"expected positions below {last}; found {last}"):
        describe_document(CandidateReader(store), 8, None, corpus)


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--document", "40"], "--document: no such document (expected 0 to 39; found 40)", 2),
        (["--tokenizer", "x"], "--tokenizer: shows nothing without a document", 2),
        (["--data-path", "x"], "--data-path: requires --document or --verify", 2),
    ],
)
def test_mistakes_are_one_line(
    store: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
    code: int,
) -> None:
    assert main([str(store), *arguments]) == code == ConfigError.exit_code
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_another_tokenizer_is_refused_before_anything_is_read(
    store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its text would be of other tokens."""
    (store / "0000/shard-0000001.bin").write_bytes(b"")
    another: Any = SimpleNamespace(fingerprint="another", decode=lambda ids: "x")
    monkeypatch.setattr("megatron_replay.data.tokenizer.load_tokenizer", lambda path: another)
    code = main([str(store), "--verify", "--document", "8", "--tokenizer", "dir", *ALONE])
    assert code == StoreError.exit_code
    error = capsys.readouterr().err
    assert "another tokenizer_fingerprint (expected tokenizer_fingerprint = another; fo" in error
    assert "--tokenizer dir would show other text: give the tokenizer of the store's c" in error
    assert error.count("\n") == 1


def test_impossible_numbers_of_a_damaged_store_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A log-probability above 0, whose exponential overflows; a cap beyond any integer of numpy."""
    selection = {"coverage": 0.9, "max_candidates": 10**30}
    writer = CandidateWriter(tmp_path, describe(num_documents=1, selection=selection))
    document = draw_document(np.random.default_rng(0), vocab_size=300, set_sizes=[3, 4])
    with writer.shard(0) as shard:
        shard.add(0, dataclasses.replace(document, label_logprob=np.full(2, 6e4, np.float32)))
    writer.finish()
    assert main([str(tmp_path), "--document", "0", *ALONE]) == 0
    assert "label 100 %" in capsys.readouterr().out
    assert main([str(tmp_path), *ALONE]) == 0


def test_damage_is_one_line(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = store / "0000/shard-0000001.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    assert main([str(store), "--verify", *ALONE]) == StoreError.exit_code
    *_, error = capsys.readouterr().err.splitlines()
    assert error == f"error: {path}, document 16: damaged: the crc32 differs"


def test_probabilities_are_those_of_the_base_model(tmp_path: Path) -> None:
    """exp(logit - lse), up to fp16: of a real softmax, whatever the rounding of lse."""
    logits = np.random.default_rng(0).normal(20, 3, 1000)
    lse = np.log(np.exp(logits).sum())
    ids = np.sort(np.argsort(-logits)[:50]).astype(np.int32)
    exact = np.exp(logits[ids] - lse)

    def one(x: float) -> np.ndarray:
        return np.array([x], np.float32)

    writer = CandidateWriter(tmp_path, describe(num_documents=1, logits="fp16"))
    with writer.shard(0) as shard:
        shard.add(
            0,
            DocumentCandidates(
                positions=np.zeros(1, np.int32), offsets=np.array([0, 50]), ids=ids, lse=one(lse),
                label_logprob=one(-1), tail_mass=one(1 - exact.sum()),
                logits=logits[ids].astype(np.float32),
            ),
        )  # fmt: skip
    writer.finish()
    row = describe_document(CandidateReader(tmp_path), 0, None, None)["positions"][0]
    found = [c["probability"] for c in row["candidates"]]
    np.testing.assert_allclose(found, exact, rtol=0.015)  # logits near 30 are 1/128 off at most
    assert sum(found) == pytest.approx(row["coverage"])


def test_a_store_of_a_commands_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(tmp_path / "merge", describe(num_documents=1))
    monkeypatch.chdir(tmp_path)
    assert main(["./merge"]) == 0
