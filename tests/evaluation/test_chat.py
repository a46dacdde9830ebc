"""Models are asked what they were trained on; the query is found in the answer."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from megatron_replay.data.corpus import Corpus
from megatron_replay.data.prompts import PromptStyle, prompt_of
from megatron_replay.data.tokenizer import load_tokenizer
from megatron_replay.evaluation import measurements
from megatron_replay.evaluation.choices import read_choices
from megatron_replay.evaluation.generation import Answer
from megatron_replay.evaluation.sql import measurement
from megatron_replay.evaluation.sql.unwrap import unwrapped
from tests.data.tiny_tokenizers import CHATML, THINKING
from tests.evaluation.site import SLOW_MACHINE, save_chat_model, write_database, write_rows
from tools import evaluate, preprocess_data

GOLD = ["select 1", "select 2"]


@pytest.fixture(scope="module")
def chat_base(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("chat") / "base")


@pytest.fixture
def sets(tmp_path):
    """The same two questions in two layouts: {--format: (rows, directory)}."""
    spider, plain = tmp_path / "spider", tmp_path / "plain"
    create = "create table book (title text)"
    write_database(spider / "database" / "shop" / "shop.sqlite", create)
    rows = [{"db_id": "shop", "question": f"Which {sql}?", "query": sql} for sql in GOLD]
    (spider / "dev.json").write_text(json.dumps(rows))
    write_database(plain / "database.sqlite", create)
    write_rows(plain / "questions.jsonl", *({"prompt": f"{x}?\n", "completion": x} for x in GOLD))
    return {
        "spider": (spider / "dev.json", spider),
        "prompt": (plain / "questions.jsonl", plain),
    }


@pytest.fixture
def tokenizer(chat_base):
    return load_tokenizer(chat_base)


@pytest.fixture
def answers(monkeypatch, tokenizer):
    """Stands in for generation: texts of one answer per prompt, and the prompts it was given."""
    found = {"texts": GOLD, "prompts": []}

    def answer(model, prompts, *, stop_ids, **_):
        found["prompts"], found["stop_ids"] = prompts, stop_ids
        return [Answer(tokenizer.encode(text), True) for text in found["texts"]]

    monkeypatch.setattr(measurement, "greedy_answers", answer)
    return found


@pytest.fixture
def measured(chat_base, tmp_path):
    """Runs tools/evaluate.py on one set; returns its result."""

    def run(directory, *flags, base=chat_base):
        output = tmp_path / "eval.json"
        given = [f"--base={base}", f"--sql=s={directory}", f"--output={output}", *SLOW_MACHINE]
        assert evaluate.main([*given, *flags]) == 0
        return json.loads(output.read_text())["models"][0]["sql"]["s"]

    return run


@pytest.mark.parametrize("row_format", ["spider", "prompt"])
@pytest.mark.parametrize("template", [CHATML, THINKING])
@pytest.mark.parametrize("flags", [(), ("--no-chat-template",), ("--system-prompt=Be brief.",)])
def test_a_model_is_asked_what_it_was_trained_on(
    chat_base, tokenizer, sets, answers, measured, tmp_path, row_format, template, flags
):
    base = shutil.copytree(chat_base, tmp_path / "base")
    (base / "chat_template.jinja").write_text(template)
    file, directory = sets[row_format]
    given = [f"--input={file}", f"--tokenizer={base}", f"--output-prefix={tmp_path}/corpus"]
    assert preprocess_data.main([*given, f"--format={row_format}", *flags]) == 0
    assert measured(directory, *flags, base=base)["accuracy"] == 1.0
    corpus = Corpus(tmp_path / "corpus")
    documents = [corpus[number] for number in range(len(corpus))]
    assert answers["prompts"] == [prompt_of(document) for document in documents]
    for document, gold in zip(documents, GOLD, strict=True):
        *label, end = document.tokens[document.loss_mask].tolist()
        assert tokenizer.decode(label) == gold
        assert end in answers["stop_ids"]


def test_plain_text_begins_with_one_bos(chat_base, sets, answers, measured, tmp_path):
    base = shutil.copytree(chat_base, tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<|im_start|>"}))
    (file, directory), flags = sets["prompt"], ["--no-chat-template", "--add-bos"]
    given = [f"--input={file}", f"--tokenizer={base}", f"--output-prefix={tmp_path}/corpus"]
    assert preprocess_data.main([*given, *flags]) == 0
    measured(directory, *flags, base=base)
    corpus, bos = Corpus(tmp_path / "corpus"), load_tokenizer(base).bos_id
    assert answers["prompts"] == [prompt_of(corpus[number]) for number in range(len(corpus))]
    assert all((prompt[0], prompt.count(bos)) == (bos, 1) for prompt in answers["prompts"])


def test_another_style_than_the_corpus_is_warned_of(chat_base, sets, capsys, tmp_path):
    given = [f"--input={sets['prompt'][0]}", f"--tokenizer={chat_base}"]
    assert preprocess_data.main([*given, f"--output-prefix={tmp_path}/corpus"]) == 0
    corpus, style = Corpus(tmp_path / "corpus"), PromptStyle()
    for flags, warns in (({}, False), ({"chat_template": False}, True)):
        measurements.warn_of_another_style(
            corpus, replace(style, **flags).for_tokenizer(load_tokenizer(chat_base))
        )
        assert ("warning: prompts are asked as plain text" in capsys.readouterr().err) == warns


def test_a_system_prompt_without_effect_is_refused(chat_base, tmp_path, capsys):
    given = [f"--base={chat_base}", f"--output={tmp_path}/eval.json", "--lm-eval-tasks=t"]
    given += [f"--lm-eval-include-path={tmp_path}", "--system-prompt=Be brief."]
    assert evaluate.main(given) == 2
    assert "--system-prompt: has no effect on what is measured" in capsys.readouterr().err


def test_a_conversation_asks_for_the_query_in_a_sentence(sets, answers, measured, tokenizer):
    question = "CREATE TABLE book (title text);\n\nQuestion: Which select 1?\n"
    sentence = "Answer with one SQL query and nothing else."
    header, footer = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    for flag, prompt in (
        ("--chat-template", f"{header}{question}{sentence}{footer}"),
        ("--no-chat-template", f"{question}SQL:\n"),
    ):
        measured(sets["spider"][1], flag)
        assert tokenizer.decode(answers["prompts"][0]) == prompt


def test_choices_are_answers_in_a_conversation(tokenizer, tmp_path):
    rows = write_rows(tmp_path / "rows", {"prompt": "who?", "options": [" you", "me"], "answer": 1})
    [plain] = read_choices(rows, tokenizer)
    [asked] = read_choices(rows, tokenizer, PromptStyle().for_tokenizer(tokenizer))
    header = "<|im_start|>user\nwho?<|im_end|>\n<|im_start|>assistant\n"
    assert [tokenizer.decode(choice.prompt) for choice in (plain, asked)] == ["who?", header]
    assert [tokenizer.decode(option) for option in plain.options] == [" you", "me"]
    assert [tokenizer.decode(option) for option in asked.options] == ["you", "me"]
    assert (plain.num_bytes, asked.num_bytes) == ([4, 2], [3, 2])  # of what is scored


def test_general_choices_are_plain_text(chat_base, tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "rows", {"prompt": "who?", "options": ["me", "x"], "answer": 0})
    prompts = []

    def score(model, choices, **_):
        prompts.append(len(choices[0].prompt))
        return {"accuracy": 1.0}

    monkeypatch.setattr(measurements, "score_choices", score)
    given = [f"--base={chat_base}", f"--choices=a={rows}", f"--general-choices=b={rows}"]
    assert evaluate.main([*given, "--chat-template", f"--output={tmp_path}/eval.json"]) == 0
    assert prompts[0] > prompts[1] == len("who?")


# --------------------------------------------------------------------------------- unwrapping
@pytest.mark.parametrize(
    ("answer", "query"),
    [
        ("select 1", "select 1"),
        ("```sql\nselect 1\n```", "select 1"),
        ("```SQL select 1```", "select 1"),
        ("```\nselect 1\n```\nThis selects one.", "select 1"),
        ("```select 1```", "select 1"),
        ("Sure, here it is:\n```sqlite\nselect 1\n\nfrom a", "select 1\n\nfrom a"),
        ("SQL: select 1", "select 1"),
        ("sql :\nselect 1\nfrom a\n\nThis is it.", "select 1\nfrom a"),
        ("SQL:\n```sql\nselect 1\n```", "select 1"),
        ("<think>\n```sql\nselect 2\n```\n</think>\n\nselect 1", "select 1"),
        ("\n</think>\n\nSQL: select 1", "select 1"),
        ("The SQL: select 1", "The SQL: select 1"),
        ("select 'SQL: a'", "select 'SQL: a'"),
        ("select 1\n\nfrom a", "select 1\n\nfrom a"),
        ("", ""),
    ],
)
def test_unwrapped(answer, query):
    assert unwrapped(answer) == query


def test_unwrapped_answers_are_counted(sets, answers, measured):
    directory = sets["prompt"][1]
    answers["texts"] = [GOLD[0], f"Sure!\n```sql\n{GOLD[1]}\n```"]
    found = measured(directory)
    assert (found["accuracy"], found["unwrapped"]) == (1.0, 1)
    assert [sample["answer"] for sample in found["samples"]] == answers["texts"]
    assert [sample["gold"] for sample in found["samples"]] == GOLD
    assert all(sample["right"] for sample in found["samples"])
    found = measured(directory, "--no-unwrap")
    assert (found["accuracy"], found["unwrapped"]) == (0.5, 0)
    assert found["failures"] == {"not a query": 1}
    assert [sample["right"] for sample in found["samples"]] == [True, False]


# ------------------------------------------------------------------------- slow gold queries
def test_a_gold_query_has_its_own_time(sets, answers, measured, chat_base, tmp_path, capsys):
    directory = sets["prompt"][1]
    found = measured(directory, "--query-seconds=1e-9")
    assert (found["questions"], found["failures"]) == (2, {"timeout": 2})
    given = [f"--base={chat_base}", f"--sql=s={directory}", f"--output={tmp_path}/other.json"]
    assert evaluate.main([*given, "--gold-seconds=1e-9"]) == 3
    error = capsys.readouterr().err
    assert "questions.jsonl:1: the gold query fails" in error
    assert "with --gold-seconds, or leave the question out: --leave-out s:1" in error


def test_questions_are_left_out_by_name(sets, answers, measured, chat_base, tmp_path, capsys):
    file, directory = sets["prompt"]
    write_rows(file, *({"prompt": "a?", "completion": x} for x in ("select no", *GOLD)))
    given = [f"--base={chat_base}", f"--sql=s={directory}", f"--output={tmp_path}/other.json"]
    assert evaluate.main(given) == 3
    assert "Leave the question out: --leave-out s:1" in capsys.readouterr().err
    found = measured(directory, "--leave-out=s:1")
    assert (found["questions"], found["left_out"], found["accuracy"]) == (2, 1, 1.0)
    assert evaluate.main([*given, "--leave-out=s:1,s:4,t:1"]) == 2
    error = capsys.readouterr().err
    assert "--leave-out: no such question (expected" in error
    assert "s:1 to s:3; found s:4, t:1)" in error
