"""The quick start's files: deterministic, split without overlap, answered by the database."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoTokenizer

from examples.quickstart import make_data as make_data_program
from examples.quickstart import nl2sql, split_data
from megatron_replay.checkpoint.staging import WRITTEN
from megatron_replay.errors import OutputError
from megatron_replay.evaluation.sql.execution import execution_match
from megatron_replay.evaluation.sql.sets import SqlQuestion

TEST = "domain_test/questions"
SMALL = [
    "--base-questions=300", "--base-domain=20", "--practice-tables=4", "--domain-train=400",
    "--domain-test=60", "--general-train=300", "--general-heldout=20",
]  # fmt: skip


@pytest.fixture(scope="module")
def make_data() -> Iterator[ModuleType]:
    """The program; documents are read once."""
    documents = make_data_program.general_documents(seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_data_program, "general_documents", lambda *, seed: list(documents))
        yield make_data_program


@pytest.fixture(scope="module")
def data(make_data: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("quickstart") / "data"
    assert make_data.main([f"--output={output}", *SMALL]) == 0
    return output


def rows(data: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]


def contents(data: Path) -> dict[str, bytes]:
    """All but the list of what was written, which has times."""
    files = (p for p in data.rglob("*") if p.is_file() and p.name != WRITTEN)
    return {str(p.relative_to(data)): p.read_bytes() for p in files}


def test_counts(data: Path) -> None:
    names = [str(p.relative_to(data).with_suffix("")) for p in data.rglob("*.jsonl")]
    counts = {name: len(rows(data, name)) for name in names}
    assert counts == {
        "general_train": 300, "general_heldout": 20, "base_sql": 320, "base_train": 620,
        "domain_train": 400, TEST: 60,
    }  # fmt: skip


def test_the_arguments_decide_the_bytes(make_data, data, tmp_path, capsys) -> None:
    same, other = tmp_path / "same", tmp_path / "other"
    assert make_data.main([f"--output={same}", *SMALL]) == 0
    assert contents(same) == contents(data)
    assert make_data.main([f"--output={other}", *SMALL, "--seed=1"]) == 0
    assert contents(other)["domain_train.jsonl"] != contents(data)["domain_train.jsonl"]
    # A second run replaces nothing.
    assert make_data.main([f"--output={same}", *SMALL, "--seed=1"]) == OutputError.exit_code
    assert f"{same}: " in capsys.readouterr().err
    assert contents(same) == contents(data)


def test_the_users_rows_are_held_out_as_they_are(tmp_path, monkeypatch) -> None:
    """Also where a text has a separator that str.splitlines takes for the end of a line."""
    monkeypatch.setattr(split_data, "general_documents", lambda *, seed: ["general"])
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


def test_no_question_or_text_is_on_both_sides(data: Path) -> None:
    train, test = rows(data, "domain_train"), rows(data, TEST)
    questions = [row["prompt"] for row in train + test]
    assert len(set(questions)) == len(questions)
    texts = [row["text"] for row in rows(data, "general_train") + rows(data, "general_heldout")]
    assert len(set(texts)) == len(texts)


def test_every_answer_counts(data: Path) -> None:
    database = data / "domain_test" / "database.sqlite"
    for name in ("domain_train", TEST):
        gold = [row["completion"] for row in rows(data, name)]
        questions = [SqlQuestion(where=sql, database=database, prompt="", gold=sql) for sql in gold]
        result = execution_match(questions, gold)
        assert (result["matches"], result["questions"]) == (len(gold), len(gold))
    connection = sqlite3.connect(database)
    answers = [connection.execute(r["completion"]).fetchall() for r in rows(data, TEST)]
    connection.close()
    assert all(any(value not in (None, 0) for row in rows for value in row) for rows in answers)
    queries = " ".join(row["completion"] for row in rows(data, TEST))
    for part in ("count(*)", "group by", "order by", "avg(", "limit", " and ", "where"):
        assert part in queries


def words(tables: Iterable[nl2sql.Table]) -> set[str]:
    return {
        word
        for table in tables
        for word in (table.name, table.category, *table.numbers, *table.values)
    }


def test_base_sees_few_questions_of_the_domain_and_none_of_ours(data: Path) -> None:
    new = {table.name for table in nl2sql.NEW_TABLES}
    base = rows(data, "base_sql")
    tables = [row["completion"].split(" from ")[1].split()[0] for row in base]
    assert sum(table in new for table in tables) == 20
    asked = {row["prompt"] for row in base}
    assert not asked & {row["prompt"] for row in rows(data, "domain_train")}
    assert not asked & {row["prompt"] for row in rows(data, TEST)}
    assert not words(nl2sql.NEW_TABLES) & words(nl2sql.practice_tables(500, seed=0))


def test_tokenizer(data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer", local_files_only=True)
    assert len(tokenizer) == 1024
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 3)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    text = "select naïve\n\tfrom 'ünïcode' — 数\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    for row in rows(data, "base_sql")[:50]:
        # base_train joins them as text, fine-tuning as prompt and completion: the same tokens.
        joined = tokenizer.encode(row["prompt"] + row["completion"])
        assert joined == tokenizer.encode(row["prompt"]) + tokenizer.encode(row["completion"])
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--domain-train=99999", " questions asked for, the grammar has"),
        ("--domain-test=0", "--domain-test: must be positive (found 0)"),
        ("--general-train=99999", "this installation documents less than that"),
        ("--vocab-size=99999", "--vocab-size: the text does not give a tokenizer of this size"),
    ],
)
def test_mistakes_are_one_line(make_data, tmp_path, capsys, flag: str, message: str) -> None:
    assert make_data.main([f"--output={tmp_path}", *SMALL, flag]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
