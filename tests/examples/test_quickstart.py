"""The quick start's data: deterministic, split by query, answered by the database."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from examples.quickstart import abilities, init_base, make_data, network, split_data
from megatron_replay.checkpoint.staging import WRITTEN
from megatron_replay.errors import OutputError
from megatron_replay.evaluation.sql.execution import execution_match
from megatron_replay.evaluation.sql.sets import SqlQuestion

TEST = "domain_test/questions"
SMALL = ["--train=150", "--test=90", "--general=8"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("quickstart") / "data"
    assert make_data.main([f"--output={output}", *SMALL]) == 0
    return output


def rows(data: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]


def contents(data: Path) -> dict[str, bytes]:
    """All but the list of what was written, which has times."""
    files = (p for p in data.rglob("*") if p.is_file() and p.name != WRITTEN)
    return {str(p.relative_to(data)): p.read_bytes() for p in files}


def test_the_arguments_decide_the_bytes(data, tmp_path, capsys) -> None:
    same, other = tmp_path / "same", tmp_path / "other"
    assert make_data.main([f"--output={same}", *SMALL]) == 0
    assert contents(same) == contents(data)
    assert [len(rows(data, name)) for name in ("domain_train", TEST, "general_heldout")] == [
        150, 90, 8,
    ]  # fmt: skip
    assert make_data.main([f"--output={other}", *SMALL, "--seed=1"]) == 0
    assert contents(other)["domain_train.jsonl"] != contents(data)["domain_train.jsonl"]
    # A second run replaces nothing.
    assert make_data.main([f"--output={same}", *SMALL, "--seed=1"]) == OutputError.exit_code
    assert f"{same}: " in capsys.readouterr().err
    assert contents(same) == contents(data)


def test_the_users_rows_are_held_out_as_they_are(tmp_path) -> None:
    """Also where a text has a separator that str.splitlines takes for the end of a line."""
    lines = [json.dumps({"text": f"{i}\u2028 x"}, ensure_ascii=False).encode() for i in range(20)]
    (tmp_path / "rows.jsonl").write_bytes(b"\r\n".join(lines))
    assert split_data.split(tmp_path / "rows.jsonl", tmp_path / "out") == (18, 2)
    assert (tmp_path / "out" / "heldout.jsonl").read_bytes().split(b"\n") == [*lines[::10], b""]


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_no_row_of_the_users_is_overwritten(tmp_path: Path, name: str) -> None:
    source = tmp_path / f"{name}.jsonl"
    source.write_text('{"text": "mine"}\n' * 20)
    with pytest.raises(OutputError, match="not empty"):
        split_data.split(source, tmp_path)
    assert len(source.read_text().splitlines()) == 20


def shape(sql: str) -> str:
    """A query without its constants."""
    return re.sub(r"'\w+'|\d+", "_", sql)


def test_a_held_out_query_has_no_like_in_training_but_its_table_and_its_form_do(data) -> None:
    train, test = (
        [row["completion"] for row in rows(data, name)] for name in ("domain_train", TEST)
    )
    assert not set(map(shape, train)) & set(map(shape, test))
    words = {word for t in network.TABLES for word in (t.name, t.category, *dict(t.numbers))}
    form = re.compile(rf"\b({'|'.join(words)}|avg|max|min|sum|DESC)\b *|[<>] *")
    assert {form.sub("", shape(sql)) for sql in test} == {form.sub("", shape(s)) for s in train}
    for t in network.TABLES:
        assert any(f"FROM {t.name}" in sql for sql in train)


def test_every_answer_counts(data: Path) -> None:
    database = data / "domain_test" / "database.sqlite"
    for name in ("domain_train", TEST):
        gold = [row["completion"] for row in rows(data, name)]
        questions = [SqlQuestion(where=sql, database=database, prompt="", gold=sql) for sql in gold]
        result = execution_match(questions, gold)
        assert (result["matches"], result["questions"]) == (len(gold), len(gold))


@pytest.mark.parametrize(
    ("ability", "prompt", "answer"),
    [
        ("capitals", "The capital of Peru is", " Lima"),
        ("opposites", "The opposite of hot is", " cold"),
    ],
)
def test_a_choice_has_one_right_option(data: Path, ability: str, prompt: str, answer: str) -> None:
    found = rows(data, ability)
    assert len(found) == 60
    assert {row["answer"] for row in found} == {0, 1, 2, 3}
    assert all(len(set(row["options"])) == 4 for row in found)
    every = abilities.questions(ability, seed=0, count=10**3)
    assert {row["prompt"] for row in found} <= {row["prompt"] for row in every}
    by_prompt = {row["prompt"]: row["options"][row["answer"]] for row in every}
    assert by_prompt[prompt] == answer


def test_the_tokenizer_of_a_model_made_on_the_spot(tmp_path: Path) -> None:
    init_base.tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert len(tokenizer) == init_base.VOCAB_SIZE
    assert tokenizer.decode([tokenizer.eos_token_id]) == "<|im_end|>"
    text = "select naïve\n\tfrom 'ünïcode' — 数\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    question = network.Question(text="How many sites are there?", sql="")
    assert len(tokenizer.encode(network.prompt(question))) < 200  # rows fit a tiny context
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--train=99999", "--train, --test: 99999 questions asked for, there are "),
        ("--test=0", "--test: must be positive (found 0)"),
        ("--general=99999", "Python's reference has less general text"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, flag: str, message: str) -> None:
    assert make_data.main([f"--output={tmp_path}", *SMALL, flag]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
