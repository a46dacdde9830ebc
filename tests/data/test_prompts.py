"""A prompt's style, and that a model is evaluated on the tokens that it was trained to continue."""

from __future__ import annotations

import pytest

from megatron_replay.data.prompts import PromptStyle
from megatron_replay.data.row_formats import tokenize_row
from megatron_replay.errors import ConfigError, DataError
from tests.data.examples import parse, spans
from tests.data.tiny_tokenizers import CHATML, THINKING

ROW = {"prompt": "how many?", "completion": " select 1"}
HEADER = "<|im_start|>user\nhow many?<|im_end|>\n<|im_start|>assistant\n"
SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"


def tokenized(tokenizer, row=ROW, row_format="prompt", **style):
    style = PromptStyle(**style).for_tokenizer(tokenizer)
    return tokenize_row(parse(row), row_format, tokenizer, style)


def test_a_conversation_where_there_is_a_template(tokenizer, saved):
    expected = [(HEADER, False), ("select 1<|im_end|>", True), ("\n", False)]
    assert spans(tokenized(tokenizer), tokenizer) == expected
    assert spans(tokenized(tokenizer, system_prompt="Be brief."), tokenizer) == [
        (SYSTEM + HEADER, False), *expected[1:]
    ]  # fmt: skip
    plain = [("how many?", False), (" select 1<|endoftext|>", True)]
    assert spans(tokenized(tokenizer, chat_template=False), tokenizer) == plain
    assert spans(tokenized(saved(None)), saved(None)) == plain


@pytest.mark.parametrize("completion", ["    return 1", "\n- a", "a b "])
def test_only_a_blank_that_joins_is_removed(tokenizer, completion):
    got = tokenized(tokenizer, ROW | {"completion": completion})
    assert spans(got, tokenizer)[1] == (f"{completion}<|im_end|>", True)


def test_a_system_message_of_the_row_wins(tokenizer):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    for row, system in (
        ({"messages": messages}, "Be long."),
        ({"messages": messages, "system": "Be brief."}, "Be brief."),
    ):
        got = tokenized(tokenizer, row, "messages", system_prompt="Be long.")
        assert spans(got, tokenizer)[0][0].startswith(f"<|im_start|>system\n{system}<|im_end|>\n<")


def test_no_thought_before_an_answer_that_has_none(saved):
    thinking = saved(THINKING)
    empty = "<think>\n\n</think>\n\n"
    assert spans(tokenized(thinking), thinking)[:2] == [
        (HEADER + empty, False), ("select 1<|im_end|>", True)
    ]  # fmt: skip
    thought = "<think>\nso\n</think>\n\nselect 1"
    got = tokenized(thinking, ROW | {"completion": thought})
    assert spans(got, thinking)[:2] == [(HEADER, False), (f"{thought}<|im_end|>", True)]


def test_a_system_prompt_that_the_template_drops_is_refused(saved):
    drops = saved(CHATML.replace("in messages", "in messages if message.role != 'system'"))
    with pytest.raises(DataError, match=r"the content of --system-prompt .* would be lost"):
        tokenized(drops, system_prompt="Be brief.")


def test_bos_where_the_tokenizer_adds_it(tokenizer, saved, sentencepiece_tokenizer):
    adding = saved(CHATML, bos="<|im_start|>")
    bos = adding.encode("<|im_start|>")
    for row, row_format in ((ROW, "prompt"), ({"text": "how many?"}, "text")):
        plain = tokenized(adding, row, row_format, chat_template=False, add_bos=False)
        got = tokenized(adding, row, row_format, chat_template=False)
        assert got.tokens.tolist() == bos + plain.tokens.tolist()
        assert got.loss_mask.tolist() == [False, *plain.loss_mask.tolist()]
    # A template writes its own, or none.
    assert tokenized(adding).tokens.tolist() == tokenized(tokenizer).tokens.tolist()
    assert 1 not in tokenized(sentencepiece_tokenizer).tokens
    assert tokenized(sentencepiece_tokenizer, add_bos=True).tokens[0] == 1
    with pytest.raises(ConfigError, match="--add-bos: the tokenizer has no BOS token"):
        tokenized(tokenizer, add_bos=True)
