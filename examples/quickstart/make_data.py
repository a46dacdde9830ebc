"""Write the quick start's data: tokenizer, general text, NL2SQL rows and their database.

    python -m examples.quickstart.make_data --output runs/quickstart/data

Nothing is downloaded. The same arguments give the same files under the same versions of Python,
numpy and tokenizers. The directory appears whole; one that is not empty is left as it is.

    tokenizer/             byte-level BPE, a Hugging Face directory
    general_train.jsonl    {"text"}: documentation of Python and numpy
    general_heldout.jsonl  {"text"}: forgetting is measured here
    base_sql.jsonl         {"prompt", "completion"}: over OLD and practice tables, few over NEW
    base_train.jsonl       {"text"}: general_train and base_sql mixed, what the base learns from
    domain_train.jsonl     {"prompt", "completion"}: questions over the NEW tables
    domain_test/           questions.jsonl: held-out questions and their gold SQL;
                           database.sqlite: the OLD and the NEW tables
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from examples.quickstart.general_text import general_documents
from examples.quickstart.nl2sql import (
    NEW_TABLES,
    OLD_TABLES,
    Question,
    draw,
    hold_out,
    only_answerable,
    practice_tables,
    question_pools,
    write_database,
)
from megatron_replay.checkpoint.staging import publish, start_directory
from megatron_replay.errors import ConfigError, ReplayError
from megatron_replay.files import atomic_file, make_directory

EOS, PAD = "<|endoftext|>", "<|pad|>"
SPECIAL_TOKENS = [EOS, "<|im_start|>", "<|im_end|>", PAD]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Row = dict[str, str]
#: The published figures of the quick start were made with these counts.
COUNTS = {
    "vocab-size": (1024, "tokens of the tokenizer"),
    "base-questions": (12000, "rows of base_sql.jsonl"),
    "practice-tables": (300, "invented tables the base also learns from"),
    "base-domain": (100, "of base_sql.jsonl, rows over NEW tables too"),
    "domain-train": (2000, "rows of domain_train.jsonl"),
    "domain-test": (200, "held-out questions"),
    "general-train": (2500, "documents of general_train.jsonl"),
    "general-heldout": (200, "documents of general_heldout.jsonl"),
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0, help="decides every draw")
    for name, (count, text) in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=count, help=text)
    arguments = parser.parse_args(argv)
    for name in COUNTS:
        value = getattr(arguments, name.replace("-", "_"))
        if value < 1:
            raise ConfigError("must be positive", where=f"--{name}", found=value)
    return arguments


def train_tokenizer(texts: list[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of exactly ``vocab_size`` tokens, special tokens included."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() != vocab_size:
        raise ConfigError(
            "the text does not give a tokenizer of this size",
            where="--vocab-size",
            expected=vocab_size,
            found=bpe.get_vocab_size(),
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def sql_rows(questions: list[Question]) -> list[Row]:
    """Questions as rows; the newline belongs to the prompt, so an answer starts with ``select``."""
    return [{"prompt": f"{q.text}\n", "completion": q.sql} for q in questions]


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write one JSON object a line."""
    with atomic_file(path, "w") as handle:
        handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_everything(output: Path, arguments: argparse.Namespace) -> None:
    """Write all files into directory ``output``."""
    seed = arguments.seed
    documents = general_documents(seed=seed)
    heldout_stop = arguments.general_heldout
    train_stop = heldout_stop + arguments.general_train
    if train_stop > len(documents):
        raise ConfigError(
            "this installation documents less than that",
            where="--general-train plus --general-heldout",
            expected=f"at most {len(documents)}",
            found=train_stop,
        )
    general_heldout = [{"text": text} for text in documents[:heldout_stop]]
    general_train = [{"text": text} for text in documents[heldout_stop:train_stop]]

    database = output / "domain_test" / "database.sqlite"
    make_directory(database.parent)
    write_database(database, seed=seed)
    try:
        base_tables = OLD_TABLES + practice_tables(arguments.practice_tables, seed=seed)
        base_sql = sql_rows(draw(question_pools(base_tables), arguments.base_questions, seed=seed))
        pools = only_answerable(question_pools(NEW_TABLES), database)
        rest, heldout = hold_out(pools, every=10, seed=seed)
        asked = draw(rest, arguments.base_domain + arguments.domain_train, seed=seed)
        base_sql += sql_rows(asked[: arguments.base_domain])
        domain_train = sql_rows(asked[arguments.base_domain :])
        domain_test = sql_rows(draw(heldout, arguments.domain_test, seed=seed))
    except ValueError as error:
        raise ConfigError(str(error), fix="Ask for fewer rows") from error

    base_train = general_train + [{"text": row["prompt"] + row["completion"]} for row in base_sql]
    random.Random(seed).shuffle(base_train)
    # Trained on the base's text only: with the domain's words it would not be a base's tokenizer.
    texts = [row["text"] for row in base_train]
    train_tokenizer(texts, vocab_size=arguments.vocab_size).save_pretrained(output / "tokenizer")
    write_rows(output / "general_train.jsonl", general_train)
    write_rows(output / "general_heldout.jsonl", general_heldout)
    write_rows(output / "base_sql.jsonl", base_sql)
    write_rows(output / "base_train.jsonl", base_train)
    write_rows(output / "domain_train.jsonl", domain_train)
    write_rows(output / "domain_test/questions.jsonl", domain_test)


def main(argv: list[str] | None = None) -> int:
    """Write the data; return the exit code."""
    try:
        arguments = parse_arguments(argv)
        start, output = time.monotonic(), arguments.output
        staged = start_directory(output)
        write_everything(staged, arguments)
        publish(staged, output, overwrite=False)
        print(f"{output}: written in {time.monotonic() - start:.1f} s")
    except ReplayError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
