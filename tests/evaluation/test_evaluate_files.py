"""tools/evaluate.py: which files it reads and writes, and which it refuses."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.evaluation.evaluation_site import Measuring, flags
from tools import evaluate, report


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


def test_an_earlier_result_that_lacks_something(
    site: Path, tmp_path: Path, measuring: Measuring, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"--base={site}/base", f"--general-text={site}/text.jsonl", f"--output={tmp_path}/e"]
    given += [f"--model=tuned={site}/tuned"]
    assert evaluate.main(given) == 0
    document = json.loads((tmp_path / "e").read_text())
    del document["models"][1]["general"]
    (tmp_path / "e").write_text(json.dumps(document))
    assert evaluate.main(given) == 3
    assert "tuned: damaged: an earlier result lacks" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["general-text", "data", "choices", "general-choices", "sql"])
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
    assert "found a pipe" in line


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
