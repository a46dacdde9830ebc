from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil

import pytest

from megatron_replay.data.tokenizer import load_tokenizer, tokenizer_digests
from megatron_replay.errors import DataError
from tests.data.examples import document
from tests.data.tiny_tokenizers import save_hugging_face, save_sentencepiece

HI = [{"role": "user", "content": "hi"}]
TEXTS = ["select name from router", "Größe 北京 🙂", "  two  spaces\n\ttab", "don 't , stop ."]


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


def test_a_long_text_gives_no_warning(tokenizer, caplog):
    tokenizer.encode("word " * 3000)
    assert not caplog.records


def test_chat_template(tokenizer):
    text = tokenizer.render_chat(HI, True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece(sentencepiece_tokenizer):
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


def test_fingerprint_follows_every_file_that_decides_the_ids(tmp_path, tokenizer):
    copy = tmp_path / "copy"
    shutil.copytree(tokenizer.path, copy)
    (copy / "model.safetensors").write_bytes(b"weights do not matter")
    assert load_tokenizer(copy).fingerprint == tokenizer.fingerprint
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    with_template = load_tokenizer(copy).fingerprint
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings["eos_token"] = "<|im_end|>"
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    assert len({tokenizer.fingerprint, with_template, load_tokenizer(copy).fingerprint}) == 3


def test_digests_name_each_file(tmp_path, tokenizer, sentencepiece_tokenizer):
    digests = tokenizer_digests(tokenizer.path)
    assert digests == tokenizer.files
    assert digests.keys() == {"tokenizer.json", "tokenizer_config.json"}
    for name, digest in digests.items():
        assert digest == hashlib.sha256((tokenizer.path / name).read_bytes()).hexdigest()
    assert tokenizer_digests(sentencepiece_tokenizer.path) == sentencepiece_tokenizer.files
    assert sentencepiece_tokenizer.files.keys() == {"tiny.model"}
    assert tokenizer_digests(tmp_path) == {}
    with pytest.raises(DataError, match="no tokenizer here"):
        tokenizer_digests(tmp_path / "missing")


def test_another_default_template_is_another_tokenizer(tmp_path, tokenizer):
    copy = tmp_path / "copy"
    shutil.copytree(tokenizer.path, copy)
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates" / "default.jinja").write_text("hello")
    other = load_tokenizer(copy)
    assert other.render_chat(HI, False) == "hello"
    assert other.fingerprint != tokenizer.fingerprint
    assert other.files.keys() - tokenizer.files == {"additional_chat_templates/default.jinja"}


def test_sentencepiece_fingerprint(tmp_path, sentencepiece_tokenizer):
    again = load_tokenizer(save_sentencepiece(tmp_path / "tiny.model"))
    assert again.fingerprint == sentencepiece_tokenizer.fingerprint


def test_nothing_there_or_something_else(tmp_path):
    (tmp_path / "broken.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path / "broken.model")
    (tmp_path / "broken.model").unlink()
    with pytest.raises(DataError, match=r"no tokenizer here .*found nothing"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(DataError, match="no tokenizer files in this directory"):
        load_tokenizer(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match="found another kind of file"):
        load_tokenizer(tmp_path / "notes.txt")


@pytest.mark.parametrize("id_", [2**31 - 1, 2**31, 2**32, -1, 10**30])
def test_an_id_that_does_not_fit(tmp_path, id_):
    """Added tokens of such ids were numbered anew, without a word."""
    saved = save_hugging_face(tmp_path / "saved")
    model = json.loads((saved / "tokenizer.json").read_text())
    token = {**model["added_tokens"][0], "id": id_, "content": "<new>"}
    vocab = {**model["model"]["vocab"], "new": id_}
    settings = json.loads((saved / "tokenizer_config.json").read_text())
    changed = {
        "tokenizer.json": [
            {**model, "added_tokens": [*model["added_tokens"], token]},
            {**model, "model": {**model["model"], "vocab": vocab}},
        ],
        "tokenizer_config.json": [{**settings, "added_tokens_decoder": {str(id_): token}}],
        "added_tokens.json": [{"<new>": id_}],
    }
    for name, contents in changed.items():
        for content in contents:
            whole = (saved / name).read_bytes() if (saved / name).exists() else b"{}"
            (saved / name).write_text(json.dumps(content))
            with pytest.raises(DataError, match=f"{name}: a token's id does not fit .*{id_}"):
                load_tokenizer(saved)
            (saved / name).write_bytes(whole)
    assert load_tokenizer(saved).vocab_size == 300


DAMAGED = [b"", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000, bytes(99), b'{"model": 3}']


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file_is_one_line(tmp_path, name, content):
    saved = save_hugging_face(tmp_path / "saved")
    (saved / name).write_bytes(content)
    with pytest.raises(DataError, match=r"cannot load the tokenizer|has no EOS token"):
        load_tokenizer(saved)


@pytest.mark.parametrize("setting", ["eos_token", "pad_token", "added_tokens_decoder"])
@pytest.mark.parametrize("value", [5, [], {"a": 5}, [5], True, {"content": 5}])
def test_a_setting_of_another_kind_is_one_line_or_none(tmp_path, setting, value):
    saved = save_hugging_face(tmp_path / "saved")
    settings = json.loads((saved / "tokenizer_config.json").read_text())
    (saved / "tokenizer_config.json").write_text(json.dumps({**settings, setting: value}))
    with contextlib.suppress(DataError):
        assert load_tokenizer(saved).encode("how many")


def test_a_template_that_is_none(tmp_path):
    with pytest.raises(DataError, match="the chat template is no text"):
        load_tokenizer(save_hugging_face(tmp_path / "number", chat_template=5))
    long = save_hugging_face(tmp_path / "long", chat_template="x" * 2_000_000)
    with pytest.raises(DataError, match=r"the chat template is too large .*found 2000000"):
        load_tokenizer(long)
    saved = save_hugging_face(tmp_path / "large")
    with open(saved / "chat_template.jinja", "w") as handle:
        handle.truncate(300_000_000)
    with pytest.raises(DataError, match=r"chat_template.jinja: too large .*found 300000000"):
        load_tokenizer(saved)


def test_a_tokenizer_that_fails_on_a_text(tmp_path):
    """A vocabulary without an unknown token: what it lacks cannot be encoded."""
    saved = save_hugging_face(tmp_path / "saved")
    model = json.loads((saved / "tokenizer.json").read_text())
    model["model"] = {"type": "WordLevel", "vocab": {"a": 3}, "unk_token": "<unk>"}
    (saved / "tokenizer.json").write_text(json.dumps(model))
    with pytest.raises(DataError, match=r"^rows.jsonl:7: the tokenizer cannot encode the text: "):
        document({"prompt": "b", "completion": "b"}, load_tokenizer(saved))


@pytest.mark.parametrize("name", [
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json", "merges.txt",
    "special_tokens_map.json", "additional_chat_templates/default.jinja", "processor_config.json",
])  # fmt: skip
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path, name):
    saved = save_hugging_face(tmp_path / "saved")
    (saved / name).parent.mkdir(exist_ok=True)
    (saved / name).unlink(missing_ok=True)
    os.mkfifo(saved / name)
    with pytest.raises(DataError, match=rf"{name}: cannot read .*regular file; found a pipe"):
        load_tokenizer(saved)


def test_files_that_cannot_be_a_tokenizers(tmp_path):
    os.mkfifo(tmp_path / "pipe.model")
    with pytest.raises(DataError, match=r"pipe.model: cannot read .*found a pipe"):
        load_tokenizer(tmp_path / "pipe.model")
    saved = save_hugging_face(tmp_path / "saved")
    with open(saved / "tokenizer.json", "r+b") as handle:
        handle.truncate(1 << 40)
    with pytest.raises(DataError, match=r"tokenizer.json: too large .*found 1099511627776 bytes"):
        tokenizer_digests(saved)
    (saved / "tokenizer.json").unlink()
    (saved / "tokenizer.json").mkdir()
    with pytest.raises(DataError, match=r"tokenizer.json: cannot read .*found a directory"):
        load_tokenizer(saved)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('no system') }}", "refuses the conversation: no system"),
    ],
)
def test_template_missing_or_refusing(saved, template, message):
    with pytest.raises(DataError, match=message):
        saved(template).render_chat(HI, True)


def test_a_tokenizer_without_eos_is_refused(saved):
    with pytest.raises(DataError, match="has no EOS token"):
        saved(eos=None)
