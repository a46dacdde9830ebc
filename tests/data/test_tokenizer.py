from __future__ import annotations

import json
import shutil

import pytest

from megatron_replay.data.tokenizer import load_tokenizer
from megatron_replay.errors import DataError
from tests.data.tiny_tokenizers import save_hugging_face, save_sentencepiece

TEXTS = ["select name from router", "Größe 北京 🙂", "  two  spaces\n\ttab", "don 't , stop ."]


@pytest.mark.parametrize("text", TEXTS)
def test_hugging_face_round_trip_adds_nothing(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & tokenizer.special_ids
    assert all(type(id_) is int and 0 <= id_ < tokenizer.vocab_size for id_ in ids)


def test_hugging_face_ids_are_those_of_the_tokenizers_library(tokenizer):
    from tokenizers import Tokenizer as Reference

    reference = Reference.from_file(str(tokenizer.path / "tokenizer.json"))
    for text in TEXTS:
        assert tokenizer.encode(text) == reference.encode(text).ids
    assert tokenizer.vocab_size == reference.get_vocab_size()
    assert tokenizer.eos_id == tokenizer.pad_id == reference.token_to_id("<|endoftext|>")
    assert tokenizer.special_ids == {
        reference.token_to_id(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    }


def test_a_long_text_gives_no_warning(tokenizer, caplog):
    tokenizer.encode("word " * 3000)
    assert not caplog.records


def test_chat_template_is_rendered_to_plain_ids(tokenizer):
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], True)
    assert type(ids) is list
    assert tokenizer.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


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
        sentencepiece_tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], True)


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


def test_sentencepiece_fingerprint(tmp_path, sentencepiece_tokenizer):
    again = load_tokenizer(save_sentencepiece(tmp_path / "tiny.model"))
    assert again.fingerprint == sentencepiece_tokenizer.fingerprint


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer here .*found nothing"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(DataError, match="no tokenizer files in this directory"):
        load_tokenizer(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match="found another kind of file"):
        load_tokenizer(tmp_path / "notes.txt")


def test_damaged_files(tmp_path):
    broken = save_hugging_face(tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot load the tokenizer"):
        load_tokenizer(broken)
    (tmp_path / "broken.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path / "broken.model")


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    with pytest.raises(DataError, match="has no EOS token"):
        load_tokenizer(save_hugging_face(tmp_path / "no-eos", eos=None))


def test_template_missing_or_refusing(tmp_path):
    plain = load_tokenizer(save_hugging_face(tmp_path / "plain", chat_template=None))
    with pytest.raises(DataError, match="has no chat template"):
        plain.apply_chat_template([{"role": "user", "content": "hi"}], True)
    strict = load_tokenizer(
        save_hugging_face(tmp_path / "strict", chat_template="{{ raise_exception('no system') }}")
    )
    with pytest.raises(DataError, match="refuses the conversation: no system"):
        strict.apply_chat_template([{"role": "system", "content": "hi"}], True)
