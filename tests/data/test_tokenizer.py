from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil

import pytest

from megatron_replay.data.tokenizer import load_tokenizer, tokenizer_digests
from megatron_replay.errors import DataError
from tests.data.examples import refused
from tests.data.tiny_tokenizers import save_hugging_face, save_sentencepiece

HI = [{"role": "user", "content": "hi"}]
TEXTS = ["select name from router", "Größe 北京 🙂", "  two  spaces\n\ttab", "don 't , stop ."]


@pytest.fixture
def directory(tmp_path):
    return save_hugging_face(tmp_path / "saved")


def not_loaded(path, message):
    with pytest.raises(DataError, match=message):
        load_tokenizer(path)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_hugging_face_ids_are_those_of_the_tokenizers_library(tokenizer):
    from tokenizers import Tokenizer as Reference

    reference = Reference.from_file(str(tokenizer.path / "tokenizer.json"))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text).ids
        assert tokenizer.decode(ids) == text
        assert all(type(id_) is int and 0 <= id_ < tokenizer.vocab_size for id_ in ids)
    assert tokenizer.vocab_size == reference.get_vocab_size()
    assert tokenizer.eos_id == tokenizer.pad_id == reference.token_to_id("<|endoftext|>")
    assert tokenizer.special_ids == {
        reference.token_to_id(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    }
    text = tokenizer.render_chat(HI, True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_text_longer_than_a_context_gives_no_warning(directory, caplog, monkeypatch):
    edit(directory / "tokenizer_config.json", model_max_length=10)
    loaded = load_tokenizer(directory)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    loaded.encode("word " * 9)
    assert not caplog.records


def test_sentencepiece(tmp_path, sentencepiece_tokenizer):
    from sentencepiece import SentencePieceProcessor

    reference = SentencePieceProcessor(model_file=str(sentencepiece_tokenizer.path))
    text = "select count(*) from router"
    ids = sentencepiece_tokenizer.encode(text)
    assert ids == reference.encode(text)
    assert sentencepiece_tokenizer.decode(ids) == text
    assert sentencepiece_tokenizer.vocab_size == reference.vocab_size()
    assert sentencepiece_tokenizer.eos_id == 2
    assert sentencepiece_tokenizer.pad_id == 2  # the model has none
    assert sentencepiece_tokenizer.special_ids == {1, 2}
    with pytest.raises(DataError, match="no chat template"):
        sentencepiece_tokenizer.render_chat(HI, True)
    again = load_tokenizer(save_sentencepiece(tmp_path / "tiny.model"))
    assert again.fingerprint == sentencepiece_tokenizer.fingerprint


def test_fingerprint_follows_every_file_that_decides_the_ids(tmp_path, tokenizer):
    copy = tmp_path / "copy"
    shutil.copytree(tokenizer.path, copy)
    (copy / "model.safetensors").write_bytes(b"weights do not matter")
    fingerprints = [tokenizer.fingerprint]
    assert load_tokenizer(copy).fingerprint == tokenizer.fingerprint
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    fingerprints.append(load_tokenizer(copy).fingerprint)
    edit(copy / "tokenizer_config.json", eos_token="<|im_end|>")
    fingerprints.append(load_tokenizer(copy).fingerprint)
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates" / "default.jinja").write_text("hello")
    (copy / "chat_template.jinja").unlink()
    other = load_tokenizer(copy)
    assert other.render_chat(HI, False) == "hello"
    assert other.files.keys() - tokenizer.files == {"additional_chat_templates/default.jinja"}
    assert len({*fingerprints, other.fingerprint}) == 4


def test_digests_name_each_file(tmp_path, tokenizer, sentencepiece_tokenizer):
    assert tokenizer.files == tokenizer_digests(tokenizer.path) == {
        name: hashlib.sha256((tokenizer.path / name).read_bytes()).hexdigest()
        for name in ("tokenizer.json", "tokenizer_config.json")
    }  # fmt: skip
    assert tokenizer_digests(sentencepiece_tokenizer.path) == sentencepiece_tokenizer.files
    assert sentencepiece_tokenizer.files.keys() == {"tiny.model"}
    assert tokenizer_digests(tmp_path) == {}
    with pytest.raises(DataError, match="no tokenizer here"):
        tokenizer_digests(tmp_path / "missing")


@pytest.mark.parametrize("id_", [2**31 - 1, 2**31, 2**32, -1, 10**30])
def test_an_id_that_does_not_fit(directory, id_):
    """Added tokens of such ids were numbered anew, without a word."""
    model = json.loads((directory / "tokenizer.json").read_text())
    token = {**model["added_tokens"][0], "id": id_, "content": "<new>"}
    vocab = {**model["model"]["vocab"], "new": id_}
    for name, changes in (
        ("tokenizer.json", {"added_tokens": [*model["added_tokens"], token]}),
        ("tokenizer.json", {"model": {**model["model"], "vocab": vocab}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {str(id_): token}}),
        ("added_tokens.json", {"<new>": id_}),
    ):
        path = directory / name
        whole = path.read_bytes() if path.exists() else b"{}"
        path.write_bytes(whole)
        edit(path, **changes)
        not_loaded(directory, f"{name}: a token's id does not fit .*{id_}")
        path.write_bytes(whole)
    assert load_tokenizer(directory).vocab_size == 300


DAMAGED = [b"", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000, bytes(99), b'{"model": 3}']


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file_is_one_line(directory, name, content):
    (directory / name).write_bytes(content)
    not_loaded(directory, r"cannot load the tokenizer|has no EOS token")


@pytest.mark.parametrize("setting", ["eos_token", "pad_token", "added_tokens_decoder"])
@pytest.mark.parametrize("value", [5, [], {"a": 5}, [5], True, {"content": 5}])
def test_a_setting_of_another_kind_is_one_line_or_none(directory, setting, value):
    edit(directory / "tokenizer_config.json", **{setting: value})
    with contextlib.suppress(DataError):
        assert load_tokenizer(directory).encode("how many")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chat_template": 5}, "the chat template is no text .*found int"),
        ({"chat_template": "x" * 2_000_000}, "the chat template is too large .*found 2000000"),
        ({"eos_token": None}, "has no EOS token"),
    ],
)
def test_a_setting_that_is_refused(directory, change, message):
    edit(directory / "tokenizer_config.json", **change)
    not_loaded(directory, message)


def test_a_tokenizer_that_fails_on_a_text(directory):
    """A vocabulary without an unknown token: what it lacks cannot be encoded."""
    model = {"type": "WordLevel", "vocab": {"a": 3}, "unk_token": "<unk>"}
    edit(directory / "tokenizer.json", model=model)
    row = {"prompt": "b", "completion": "b"}
    refused(row, load_tokenizer(directory), "the tokenizer cannot encode the text: ")


@pytest.mark.parametrize("name", [
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json", "merges.txt",
    "special_tokens_map.json", "additional_chat_templates/default.jinja", "processor_config.json",
])  # fmt: skip
def test_a_pipe_in_place_of_a_file_is_not_waited_for(directory, name):
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    not_loaded(directory, rf"{name}: cannot read .*regular file; found a pipe")


def test_files_that_cannot_be_a_tokenizers(tmp_path, directory):
    not_loaded(tmp_path / "missing", r"no tokenizer here .*found nothing")
    (tmp_path / "empty").mkdir()
    not_loaded(tmp_path / "empty", "no tokenizer files in this directory")
    (tmp_path / "notes.txt").write_text("")
    not_loaded(tmp_path / "notes.txt", "found another kind of file")
    (tmp_path / "broken.model").write_bytes(b"not a model")
    not_loaded(tmp_path / "broken.model", "not a sentencepiece model")
    os.mkfifo(tmp_path / "pipe.model")
    not_loaded(tmp_path / "pipe.model", r"pipe.model: cannot read .*found a pipe")
    for name, size in (("chat_template.jinja", 300_000_000), ("tokenizer.json", 1 << 40)):
        with open(directory / name, "a") as handle:
            handle.truncate(size)
        with pytest.raises(DataError, match=rf"{name}: too large .*found {size} bytes"):
            tokenizer_digests(directory)
        (directory / name).unlink()
    (directory / "tokenizer.json").mkdir()
    not_loaded(directory, r"tokenizer.json: cannot read .*found a directory")
