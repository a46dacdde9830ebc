"""Tokenizers small enough to train in a test, with every property the real ones have."""

from __future__ import annotations

import io
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: As Qwen3's: a thought comes before the last answer, empty where it has none, and the header may
#: have it already.
THINKING = CHATML.replace(
    "{{ message.content }}",
    "{% set parts = message.content.split('</think>') %}"
    "{% if message.role == 'assistant' and loop.last %}"
    "{{ '<think>\n' + parts[:-1] | join | replace('<think>', '') | trim + '\n</think>\n\n' }}"
    "{% endif %}{{ parts[-1].lstrip('\n') }}",
).replace(
    "assistant\n{% endif",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif",
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
#: Ends in a newline, as an answer may begin with some.
BLANK_LINES = ["assistant\n\n\n- a\n\n\n\nb \n\n c\n\n"] * 30
SENTENCES = [
    "how many singers are there in france?",
    "select count(*) from singer where country = 'france'",
    "list the name of every router with more than 5 ports.",
    "system user assistant",
]


def save_hugging_face(
    directory: Path,
    *,
    chat_template: str | None = CHATML,
    eos: str | None = "<|endoftext|>",
    bos: str | None = None,
    blank_lines: bool = False,
    like_sentencepiece: bool = False,
) -> Path:
    """A BPE of about 300 ids; padding is the EOS, as in many published models.

    Byte-level; or one that writes a blank before each text, as Llama 2's does. With
    ``blank_lines``, it has tokens of several newlines; with ``bos``, it puts that before each text.
    """
    backend = Tokenizer(models.BPE())
    if like_sentencepiece:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES + BLANK_LINES * blank_lines, trainer)
    if bos is not None:
        special = [(bos, backend.token_to_id(bos))]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=special
        )
    directory.mkdir(parents=True)
    backend.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": eos, "eos_token": eos}
    if bos is not None:
        settings["bos_token"] = bos
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def save_sentencepiece(path: Path) -> Path:
    """A unigram model with sentencepiece's own specials: unk 0, bos 1, eos 2, no padding."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.Train(
        sentence_iterator=iter(SENTENCES * 4),
        model_writer=model,
        vocab_size=60,
        model_type="unigram",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path
