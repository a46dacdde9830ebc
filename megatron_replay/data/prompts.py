"""How a prompt and its completion become a document; preprocessing and evaluation both ask here.

    plain text:    BOS? prompt | completion EOS
    conversation:  system message? user's message assistant's header | completion end-of-turn …

Tokens behind the bar carry loss; a model that is measured reads those before it. So a model is
evaluated on the very tokens that it was trained to continue.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_replay.config import Section, option
from megatron_replay.data.chat import Turn, tokenize_conversation
from megatron_replay.data.corpus import Document
from megatron_replay.data.rows import Row
from megatron_replay.data.tokenizer import Tokenizer
from megatron_replay.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PromptStyle(Section):
    """How prompts and plain text become tokens; None: as the tokenizer does (`for_tokenizer`)."""

    chat_template: bool | None = option(
        "write prompts as conversations in the tokenizer's chat template; None: if it has one",
        None,
    )
    system_prompt: str | None = option(
        "system message of conversations that have none of their own", None
    )
    add_bos: bool | None = option(
        "begin plain text with the BOS token; None: if the tokenizer does", None
    )

    def for_tokenizer(self, tokenizer: Tokenizer) -> PromptStyle:
        """This style with the tokenizer's own choice wherever it says None.

        Raises:
            ConfigError: the tokenizer lacks what is requested.
        """
        has_template = tokenizer.chat_template is not None
        chat = has_template if self.chat_template is None else self.chat_template
        if chat and not has_template:
            raise ConfigError(
                "the tokenizer has no chat template",
                where="--chat-template",
                found=tokenizer.path,
                fix="Leave the flag out, or use an instruction-tuned model's tokenizer",
            )
        if self.system_prompt and not chat:
            raise ConfigError(
                "has no effect on plain text",
                where="--system-prompt",
                expected="prompts in a chat template",
            )
        bos = tokenizer.adds_bos if self.add_bos is None else self.add_bos
        if bos and tokenizer.bos_id is None:
            raise ConfigError(
                "the tokenizer has no BOS token", where="--add-bos", found=tokenizer.path
            )
        return PromptStyle(chat_template=chat, system_prompt=self.system_prompt, add_bos=bos)

    def __str__(self) -> str:
        bos = "BOS" if self.add_bos else ""
        if not self.chat_template:
            return f"plain text{bos and f', {bos}'}"
        system = " with a system prompt" if self.system_prompt else ""
        return f"chat template{system}{bos and f'; plain text with {bos}'}"

    def document(self, row: Row, prompt: str, completion: str, tokenizer: Tokenizer) -> Document:
        """The document of a prompt, without loss, and its completion, with loss.

        The template writes no thought before a completion that has none (``enable_thinking``).

        Raises:
            DataError: as `tokenize_conversation`.
        """
        if not self.chat_template:
            return self.plain_document(prompt, completion, tokenizer)
        answer = self.answer(completion)
        turns = [
            Turn("the prompt", {"role": "user", "content": prompt}, False),
            Turn("the completion", {"role": "assistant", "content": answer}, True),
        ]
        thinks = "</think>" in answer
        return tokenize_conversation(
            row, self.with_system(turns), tokenizer, enable_thinking=thinks
        )

    def answer(self, completion: str) -> str:
        """``completion``; in a conversation without the one blank that joins it to plain text."""
        joined = self.chat_template and re.match(r" \S", completion)
        return completion[1:] if joined else completion

    def plain_document(self, prompt: str, completion: str, tokenizer: Tokenizer) -> Document:
        """BOS, if requested, and prompt tokens without loss; completion tokens and EOS with it."""
        start: list[int | None] = [tokenizer.bos_id] if self.add_bos else []
        start += tokenizer.encode(prompt) if prompt else []
        tokens = [*start, *tokenizer.encode(completion), tokenizer.eos_id]
        return Document(np.array(tokens, dtype=np.int32), np.arange(len(tokens)) >= len(start))

    def with_system(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """``turns`` behind the system prompt, where they have no system message of their own."""
        if not self.system_prompt or any(turn.message["role"] == "system" for turn in turns):
            return turns
        system = {"role": "system", "content": self.system_prompt}
        return [Turn("--system-prompt", system, False), *turns]


def prompt_of(document: Document) -> list[int]:
    """What a model reads before it answers: the tokens before the first one with loss."""
    tokens: list[int] = document.tokens[: document.loss_mask.argmax()].tolist()
    return tokens
