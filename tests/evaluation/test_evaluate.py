"""tools/evaluate.py: its JSON, the files it reads and writes, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import pytest

from megatron_replay import platform
from megatron_replay.data.corpus import Corpus
from megatron_replay.data.tokenizer import load_tokenizer
from megatron_replay.errors import ConfigError
from megatron_replay.evaluation import suite
from megatron_replay.evaluation.language_model import load_model, score
from megatron_replay.evaluation.measurements import candidate_mass, read_documents
from megatron_replay.evaluation.results import read_evaluation
from megatron_replay.files import sha256_of_files
from megatron_replay.platform.devices import CPU
from megatron_replay.store import CandidateReader
from tests.evaluation.site import (
    SLOW_MACHINE,
    random_documents,
    save_model,
    write_corpus,
    write_rows,
)
from tests.store import examples
from tools import evaluate, report


def every_input(site: Path) -> list[str]:
    return [
        f"--model=tuned={site}/tuned", f"--sql=books={site}",
        f"--choices=domain={site}/choices.jsonl", f"--general-choices=general={site}/choices.jsonl",
        f"--data={site}/questions.jsonl", f"--data-path={site}/corpus", f"--store={site}/store",
        "--max-new-tokens=4", *SLOW_MACHINE,
    ]  # fmt: skip


def written(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "eval.json").read_text())


def test_every_measurement(site, tmp_path, run):
    assert run(*every_input(site)) == (0, "")
    document = written(tmp_path)
    assert [model["name"] for model in document["models"]] == ["base", "tuned"]
    base, tuned = document["models"]
    assert base["relative_l2_percent"] == 0.0
    assert tuned["relative_l2_percent"] == pytest.approx(1.0, rel=1e-5)
    assert tuned["sql"]["books"]["questions"] == tuned["sql"]["books"]["unfinished"] == 2
    model, tokenizer = load_model(site / "tuned"), load_tokenizer(site / "base")
    task = score(model, read_documents(site / "questions.jsonl", tokenizer, row_format="prompt"))
    assert tuned["data"]["perplexity"] == pytest.approx(task["perplexity"], rel=1e-5)
    assert tuned["data"]["tokens"] == len("select count(*) from bookselect title from book") + 2
    # 9 · 13 characters and EOS, less the first; four characters and EOS, less the first.
    assert tuned["general"]["tokens"] == 9 * 13 + 4
    change = tuned["general"]["perplexity"] - base["general"]["perplexity"]
    assert tuned["general"]["delta_perplexity"] == change != 0
    for name, is_general in (("domain", False), ("general", True)):
        assert tuned["choices"][name]["accuracy"] == 0.5
        assert tuned["choices"][name]["general"] is is_general
    assert (tuned["retention"], tuned["retention_percent"]) == ({"general": 100.0}, 100.0)
    corpus, store = Corpus(site / "corpus"), CandidateReader(site / "store")
    mass = candidate_mass(model, corpus, store, num_documents=200)
    assert tuned["candidates"]["outside_mass"] == pytest.approx(mass["outside_mass"])
    assert set(document["inputs"]) == {
        "sql/books", "choices/domain", "general_choices/general", "general_text",
        "data", "data_path", "store",
    }  # fmt: skip


def test_reuses_what_is_unchanged(site, tmp_path, run, measuring):
    text = write_rows(tmp_path / "text.jsonl", {"text": "abc"})
    given = [f"--general-text={text}"]
    run(*given)
    run(*given, f"--model=full={site}/tuned")
    run(*given, f"--model=renamed={site}/tuned")
    assert measuring.measured == ["base", "tuned"]
    assert written(tmp_path)["models"][1]["name"] == "renamed"
    run(*given, "--batch-size=7")
    write_rows(text, {"text": "abd"})
    run(*given, "--batch-size=7")
    assert measuring.measured == ["base", "tuned", "base", "base"]


def test_no_result_is_lost_by_a_run_that_is_cut_off_or_asks_for_less(tmp_path, run, measuring):
    a, b, new = (
        f"--model={name}={save_model(tmp_path / name, scale=scale)}"
        for scale, name in enumerate(("a", "b", "new"), start=2)
    )

    def after(code: int, *flags: str, stop: str = "") -> tuple[list[str], list[str]]:
        """Names of the shown and of the kept results."""
        measuring.stop = stop
        assert run(*flags)[0] == code
        document = written(tmp_path)
        assert all("delta_perplexity" in model["general"] for model in document["models"])
        return tuple([model["name"] for model in document[part]] for part in ("models", "kept"))

    assert after(0, a, b) == (["base", "a", "b"], [])
    assert after(130, new, a, b, stop="new") == (["base", "a", "b"], [])
    assert after(0, new, a, b) == (["base", "new", "a", "b"], [])
    assert after(0, a) == (["base", "a"], ["new", "b"])
    assert measuring.measured == ["base", "a", "b", "new"]
    # With other settings, nothing requested is there.
    assert after(130, a, "--batch-size=7", stop="base") == (["base", "a"], ["new", "b"])
    assert after(0, a, "--batch-size=7")[0] == ["base", "a"]
    assert after(0, b, new)[0] == ["base", "b", "new"]
    assert measuring.measured == ["base", "a", "b", "new", "base", "a"]


def test_every_input_is_read_before_the_first_model(site, tmp_path, run, measuring):
    choice = {"prompt": "who?", "options": ["you", "me"], "answer": "B"}
    bad, sql = write_rows(tmp_path / "bad", choice), tmp_path / "questions.jsonl"
    code, error = run(f"--sql=s={site}", f"--choices=c={bad}")
    assert (code, "bad:1: 'answer' names no option" in error) == (3, True)
    shutil.copy(site / "database.sqlite", tmp_path)
    for prompt, query, message in (
        ("p", "select no from book", "the gold query fails: no such column"),
        ("", "select 1", "'prompt' is empty"),
    ):
        write_rows(sql, {"prompt": prompt, "completion": query})
        code, error = run(f"--sql=s={tmp_path}")
        assert (code, f"questions.jsonl:1: {message}" in error) == (3, True)
    assert measuring.measured == []


def test_a_question_without_an_answer_is_not_asked(site, tmp_path, run):
    shutil.copy(site / "database.sqlite", tmp_path)
    rows = [
        {"prompt": "p", "completion": f"select title from book where title = '{t}'"} for t in "aab"
    ]
    write_rows(tmp_path / "questions.jsonl", *rows)
    assert run(f"--sql=s={tmp_path}", "--max-new-tokens=1", *SLOW_MACHINE) == (0, "")
    found = written(tmp_path)["models"][0]["sql"]["s"]
    assert (found["questions"], found["empty_gold"], found["unfinished"]) == (2, 1, 2)


def test_what_a_model_generates_with_is_part_of_it(site, tmp_path):
    base = shutil.copytree(site / "base", tmp_path / "base")
    (base / "generation_config.json").unlink(missing_ok=True)
    before = suite.model_sha256(base)
    assert before == sha256_of_files([base / "model.safetensors", base / "config.json"])
    (base / "generation_config.json").write_text('{"eos_token_id": 256}')
    assert suite.model_sha256(base) != before


def test_prints_a_line_a_model(site, tmp_path, capsys, measuring):
    measuring.result = {"choices": {"c": {"accuracy": 0.5, "general": False}}}
    given = [f"--base={site}/base", f"--general-text={site}/text.jsonl", f"--output={tmp_path}/e"]
    assert evaluate.main([*given, f"--model=full={site}/tuned"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "base: c 50.0 %, ΔPPL +0.00, relative L2 0.00 %",
        "full: c 50.0 %, ΔPPL +1.00, relative L2 1.00 %",
        f"{tmp_path}/e: 2 models",
    ]


class Accelerator(CPU):
    """Stands in for one that torch can use: its name is a device of torch's."""

    name = "meta"


class Broken(CPU):
    @classmethod
    def available(cls) -> bool:
        raise ConfigError("broken", where="--platform", fix="Give --platform cpu")


def test_the_default_device_is_this_machine_s_and_part_of_the_key(
    tmp_path, run, measuring, monkeypatch
):
    monkeypatch.setattr(platform, "PLATFORMS", (CPU,))
    assert run() == run("--device=cpu") == (0, "")
    assert measuring.measured == ["base"]
    monkeypatch.setattr(platform, "PLATFORMS", (Accelerator, CPU))
    monkeypatch.setattr(suite, "require_device", lambda _: None)
    assert run() == (0, "")
    assert measuring.measured == ["base", "base"]
    settings = written(tmp_path)["settings"]
    assert (settings["device"], settings["dtype"]) == ("meta", "float32")
    monkeypatch.setattr(platform, "PLATFORMS", (Broken, CPU))
    assert run() == (2, "error: --device: broken. Give --device cpu")


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ("--model=base={site}/tuned", 2, "this name is the base's own"),
        ("--model=tuned", 2, "not a name and a path (expected NAME=DIR; found tuned)"),
        ("--model=a=x --model=a=y", 2, "a is given twice"),
        ("--model=\udce9=x", 2, "this name is not UTF-8 (found '\\udce9')"),
        ("--store={site}/store", 2, "--data-path and --store are given together"),
        ("--sql=books", 2, "--sql: not a name and a path (expected NAME=DIR; found books)"),
        ("--choices=c", 2, "--choices: not a name and a path (expected NAME=FILE; found c)"),
        ("--sql=books={site}/store", 3, "store: not a known layout of SQL questions"),
        ("--choices=c={site}/missing", 3, "no such file, given as --choices"),
        ("--choices=c={site}/text.jsonl", 3, "text.jsonl:1: missing key (expected 'prompt'"),
        ("--choices=c={site}/c --general-choices=c={site}/c", 2, "have one name"),
        ("--sql=c={site} --choices=c={site}/c", 2, "have one name"),
        ("--device=cuda:99", 2, "--device: torch cannot use this device: "),
        ("--device=gpu", 2, "--device: torch cannot use this device: Expected one of cpu"),
        ("--dtype=half", 2, "--dtype: unusable value (expected one of float32, bfloat16; found"),
        ("--lm-eval-tasks=c", 2, "--lm-eval-include-path are given together"),
        ("--general-choices=c={site}/wrong.jsonl", 3, "benchmark c: the base scores 0"),
        (f"--sql=s={{site}} --max-new-tokens=510 {' '.join(SLOW_MACHINE)}", 3,
         "questions.jsonl:1: longer than the model's context"),
        ("--batch-size=0", 2, "--batch-size: unusable value (expected a number from 1, at most"),
        ("--sql=c={site} --query-seconds=nan", 2, "--query-seconds: unusable value"),
        ("--sql=c={site} --query-seconds=inf", 2, "--query-seconds: unusable value"),
        ("--sql=c={site} --query-seconds=1e300", 2, "--query-seconds: unusable value"),
        ("--sql=c={site} --query-seconds=0", 2, "--query-seconds: unusable value"),
        ("--query-seconds=2", 2, "--query-seconds: has no effect on what is measured. Add --sql"),
        ("--max-new-tokens=9", 2, "--max-new-tokens: has no effect on what is measured"),
        ("--data={site}/missing", 3, "no such file, given as --data"),
        ("--data={site}/choices.jsonl", 3, "choices.jsonl:1"),
        ("--model=a={site}", 4, "no Hugging Face model here"),
        ("--model=a={site}/weights", 4, "no Hugging Face model here (expected config.json"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(site, run, change, code, message):
    found, error = run(*change.format(site=site).split())
    assert found == code
    assert message in error


def test_a_command_that_measures_nothing(site, tmp_path, capsys):
    given = [f"--base={site}/base", f"--output={tmp_path}/e"]
    assert evaluate.main(given) == 2
    assert "nothing to measure (expected at least one of --sql, " in capsys.readouterr().err
    given += [f"--data-path={site}/corpus", f"--store={site}/store", "--batch-size=9"]
    assert evaluate.main(given) == 2
    assert "--batch-size: has no effect on what is measured" in capsys.readouterr().err


def test_what_was_made_for_something_else_is_refused(site, tmp_path, run, measuring):
    other, retold = save_model(tmp_path / "other", seed=1), tmp_path / "retold"
    shutil.copytree(site / "base", retold)
    (retold / "special_tokens_map.json").write_text("{}")
    write_corpus(tmp_path / "texts", site / "base", random_documents(5, seed=8))
    examples.write_corpus(tmp_path / "tokens", random_documents(5))
    for flag, code, message in (
        (f"--data-path={tmp_path}/texts", 5, "corpus_fingerprint"),
        (f"--data-path={tmp_path}/tokens", 5, "tokenizer_fingerprint"),
        (f"--base={other}", 5, f"{site}/store: the store was made with another base model than "
         "--base, by model.safetensors. Give the --base that Stage 0 had"),
        (f"--base={retold}", 3, f"{retold}: the corpus was made with another tokenizer than "
         "--base has, by special_tokens_map.json"),
    ):  # fmt: skip
        found, error = run(*every_input(site), flag)
        assert (found, message in error) == (code, True), error
    assert measuring.measured == []


def test_a_model_of_another_tokenizer_is_refused(site, tmp_path, run, measuring):
    other = shutil.copytree(site / "tuned", tmp_path / "other")
    config_file, file = other / "tokenizer_config.json", other / "tokenizer.json"
    config, whole = config_file.read_text(), file.read_text()
    vocabulary = json.loads(whole)
    ids = vocabulary["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]

    def changed(**fields: object) -> str:
        return json.dumps(json.loads(config) | fields)

    for damaged, content, code in (
        (config_file, changed(model_max_length=7), 0),  # as save_pretrained rewrites it
        (config_file, changed(chat_template="{{ messages }}"), 3),
        (file, json.dumps(vocabulary), 3),
    ):
        config_file.write_text(config)
        damaged.write_text(content)
        found, error = run(f"--model=other={other}")
        assert found == code
        message = f"{other}: --model other has another tokenizer than --base, by {damaged.name}"
        assert not code or message in error
    for path in other.glob("*token*"):
        path.unlink()
    measuring.measured.clear()
    assert run(f"--model=other={other}") == (0, "")
    assert measuring.measured == []


def test_results_are_json_whatever_diverged(site, tmp_path, run, measuring):
    """And what is read is what was measured: a perplexity beyond a float."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    measuring.result = {"general": {"perplexity": math.inf, "loss": 800.0}}
    for _ in range(2):  # the second reads the results of the first
        assert run(f"--model=tuned={site}/tuned") == (0, "")
        text = (tmp_path / "eval.json").read_text()
        general = json.loads(text, parse_constant=refuse)["models"][1]["general"]
        assert (general["perplexity"], general["delta_perplexity"]) == ("Infinity", "NaN")
    general = read_evaluation(tmp_path / "eval.json")["models"][1]["general"]
    assert general["perplexity"] == math.inf
    assert math.isnan(general["delta_perplexity"])


@pytest.mark.parametrize(
    "output",
    ["base/model.safetensors", "tuned/config.json", "base/tokenizer.json", "text.jsonl",
     "database.sqlite", "questions.jsonl", "choices.jsonl", "corpus.json", "store/store.json",
     "link"],
)  # fmt: skip
def test_the_output_is_no_input(site, tmp_path, run, measuring, output):
    path = site / output
    if output == "link":
        path = tmp_path / "link"
        path.symlink_to(site / "text.jsonl")
    before = path.read_bytes()
    code, error = run(*every_input(site), f"--output={path}")
    assert (code, f"--output {path}: the output is also read, as --" in error) == (2, True)
    assert path.read_bytes() == before
    assert not measuring.measured


@pytest.mark.parametrize("content", [b"notes", b"{}", b'{"format": 2, "models": []}', None])
def test_the_output_replaces_nothing_but_an_evaluation(tmp_path, run, measuring, content):
    output = tmp_path / "mine"
    os.mkfifo(output) if content is None else output.write_bytes(content)
    assert run(f"--output={output}")[0] == 3
    assert content is None or output.read_bytes() == content
    assert not measuring.measured


def test_an_earlier_result_that_lacks_something(site, tmp_path, run, measuring):
    assert run(f"--model=tuned={site}/tuned") == (0, "")
    document = written(tmp_path)
    del document["models"][1]["general"]
    (tmp_path / "eval.json").write_text(json.dumps(document))
    code, error = run(f"--model=tuned={site}/tuned")
    assert (code, "tuned: damaged: an earlier result lacks" in error) == (3, True)


@pytest.mark.parametrize(
    "flag", ["general-text=", "data=", "choices=c=", "general-choices=c=", "sql=s="]
)
def test_pipes_are_one_line(site, tmp_path, run, flag):
    shutil.copy(site / "questions.jsonl", tmp_path)
    os.mkfifo(tmp_path / "database.sqlite")
    place = tmp_path if flag.startswith("sql") else tmp_path / "database.sqlite"
    code, error = run(f"--{flag}{place}")
    assert (code, "found a pipe" in error) == (3, True)


def test_file_names_that_are_not_utf8(site, tmp_path, capsys, measuring):
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    place.mkdir()
    text, output = shutil.copy(site / "text.jsonl", place), place / "eval.json"
    measuring.result = {"data": {"perplexity": 2.0, "accuracy": 0.5}}
    given = [f"--base={site}/base", f"--general-text={text}", f"--output={output}"]
    assert evaluate.main(given) == 0
    assert json.loads(output.read_text())["inputs"]["general_text"]["path"] == str(text)
    assert report.main([f"--evaluation={output}", f"--output-dir={place}/report"]) == 0
    assert "caf\\udce9/text.jsonl" in (place / "report" / "report.md").read_text()
    assert "caf\\udce9/text.jsonl" in capsys.readouterr().out
