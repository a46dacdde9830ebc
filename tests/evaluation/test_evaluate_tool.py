"""tools/evaluate.py from the command line to the JSON."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_replay import platform
from megatron_replay.data.corpus import Corpus
from megatron_replay.data.corpus_writer import CorpusWriter
from megatron_replay.data.tokenizer import load_tokenizer
from megatron_replay.errors import ConfigError
from megatron_replay.evaluation import results, suite
from megatron_replay.evaluation.language_model import load_model, score
from megatron_replay.evaluation.measurements import candidate_mass, read_documents
from megatron_replay.files import sha256_of_files
from megatron_replay.platform.devices import CPU
from megatron_replay.store import CandidateReader
from tests.evaluation.evaluation_site import SLOW_MACHINE, Measuring, flags, write_rows
from tests.evaluation.models import random_documents, save_model
from tests.store.examples import write_corpus
from tools import evaluate


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
    assert tuned["data"]["perplexity"] == pytest.approx(task["perplexity"], rel=1e-5)
    assert tuned["data"]["tokens"] == len("select count(*) from bookselect title from book") + 2
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
        model, Corpus(site / "corpus"), CandidateReader(site / "store"), num_documents=200
    )
    assert tuned["candidates"]["outside_mass"] == pytest.approx(mass["outside_mass"])
    assert set(document["inputs"]) == {
        "sql/books", "choices/domain", "general_choices/general", "general_text",
        "data", "data_path", "store",
    }  # fmt: skip


def test_reuses_what_is_unchanged(site: Path, tmp_path: Path, measuring: Measuring) -> None:
    output, text = tmp_path / "eval.json", write_rows(tmp_path / "text.jsonl", {"text": "abc"})
    given = [f"--base={site / 'base'}", f"--general-text={text}", f"--output={output}"]
    evaluate.main(given)
    evaluate.main([*given, f"--model=full={site / 'tuned'}"])
    assert measuring.measured == ["base", "tuned"]
    evaluate.main([*given, f"--model=renamed={site / 'tuned'}"])
    assert measuring.measured == ["base", "tuned"]
    assert json.loads(output.read_text())["models"][1]["name"] == "renamed"
    evaluate.main([*given, "--batch-size=7"])
    write_rows(text, {"text": "abd"})
    evaluate.main([*given, "--batch-size=7"])
    assert measuring.measured == ["base", "tuned", "base", "base"]


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
    assert evaluate.main([*given, a, "--batch-size=7"]) == 130
    assert shown_and_kept(output) == (["base", "a"], ["new", "b"])
    measuring.stop = ""
    assert evaluate.main([*given, a, "--batch-size=7"]) == 0
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
    assert evaluate.main([*given, f"--sql=s={tmp_path}", SLOW_MACHINE]) == 0
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
    monkeypatch.setattr(platform, "PLATFORMS", (CPU,))
    assert evaluate.main(given) == evaluate.main([*given, "--device=cpu"]) == 0
    assert "models run on cpu, in float32" in capsys.readouterr().err
    assert measuring.measured == ["base"]
    monkeypatch.setattr(platform, "PLATFORMS", (Accelerator, CPU))
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

    monkeypatch.setattr(platform, "PLATFORMS", (Broken, CPU))
    given = [f"--base={site}/base", f"--general-text={site}/text.jsonl", f"--output={tmp_path}/e"]
    assert evaluate.main(given) == 2
    assert "error: --device: broken. Give --device cpu\n" in capsys.readouterr().err


def test_a_prompt_that_the_model_cannot_read(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(site / "database.sqlite", tmp_path)
    rows, output = tmp_path / "questions.jsonl", tmp_path / "eval.json"
    given = [f"--base={site}/base", f"--sql=s={tmp_path}", f"--output={output}", SLOW_MACHINE]
    write_rows(rows, {"prompt": "", "completion": "select 1"})
    assert evaluate.main(given) == 3
    assert "questions.jsonl:1: the prompt is empty" in capsys.readouterr().err
    write_rows(rows, {"prompt": "p", "completion": "select 1"})
    small = save_model(tmp_path / "small", vocab_size=64)
    assert evaluate.main([*given, f"--base={small}"]) == 3
    assert (
        "questions.jsonl:1: a token that the model lacks (expected ids below 64; "
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
        (["--sql=books={site}/store"], 3, "store: not a known layout of SQL questions"),
        (["--choices=c={site}/missing"], 3, "no such file, given as --choices"),
        (["--choices=c={site}/text.jsonl"], 3, "text.jsonl:1: missing key (expected 'prompt'"),
        (["--choices=c={site}/c", "--general-choices=c={site}/c"], 2, "have one name"),
        (["--sql=c={site}", "--choices=c={site}/c"], 2, "have one name"),
        (["--device=cuda:99"], 2, "--device: torch cannot use this device: "),
        (["--device=gpu"], 2, "--device: torch cannot use this device: Expected one of cpu"),
        (["--lm-eval-tasks=c"], 2, "--lm-eval-include-path are given together"),
        (["--general-choices=c={site}/wrong.jsonl"], 3, "benchmark c: the base scores 0"),
        (
            ["--sql=books={site}", "--max-new-tokens=510", SLOW_MACHINE],
            3,
            "questions.jsonl:1: longer than the model's context",
        ),
        (["--batch-size=0"], 2, "--batch-size: unusable value"),
        (["--sql=c={site}", "--query-seconds=nan"], 2, "--query-seconds: unusable value"),
        (["--sql=c={site}", "--query-seconds=inf"], 2, "--query-seconds: unusable value"),
        (["--sql=c={site}", "--query-seconds=1e300"], 2, "--query-seconds: unusable value"),
        (["--data={site}/missing"], 3, "no such file, given as --data"),
        (["--data={site}/choices.jsonl"], 3, "choices.jsonl:1"),
        (["--model=a={site}"], 4, "no Hugging Face model here"),
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
    "flag",
    ["--query-seconds=2", "--max-new-tokens=9", "--batch-size=9"],
)
def test_a_setting_that_nothing_reads(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    material = [f"--data-path={site}/corpus", f"--store={site}/store"]
    given = [f"--base={site}/base", f"--output={tmp_path}/e"]
    assert evaluate.main(given) == 2
    assert "nothing to measure" in capsys.readouterr().err
    assert evaluate.main([*given, *material, flag]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        f"error: {flag.split('=')[0]}: has no effect on what is measured. Add --"
    )


def test_a_store_of_another_corpus_is_refused(site: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(site / "base")
    with CorpusWriter(tmp_path / "other", tokenizer, row_format="random", source={}) as corpus:
        for document in random_documents(5, seed=8):
            corpus.add(document)
    given = flags(site, tmp_path / "e")
    assert evaluate.main([*given, f"--data-path={tmp_path / 'other'}"]) == 5


def test_a_store_of_another_base_or_tokenizer_is_refused(
    site: Path, tmp_path: Path, measuring: Measuring, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_model(tmp_path / "other", seed=1)
    assert evaluate.main([*flags(site, tmp_path / "e"), f"--base={other}"]) == 5
    assert (
        f"{site}/store: the store was made with another base model than --base, by "
        "model.safetensors. Give the --base that Stage 0 had" in capsys.readouterr().err
    )
    retold = shutil.copytree(site / "base", tmp_path / "retold")
    (retold / "special_tokens_map.json").write_text("{}")
    assert evaluate.main([*flags(site, tmp_path / "e"), f"--base={retold}"]) == 3
    assert (
        f"{retold}: the corpus was made with another tokenizer than --base has, by "
        "special_tokens_map.json" in capsys.readouterr().err
    )
    write_corpus(tmp_path / "corpus", random_documents(5))
    assert evaluate.main([*flags(site, tmp_path / "e"), f"--data-path={tmp_path}/corpus"]) == 5
    assert "tokenizer_fingerprint" in capsys.readouterr().err
    assert measuring.measured == []


def test_a_model_of_another_tokenizer_is_refused(
    site: Path, tmp_path: Path, measuring: Measuring, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(site / "tuned", tmp_path / "other")
    given = [f"--base={site}/base", f"--general-text={site}/text.jsonl", f"--output={tmp_path}/e"]
    given.append(f"--model=other={other}")
    config = json.loads((other / "tokenizer_config.json").read_text())
    file = other / "tokenizer_config.json"
    file.write_text(json.dumps(config | {"model_max_length": 7}))  # as save_pretrained rewrites it
    assert evaluate.main(given) == 0
    file.write_text(json.dumps(config | {"chat_template": "{{ messages }}"}))
    content = json.loads((other / "tokenizer.json").read_text())
    for name, damaged in (("tokenizer_config.json", None), ("tokenizer.json", content)):
        if damaged:
            file.write_text(json.dumps(config))
            vocabulary = damaged["model"]["vocab"]
            vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
            (other / name).write_text(json.dumps(damaged))
        assert evaluate.main(given) == 3
        said = capsys.readouterr().err
        assert f"{other}: --model other has another tokenizer than --base, by" in said
        assert name in said
    for path in other.glob("*token*"):
        path.unlink()
    measuring.measured.clear()
    assert evaluate.main(given) == 0
    assert measuring.measured == []


def test_results_are_json_whatever_diverged(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is read is what was measured: a perplexity beyond a float."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    output = tmp_path / "eval.json"
    given = [f"--base={site}/base", f"--general-text={site}/text.jsonl", f"--output={output}"]
    found = {"general": {"perplexity": math.inf, "loss": 800.0}}
    monkeypatch.setattr(suite, "measure", lambda *_, **__: json.loads(json.dumps(found)))
    for _ in range(2):  # the second reads the results of the first
        assert evaluate.main([*given, f"--model=tuned={site}/tuned"]) == 0
        document = json.loads(output.read_text(), parse_constant=refuse)
        assert document["models"][1]["general"]["perplexity"] == "Infinity"
        assert document["models"][1]["general"]["delta_perplexity"] == "NaN"
    general = results.read_evaluation(output)["models"][1]["general"]
    assert general["perplexity"] == math.inf
    assert math.isnan(general["delta_perplexity"])
