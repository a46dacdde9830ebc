from __future__ import annotations

import json
import math
import os
import re
import shutil
import string
import sys

import pytest

from megatron_replay.data.corpus import Corpus
from megatron_replay.data.tokenizer import load_tokenizer
from tests.data.tiny_tokenizers import CHATML, save_hugging_face
from tools import preprocess_data

ROWS = [{"prompt": f"what is {i} + 1?", "completion": f" {i + 1}"} for i in range(5)]
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
SUFFIXES = ("bin", "idx", "loss_mask", "json")


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    return save_hugging_face(tmp_path_factory.mktemp("hf") / "tokenizer", chat_template=None)


@pytest.fixture(scope="module")
def chat_dir(tmp_path_factory):
    return save_hugging_face(tmp_path_factory.mktemp("hf") / "chat")


@pytest.fixture
def write_rows(tmp_path):
    def write(rows, name="rows.jsonl"):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
        return tmp_path / name

    return write


@pytest.fixture
def run(tokenizer_dir, tmp_path, capsys):
    """Run the command line; return stdout and stderr, which is one line where it fails."""

    def call(*inputs, prefix="corpus", flags=(), tokenizer=tokenizer_dir, code=0):
        argv = ["--input", *map(str, inputs), "--tokenizer", str(tokenizer)]
        argv += ["--output-prefix", str(tmp_path / prefix), *flags]
        assert preprocess_data.main(argv) == code
        captured = capsys.readouterr()
        if code:
            assert captured.out == ""
            assert captured.err.count("error: ") == 1
            assert "skip" in flags or captured.err.count("\n") == 1
        return captured.out, captured.err

    return call


def contents(tmp_path, prefix="corpus"):
    return [(tmp_path / f"{prefix}.{suffix}").read_bytes() for suffix in SUFFIXES]


def test_rows_of_all_inputs_in_order(run, write_rows, tmp_path, tokenizer_dir):
    files = write_rows(ROWS[:2], "b.jsonl"), write_rows(ROWS[2:], "a.jsonl")
    out, err = run(*files, prefix="deep/corpus")
    tokenizer, corpus = load_tokenizer(tokenizer_dir), Corpus(tmp_path / "deep" / "corpus")
    assert [tokenizer.decode(corpus[i].tokens.tolist()) for i in range(5)] == [
        f"what is {i} + 1? {i + 1}<|endoftext|>" for i in range(5)
    ]
    about = corpus.description
    assert out.strip() == (
        f"{tmp_path}/deep/corpus: 5 documents (prompt, plain text), {about.num_tokens} tokens, "
        f"{about.num_loss_tokens} with loss, longest {corpus.lengths.max()}, fingerprint "
        f"{about.fingerprint[:12]}; written, 0 of 5 rows skipped"
    )
    assert "tokenize: 5/5 rows (100 %)" in err


def test_what_is_the_same_is_kept_and_what_changed_is_written_again(run, write_rows, tmp_path):
    rows = write_rows(ROWS)
    run(rows)
    whole = contents(tmp_path)
    before = (tmp_path / "corpus.json").stat().st_mtime_ns
    out, err = run(rows)
    assert (out.endswith("; up to date\n"), err) == (True, "")
    assert (tmp_path / "corpus.json").stat().st_mtime_ns == before
    run(rows, prefix="again")
    assert contents(tmp_path, "again") == whole
    for damage in (whole[0][:-4], bytes(4) + whole[0][4:]):
        (tmp_path / "corpus.bin").write_bytes(damage)
        out, err = run(rows)
        assert "; written" in out
        assert err.startswith("writing again: ")
        assert contents(tmp_path) == whole
    other = save_hugging_face(tmp_path / "other")
    assert "; written in place of an earlier corpus, 0 of 5" in run(rows, tokenizer=other)[0]
    assert "; written" in run(rows, flags=["--on-bad-row", "skip"])[0]
    assert "; written" in run(write_rows(ROWS[:4]), flags=["--on-bad-row", "skip"])[0]


@pytest.mark.parametrize(
    ("bad", "expected", "found"),
    [({"prompt": "x"}, "completion", "prompt"), ({"text": "raw"}, "prompt", "text")],
)
def test_a_bad_row_or_one_of_another_format_stops_with_one_line(
    run, write_rows, tmp_path, bad, expected, found
):
    rows = write_rows([ROWS[0], bad, ROWS[1]])
    _, err = run(rows, code=3)
    assert err.startswith(f"error: {rows}:2: ")
    assert f"(expected {expected!r}; found {found!r})" in err
    assert not list(tmp_path.glob("*corpus*"))


def test_bad_rows_are_listed_and_counted(run, write_rows, tmp_path):
    rows = write_rows(["{", ROWS[0], {"text": "raw"}, ROWS[1], "", ROWS[2], "", ""])
    skip = ["--on-bad-row", "skip"]
    out, err = run(rows, flags=skip)
    assert "; written, 3 of 6 rows skipped" in out
    skipped = [line for line in err.splitlines() if line.startswith("skipped: ")]
    assert [line.split(": ")[1] for line in skipped] == [f"{rows}:{n}" for n in (1, 3, 5)]
    assert len(Corpus(tmp_path / "corpus")) == 3
    only_bad = write_rows(["{", "{"])
    assert "no row to take the format from" in run(only_bad, flags=skip, code=3)[1]
    _, err = run(only_bad, flags=[*skip, "--format", "text"], code=3)
    assert err.endswith(f"error: {tmp_path}/corpus: no document to write\n")


def test_show_marks_what_carries_loss(run, write_rows, monkeypatch):
    rows = write_rows(ROWS)
    out, _ = run(rows, flags=["--show", "1"])
    assert "what is 0 + 1?[[ 1<|endoftext|>]]\n" in out
    assert "what is 1" not in out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    out, _ = run(rows, flags=["--show", "9"])
    assert "what is 4 + 1?\033[32m 5<|endoftext|>\033[0m\n" in out


def test_show_prints_what_sharing_prefixes_saves(run, write_rows):
    """64 schemas of 20 tokens, each of 8 questions with 3 positions of their own; 1 token a letter.

    A step of n documents has (20 schemas + 3 n) / 23 n of its positions computed.
    """
    first = (string.ascii_uppercase + string.digits + string.punctuation)[:64]
    prompts = [f"{letter}{'S' * 19}{number}" for letter in first for number in range(8)]
    rows = write_rows([{"prompt": prompt, "completion": "ZZ"} for prompt in prompts])
    out, _ = run(rows, flags=["--show", "1"])
    grouped = (20 / 8 + 3) / 23
    assert f"whole corpus (Stage 0's best): {grouped:.1%}\n" in out
    found = re.findall(
        r"steps of (\d+) documents: (.*)% in random order, (.*)% in groups of 8", out
    )
    assert [int(size) for size, _, _ in found] == [64, 128, 256]
    for size, in_random_order, in_groups in found:
        n = int(size)
        schemas = 64 * (1 - math.comb(504, n) / math.comb(512, n))  # of n documents, expected
        assert float(in_random_order) / 100 == pytest.approx((20 * schemas / n + 3) / 23, abs=0.02)
        assert float(in_groups) / 100 == pytest.approx(grouped, abs=1e-3)
    out, _ = run(write_rows(ROWS), flags=["--show", "1"])
    assert "whole corpus" in out
    assert "steps of" not in out  # more documents than there are
    assert "whole corpus" not in run(rows)[0]


def test_raw_text_is_split(run, write_rows, tmp_path):
    rows = write_rows([{"text": "select name from router where ports > 5 " * 4}])
    run(rows, prefix="whole")
    run(rows, flags=["--max-document-tokens", "10"])
    whole, split = Corpus(tmp_path / "whole"), Corpus(tmp_path / "corpus")
    assert split.lengths.max() == 10
    assert split.description.num_loss_tokens == whole.description.num_loss_tokens
    joined = [t for i in range(len(split)) for t in split[i].tokens[int(i > 0) :].tolist()]
    assert joined == whole[0].tokens.tolist()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-document-tokens", "10"], "splits raw text only (expected text rows; found prompt"),
        (["--max-document-tokens", "1"], "too small (expected 2 or more; found 1)"),
        (["--show", "-1"], "--show: negative"),
        (["--tokeniser", "x"], "error: unknown flag --tokeniser (did you mean --tokenizer?)"),
        (["--ignore-fields", "a", "--format", "spider"], "--ignore-fields: has no effect"),
    ],
)
def test_options_that_cannot_work(run, write_rows, flags, message):
    assert message in run(write_rows(ROWS), flags=flags, code=2)[1]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("by", ["name", "link", "pid"])
def test_no_output_over_an_input(run, write_rows, tmp_path, suffix, by):
    name = {"pid": f".train.{suffix}.tmp.{os.getpid()}"}.get(by, f"train.{suffix}")
    rows = write_rows(ROWS, name)
    before = rows.read_bytes()
    if by == "link":
        (tmp_path / "link.jsonl").symlink_to(rows)
    _, err = run(tmp_path / "link.jsonl" if by == "link" else rows, prefix="train", code=2)
    assert "the output is also read, as --input" in err
    assert name in err
    assert rows.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1 + (by == "link")


def test_no_output_over_the_tokenizer_or_a_file_of_another_kind(
    run, write_rows, tmp_path, tokenizer_dir
):
    saved = shutil.copytree(tokenizer_dir, tmp_path / "saved")
    before = (saved / "tokenizer.json").read_bytes()
    _, err = run(write_rows(ROWS), prefix="saved/tokenizer", tokenizer=saved, code=2)
    assert "the output is also read, as --tokenizer" in err
    assert (saved / "tokenizer.json").read_bytes() == before
    others = write_rows([{"a": 1}], "corpus.json")
    before = others.read_bytes()
    _, err = run(write_rows(ROWS), code=6)
    assert err.startswith(f"error: {others}: a file is here")
    assert others.read_bytes() == before


@pytest.mark.parametrize("row_format", ["auto", "spider"])
def test_an_input_that_is_no_file(run, tmp_path, row_format):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, found in (
        (tmp_path / "none.jsonl", ": No such file"),
        ("/dev/zero", "found a device"),
        ("/", "found a directory"),
        (pipe, "found a pipe"),
    ):
        _, err = run(path, flags=["--format", row_format], code=3)
        assert err.startswith(f"error: {path}: cannot read")
        assert found in err


def test_ignored_fields_are_part_of_what_a_corpus_was_made_from(run, write_rows, tmp_path):
    rows = write_rows([{**row, "context": "a", "note": "b"} for row in ROWS])
    _, err = run(rows, code=3)
    assert "rows.jsonl:1: 'context', 'note' would be lost" in err
    assert "--ignore-fields context,note" in err
    out, err = run(rows, flags=["--ignore-fields", "note, context"])
    assert "; written" in out
    assert "warning" not in err
    out, _ = run(rows, flags=["--ignore-fields", "context,note"])
    assert out.endswith("; up to date\n")
    plain = write_rows(ROWS, "plain.jsonl")
    run(plain, prefix="plain")
    assert contents(tmp_path, "plain")[:3] == contents(tmp_path)[:3]
    out, err = run(plain, flags=["--ignore-fields", "text,prompt_id"])
    assert "; written" in out
    assert "warning: --ignore-fields prompt_id: no row has such a field" in err


def test_an_ignored_field_does_not_decide_the_format(run, write_rows):
    rows = write_rows([{**row, "text": "a"} for row in ROWS])
    assert "fits the formats prompt and text" in run(rows, code=3)[1]
    assert "(prompt, plain text)" in run(rows, flags=["--ignore-fields", "text"])[0]


def test_a_template_that_writes_the_date_is_said(run, write_rows, tmp_path, chat_dir):
    dated = save_hugging_face(tmp_path / "dated", chat_template="{{ strftime_now('%F') }}" + CHATML)
    said = "the chat template writes today's date"
    chats = write_rows([CHAT])
    assert run(chats, tokenizer=dated)[1].count(said) == 1
    assert said not in run(chats, tokenizer=chat_dir)[1]
    plain = run(write_rows(ROWS), tokenizer=dated, flags=["--no-chat-template"])
    assert said not in plain[1]


def test_prompts_are_conversations_where_the_tokenizer_has_a_template(
    run, write_rows, tmp_path, chat_dir
):
    rows, system = write_rows(ROWS), ["--system-prompt", "Be brief."]
    tokenizer = load_tokenizer(chat_dir)

    def first(*flags):
        out, _ = run(rows, tokenizer=chat_dir, flags=flags)
        assert "; written" in out
        return out, tokenizer.decode(Corpus(tmp_path / "corpus")[0].tokens.tolist())

    asked = "<|im_start|>user\nwhat is 0 + 1?<|im_end|>\n<|im_start|>assistant\n1<|im_end|>\n"
    out, text = first()
    assert ("(prompt, chat template)" in out, text) == (True, asked)
    out, text = first(*system)
    assert "(prompt, chat template with a system prompt)" in out
    assert text == f"<|im_start|>system\nBe brief.<|im_end|>\n{asked}"
    out, text = first("--no-chat-template")
    assert ("(prompt, plain text)" in out, text) == (True, "what is 0 + 1? 1<|endoftext|>")
    assert "; up to date" in run(rows, tokenizer=chat_dir, flags=["--no-chat-template"])[0]


@pytest.mark.parametrize(
    ("row", "flags", "message"),
    [
        ({"text": "a b"}, ["--chat-template"], "--chat-template: has no effect on text rows"),
        ({"text": "a b"}, ["--system-prompt=a"], "--system-prompt: has no effect on text rows"),
        (ROWS[0], ["--no-chat-template", "--system-prompt=a"], "has no effect on plain text"),
        (ROWS[0], ["--no-chat-template", "--add-bos"], "the tokenizer has no BOS token"),
        (CHAT, ["--no-chat-template"], "'messages' rows are conversations"),
        (ROWS[0], ["--system-prompt="], "--system-prompt: unusable value"),
    ],
)
def test_styles_that_cannot_be_had(run, write_rows, chat_dir, row, flags, message):
    _, err = run(write_rows([row] * 2), tokenizer=chat_dir, flags=["--on-bad-row=skip", *flags],
                 code=2)  # fmt: skip
    assert message in err


def test_what_the_tokenizer_lacks_or_the_template_writes(run, write_rows, tmp_path):
    both = save_hugging_face(tmp_path / "both", bos="<|endoftext|>")
    _, err = run(write_rows(ROWS), tokenizer=both, flags=["--add-bos"], code=2)
    assert "--add-bos: has no effect on conversations" in err
    _, err = run(write_rows(ROWS), flags=["--chat-template"], code=2)
    assert "--chat-template: the tokenizer has no chat template" in err
