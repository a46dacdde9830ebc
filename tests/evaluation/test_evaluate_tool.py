"""tools/evaluate.py from the command line to the JSON."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from megatron_replay.data.corpus import Corpus
from megatron_replay.data.corpus_writer import CorpusWriter
from megatron_replay.data.tokenizer import load_tokenizer
from megatron_replay.errors import ConfigError
from megatron_replay.evaluation import suite
from megatron_replay.evaluation.candidate_mass import candidate_mass
from megatron_replay.evaluation.language_model import load_model, score
from megatron_replay.evaluation.measurements import read_documents
from megatron_replay.evaluation.rows import read_rows
from megatron_replay.files import sha256_of_files
from megatron_replay.platform import registry
from megatron_replay.platform.cpu import CPU
from megatron_replay.store import CandidateReader, CandidateWriter, StoreDescription
from tests.data.tiny_tokenizers import save_sentencepiece
from tests.evaluation.models import VOCAB_SIZE, random_documents, save_model
from tests.evaluation.test_candidate_mass import random_candidates
from tools import evaluate, report


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a model that differs from it, and every kind of input."""
    site = tmp_path_factory.mktemp("site")
    save_model(site / "base")
    weights = load_file(save_model(site / "tuned") / "model.safetensors")
    tuned = {name: 1.01 * tensor for name, tensor in weights.items()}
    save_file(tuned, site / "tuned" / "model.safetensors", metadata={"format": "pt"})
    write_rows(site / "text.jsonl", {"text": "general text " * 9}, {"text": "more"})
    write_rows(
        site / "questions.jsonl",
        {"prompt": "how many?\n", "completion": "select count(*) from book"},
        {"prompt": "which?\n", "completion": "select title from book"},
    )
    choice = {"prompt": "who?\n", "options": ["you", "me"], "answer": 1}
    write_rows(site / "choices.jsonl", choice, choice | {"answer": 0})
    write_rows(site / "wrong.jsonl", choice | {"options": ["me"] * 2})  # the first of equals wins
    connection = sqlite3.connect(site / "database.sqlite")
    connection.execute("create table book (title text)")
    connection.execute("insert into book values ('a')")
    connection.commit()
    connection.close()
    (site / "weights").mkdir()
    save_file(tuned, site / "weights" / "model.safetensors")
    _write_corpus_and_store(site)
    return site


def _write_corpus_and_store(site: Path) -> None:
    documents, rng = random_documents(5), np.random.default_rng(0)
    tokenizer = load_tokenizer(site / "base")
    with CorpusWriter(site / "corpus", tokenizer, row_format="random", source={}) as corpus:
        for document in documents:
            corpus.add(document)
    frozen = Corpus(site / "corpus")
    writer = CandidateWriter(
        site / "store",
        StoreDescription(
            vocab_size=VOCAB_SIZE,
            num_documents=len(documents),
            documents_per_shard=len(documents),
            codec="planar",
            logits="none",
            corpus_fingerprint=frozen.fingerprint,
            tokenizer_fingerprint=frozen.tokenizer_fingerprint,
            checkpoint_fingerprint="none",
            selection={},
        ),
    )
    with writer.shard(0) as shard:
        for number, document in enumerate(documents):
            shard.add(number, random_candidates(document, rng))
    writer.finish()


def flags(site: Path, output: Path) -> list[str]:
    return [
        f"--base={site / 'base'}",
        f"--model=tuned={site / 'tuned'}",
        f"--sql=books={site}",
        f"--choices=domain={site / 'choices.jsonl'}",
        f"--general-choices=general={site / 'choices.jsonl'}",
        f"--general-text={site / 'text.jsonl'}",
        f"--task-data={site / 'questions.jsonl'}",
        f"--data={site / 'text.jsonl'}",
        f"--data-path={site / 'corpus'}",
        f"--store={site / 'store'}",
        f"--output={output}",
        "--max-new-tokens=4",
        "--window=16",
        "--max-documents=3",
    ]


def test_a_sentencepiece_model_in_place_of_the_base_s_tokenizer(site: Path, tmp_path: Path) -> None:
    pieces = save_sentencepiece(tmp_path / "pieces.model")
    given = {
        "--base": site / "base", "--tokenizer": pieces, "--task-data": site / "questions.jsonl",
        "--sql": f"books={site}",
        "--output": tmp_path / "eval.json", "--max-new-tokens": 4,
    }  # fmt: skip
    assert evaluate.main([f"{flag}={value}" for flag, value in given.items()]) == 0
    document = json.loads((tmp_path / "eval.json").read_text())
    tokenizer = load_tokenizer(pieces)
    assert document["tokenizer"] == tokenizer.fingerprint
    [base] = document["models"]
    rows = read_documents(site / "questions.jsonl", tokenizer, row_format="prompt")
    assert base["task"]["perplexity"] == pytest.approx(
        score(load_model(site / "base"), rows).perplexity, rel=1e-5
    )


def test_every_measurement(site: Path, tmp_path: Path) -> None:
    output = tmp_path / "eval.json"
    assert evaluate.main(flags(site, output)) == 0
    document = json.loads(output.read_text())
    assert [model["name"] for model in document["models"]] == ["base", "tuned"]
    base, tuned = document["models"]
    assert base["relative_l2_percent"] == 0.0
    assert tuned["relative_l2_percent"] == pytest.approx(1.0, rel=1e-5)
    assert tuned["sql"]["books"]["questions"] == 2
    assert tuned["sql"]["books"]["unfinished"] == 2
    model, tokenizer = load_model(site / "tuned"), load_tokenizer(site / "base")
    task = score(model, read_documents(site / "questions.jsonl", tokenizer, row_format="prompt"))
    assert tuned["task"]["perplexity"] == pytest.approx(task.perplexity, rel=1e-5)
    assert tuned["task"]["tokens"] == len("select count(*) from bookselect title from book") + 2
    # 9 · 13 characters and EOS, less the first; four characters and EOS, less the first.
    assert tuned["general"]["tokens"] == 9 * 13 + 4
    change = tuned["general"]["perplexity"] - base["general"]["perplexity"]
    assert tuned["general"]["delta_perplexity"] == change != 0
    for name, is_general in (("domain", False), ("general", True)):
        assert tuned["choices"][name]["accuracy"] == 0.5
        assert tuned["choices"][name]["general"] is is_general
    assert tuned["retention"] == {"general": 100.0}
    assert tuned["retention_percent"] == 100.0
    mass = candidate_mass(
        model, Corpus(site / "corpus"), CandidateReader(site / "store"), max_documents=3
    )
    assert tuned["candidates"]["outside_mass"] == pytest.approx(mass.outside_mass)
    assert set(document["inputs"]) == {
        "sql/books", "choices/domain", "general_choices/general", "general_text", "task_data",
        "data", "data_path", "store",
    }  # fmt: skip


def test_reuses_what_is_unchanged(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, text = tmp_path / "eval.json", write_rows(tmp_path / "text.jsonl", {"text": "abc"})
    given = [f"--base={site / 'base'}", f"--general-text={text}", f"--output={output}"]
    measured: list[str] = []
    measure = suite.measure

    def counting(name: str, path: Path, *rest: object, **more: object) -> object:
        measured.append(path.name)
        return measure(name, path, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(suite, "measure", counting)
    evaluate.main(given)
    evaluate.main([*given, f"--model=full={site / 'tuned'}"])
    assert measured == ["base", "tuned"]
    evaluate.main([*given, f"--model=renamed={site / 'tuned'}"])
    assert measured == ["base", "tuned"]
    assert json.loads(output.read_text())["models"][1]["name"] == "renamed"
    evaluate.main([*given, "--window=7"])
    write_rows(text, {"text": "abd"})
    evaluate.main([*given, "--window=7"])
    assert measured == ["base", "tuned", "base", "base"]


class Measuring:
    """Stands in for `measure`: remembers what it measured, and is cut off at the model ``stop``."""

    def __init__(self) -> None:
        self.measured: list[str] = []
        self.stop = ""

    def __call__(self, name: str, path: Path, *_: object, **__: object) -> dict[str, Any]:
        if path.name == self.stop:
            raise KeyboardInterrupt
        self.measured.append(path.name)
        return {"general": {"perplexity": float(len(path.name))}}


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Measuring:
    stub = Measuring()
    monkeypatch.setattr(suite, "measure", stub)
    return stub


def shown_and_kept(output: Path) -> tuple[list[str], list[str]]:
    document = json.loads(output.read_text())
    shown, kept = ([model["name"] for model in document[part]] for part in ("models", "kept"))
    assert all("delta_perplexity" in model["general"] for model in document["models"])
    return shown, kept


@pytest.fixture
def three(site: Path, tmp_path: Path) -> dict[str, Path]:
    """Three models that differ."""
    weights = load_file(site / "base" / "model.safetensors")
    models = {}
    for number, name in enumerate(("a", "b", "new"), start=2):
        models[name] = shutil.copytree(site / "base", tmp_path / name)
        scaled = {key: number * tensor for key, tensor in weights.items()}
        save_file(scaled, models[name] / "model.safetensors", metadata={"format": "pt"})
    return models


def test_no_result_is_lost_by_a_run_that_is_cut_off_or_asks_for_less(
    site: Path, tmp_path: Path, measuring: Measuring, three: dict[str, Path]
) -> None:
    output = tmp_path / "eval.json"
    given = [f"--base={site}/base", f"--general-text={site}/text.jsonl", f"--output={output}"]
    new, a, b = (f"--model={name}={three[name]}" for name in ("new", "a", "b"))
    assert evaluate.main([*given, a, b]) == 0
    measuring.stop = "new"
    assert evaluate.main([*given, new, a, b]) == 130
    assert shown_and_kept(output) == (["base", "a", "b"], [])
    measuring.stop = ""
    assert evaluate.main([*given, new, a, b]) == 0
    assert shown_and_kept(output) == (["base", "new", "a", "b"], [])
    assert evaluate.main([*given, a]) == 0
    assert shown_and_kept(output) == (["base", "a"], ["new", "b"])
    assert measuring.measured == ["base", "a", "b", "new"]
    measuring.stop = "base"  # with other settings, nothing asked for is there
    assert evaluate.main([*given, a, "--window=7"]) == 130
    assert shown_and_kept(output) == (["base", "a"], ["new", "b"])
    measuring.stop = ""
    assert evaluate.main([*given, a, "--window=7"]) == 0
    assert evaluate.main([*given, b, new]) == 0
    assert shown_and_kept(output)[0] == ["base", "b", "new"]
    assert measuring.measured == ["base", "a", "b", "new", "base", "a"]


def test_every_input_is_read_before_the_first_model(
    site: Path, tmp_path: Path, measuring: Measuring, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"--base={site}/base", f"--output={tmp_path}/eval.json"]
    rows = {"prompt": "who?", "options": ["you", "me"], "answer": "B"}
    bad = write_rows(tmp_path / "bad.jsonl", rows)
    assert evaluate.main([*given, f"--sql=s={site}", f"--choices=c={bad}"]) == 3
    assert "bad.jsonl:1: 'answer' names no option" in capsys.readouterr().err
    shutil.copy(site / "database.sqlite", tmp_path)
    write_rows(tmp_path / "questions.jsonl", {"prompt": "p", "completion": "select no from book"})
    assert evaluate.main([*given, f"--sql=s={tmp_path}"]) == 3
    assert "questions.jsonl:1: the gold query fails: no such column" in capsys.readouterr().err
    assert measuring.measured == []


def test_a_question_without_an_answer_is_not_asked(site: Path, tmp_path: Path) -> None:
    shutil.copy(site / "database.sqlite", tmp_path)
    rows = [
        {"prompt": "p", "completion": f"select title from book where title = '{t}'"} for t in "aab"
    ]
    write_rows(tmp_path / "questions.jsonl", *rows)
    output = tmp_path / "eval.json"
    given = [f"--base={site}/base", f"--output={output}", "--max-new-tokens=1"]
    assert evaluate.main([*given, f"--sql=s={tmp_path}"]) == 0
    found = json.loads(output.read_text())["models"][0]["sql"]["s"]
    assert (found["questions"], found["empty_gold"], found["unfinished"]) == (2, 1, 2)


def test_what_a_model_generates_with_is_part_of_it(
    site: Path, tmp_path: Path, measuring: Measuring
) -> None:
    base = shutil.copytree(site / "base", tmp_path / "base")
    (base / "generation_config.json").unlink(missing_ok=True)
    before = suite.model_sha256(base)
    assert before == sha256_of_files([base / "model.safetensors", base / "config.json"])
    (base / "generation_config.json").write_text('{"eos_token_id": 256}')
    assert suite.model_sha256(base) != before


def test_prints_a_line_a_model(
    site: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {"choices": {"c": {"accuracy": 0.5, "general": False}}, "general": {"perplexity": 2.0}}
    monkeypatch.setattr(suite, "measure", lambda *_, **__: json.loads(json.dumps(found)))
    given = [f"--base={site}/base", f"--general-text={site}/text.jsonl", f"--output={tmp_path}/e"]
    assert evaluate.main([*given, f"--model=full={site}/tuned"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "base: c 50.0 %, ΔPPL +0.00, relative L2 0.00 %",
        "full: c 50.0 %, ΔPPL +0.00, relative L2 1.00 %",
        f"{tmp_path}/e: 2 models",
    ]


class Accelerator(CPU):
    """Stands in for one that torch can use: its name is a device of torch's."""

    name = "meta"


def test_the_default_device_is_this_machine_s_and_part_of_the_key(
    site: Path,
    tmp_path: Path,
    measuring: Measuring,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = [f"--base={site}/base", f"--general-text={site}/text.jsonl", f"--output={tmp_path}/e"]
    monkeypatch.setattr(registry, "PLATFORMS", (CPU,))
    assert evaluate.main(given) == evaluate.main([*given, "--device=cpu"]) == 0
    assert "models run on cpu, in float32" in capsys.readouterr().err
    assert measuring.measured == ["base"]
    monkeypatch.setattr(registry, "PLATFORMS", (Accelerator, CPU))
    monkeypatch.setattr(suite, "require_device", lambda _: None)
    assert evaluate.main(given) == 0
    assert "models run on meta, in float32" in capsys.readouterr().err
    assert measuring.measured == ["base", "base"]
    document = json.loads((tmp_path / "e").read_text())
    assert (document["settings"]["device"], document["settings"]["dtype"]) == ("meta", "float32")


def test_an_accelerator_that_cannot_be_used_is_one_line(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(CPU):
        @classmethod
        def available(cls) -> bool:
            raise ConfigError("broken", where="--platform", fix="Give --platform cpu")

    monkeypatch.setattr(registry, "PLATFORMS", (Broken, CPU))
    given = [f"--base={site}/base", f"--general-text={site}/text.jsonl", f"--output={tmp_path}/e"]
    assert evaluate.main(given) == 2
    assert "error: --device: broken. Give --device cpu\n" in capsys.readouterr().err


def test_a_prompt_that_the_model_cannot_read(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(site / "database.sqlite", tmp_path)
    rows, output = tmp_path / "questions.jsonl", tmp_path / "eval.json"
    given = [f"--base={site}/base", f"--sql=s={tmp_path}", f"--output={output}"]
    write_rows(rows, {"prompt": "", "completion": "select 1"})
    assert evaluate.main(given) == 3
    assert "questions.jsonl:1: the prompt is empty" in capsys.readouterr().err
    write_rows(rows, {"prompt": "p", "completion": "select 1"})
    small = save_model(tmp_path / "small", vocab_size=64)
    assert evaluate.main([*given, f"--base={small}"]) == 3
    assert (
        "questions.jsonl:1: the prompt holds a token that the model lacks (expected ids below 64; "
        "found 79)" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["--model=base={site}/tuned"], 2, "this name is the base's own"),
        (["--model=tuned"], 2, "not a name and a path (expected NAME=DIR; found tuned)"),
        (["--model=a=x", "--model=a=y"], 2, "a is given twice"),
        (["--store={site}/store"], 2, "--data-path and --store are given together"),
        (["--sql=books"], 2, "--sql: not a name and a path (expected NAME=DIR; found books)"),
        (["--sql=books={site}/store"], 3, "store: no layout of SQL questions that is known"),
        (["--choices=c={site}/missing"], 3, "no such file, given as --choices"),
        (["--choices=c={site}/text.jsonl"], 3, "text.jsonl:1: missing key (expected 'prompt'"),
        (["--choices=c={site}/c", "--general-choices=c={site}/c"], 2, "have one name"),
        (["--sql=c={site}", "--choices=c={site}/c"], 2, "have one name"),
        (["--device=cuda:99"], 2, "--device: torch cannot use this device: "),
        (["--device=gpu"], 2, "--device: torch cannot use this device: Expected one of cpu"),
        (["--lm-eval-tasks=c"], 2, "--lm-eval-include-path are given together"),
        (["--general-choices=c={site}/wrong.jsonl"], 3, "benchmark c: the base scores 0"),
        (["--sql=books={site}", "--max-new-tokens=510"], 3, "questions.jsonl:1: prompt and answer"),
        (["--window=0"], 2, "--window: must be positive (found 0)"),
        (["--query-seconds=nan"], 2, "--query-seconds: must be positive (found nan)"),
        (["--query-seconds=inf"], 2, "--query-seconds: must be positive (found inf)"),
        (["--query-seconds=1e300"], 2, "--query-seconds: too long for one query"),
        (["--data={site}/missing"], 3, "no such file, given as --data"),
        (["--task-data={site}/text.jsonl"], 3, "text.jsonl:1"),
        (["--model=a={site}"], 4, "no safetensors files here"),
        (["--model=a={site}/weights"], 4, "no Hugging Face model here (expected config.json"),
    ],
)
def test_mistakes_are_one_line(
    site: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    code: int,
    message: str,
) -> None:
    given = [f"--base={site}/base", f"--general-text={site}/text.jsonl", f"--output={tmp_path}/e"]
    assert evaluate.main([*given, *(part.format(site=site) for part in change)]) == code
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


@pytest.mark.parametrize(
    "output",
    ["base/model.safetensors", "tuned/config.json", "base/tokenizer.json", "text.jsonl",
     "database.sqlite", "questions.jsonl", "choices.jsonl", "corpus.json", "store/store.json",
     "link"],
)  # fmt: skip
def test_the_output_is_no_input(
    site: Path, tmp_path: Path, measuring: Measuring, output: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if output == "link":
        (tmp_path / "link").symlink_to(site / "text.jsonl")
        path = tmp_path / "link"
    else:
        path = site / output
    before = path.read_bytes()
    assert evaluate.main([*flags(site, tmp_path / "e"), f"--output={path}"]) == 2
    assert f"--output {path}: the output is also read, as --" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert not measuring.measured


@pytest.mark.parametrize("content", [b"notes", b"{}", b'{"format": 2, "models": []}', None])
def test_the_output_replaces_nothing_but_an_evaluation(
    site: Path, tmp_path: Path, measuring: Measuring, content: bytes | None
) -> None:
    output = tmp_path / "mine"
    os.mkfifo(output) if content is None else output.write_bytes(content)
    assert evaluate.main(flags(site, output)) == 3
    assert content is None or output.read_bytes() == content
    assert not measuring.measured


@pytest.mark.parametrize(
    "flag", ["general-text", "data", "task-data", "choices", "general-choices", "sql", "tokenizer"]
)
def test_pipes_are_one_line(
    site: Path, tmp_path: Path, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "pipe"
    if flag == "sql":
        shutil.copy(site / "questions.jsonl", tmp_path)
        name = "database.sqlite"
    os.mkfifo(tmp_path / name)
    value = {"sql": f"s={tmp_path}", "choices": f"c={tmp_path}/pipe",
             "general-choices": f"c={tmp_path}/pipe"}.get(flag, f"{tmp_path}/pipe")  # fmt: skip
    given = [f"--base={site}/base", f"--general-text={site}/text.jsonl", f"--output={tmp_path}/e"]
    assert evaluate.main([*given, f"--{flag}={value}"]) == 3
    [line] = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert "found a pipe" in line or flag == "tokenizer"


def test_file_names_that_are_not_utf8(
    site: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], measuring: Measuring
) -> None:
    """They are read, written and reported; a name, which is drawn, cannot be so."""
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    place.mkdir()
    text, output = shutil.copy(site / "text.jsonl", place), place / "eval.json"
    given = [f"--base={site}/base", f"--general-text={text}", f"--output={output}"]
    assert evaluate.main([*given, f"--model=tuned={site}/tuned"]) == 0
    assert json.loads(output.read_text())["inputs"]["general_text"]["path"] == str(text)
    rows = ["row", f"--evaluation={output}", "--model=base", f"--rows={place}/rows.jsonl"]
    assert report.main(rows) == 0
    [row] = read_rows(place / "rows.jsonl")
    assert str(place) in row.command
    tables = ["tables", f"--rows={place}/rows.jsonl", f"--output-dir={place}/tables"]
    assert report.main([*tables, "--no-figures"]) == 3  # a base alone has no table
    document = json.loads(output.read_text())
    for model in document["models"]:
        model["data"] = {"perplexity": 2.0, "accuracy": 0.5}
    output.write_text(json.dumps(document))
    assert report.main([f"--evaluation={output}", f"--output-dir={place}/report"]) == 0
    assert "caf\\udce9/text.jsonl" in (place / "report" / "report.md").read_text()
    assert "caf\\udce9/text.jsonl" in capfd.readouterr().out
    for main, wrong in ((evaluate.main, "--model=\udce9=x"), (report.main, "--run=\udce9=x")):
        start = given if main is evaluate.main else [f"--evaluation={output}", "--output-dir=x"]
        assert main([*start, wrong]) == 2
        assert "this name is not UTF-8 (found '\\udce9')" in capfd.readouterr().err
    assert report.main([*rows, "--base=\udce9"]) == 2


def test_nothing_to_measure(site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([f"--base={site}/base", f"--output={tmp_path}/e"]) == 2
    assert "nothing to measure" in capsys.readouterr().err


def test_a_store_of_another_corpus_is_refused(site: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(site / "base")
    with CorpusWriter(tmp_path / "other", tokenizer, row_format="random", source={}) as corpus:
        for document in random_documents(5, seed=8):
            corpus.add(document)
    given = flags(site, tmp_path / "e")
    assert evaluate.main([*given, f"--data-path={tmp_path / 'other'}"]) == 5


def test_base_is_compared_with_itself_exactly(site: Path, tmp_path: Path) -> None:
    output = tmp_path / "eval.json"
    twin = f"--model=twin={site / 'base'}"
    given = [f"--base={site}/base", f"--general-text={site}/text.jsonl", f"--output={output}"]
    assert evaluate.main([*given, twin]) == 0
    assert json.loads(output.read_text())["models"][1]["general"]["delta_perplexity"] == 0.0
