"""Write the quick start's data: tokenizer, general text, NL2SQL rows and their database.

    python -m examples.quickstart.make_data --output runs/quickstart/data

Nothing is downloaded. The same arguments give the same files; a directory that already holds them
is left as it is, and one that holds others of this program's is replaced.

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
import platform
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from examples.quickstart.general_text import general_documents
from examples.quickstart.nl2sql import (
    NEW_TABLES,
    OLD_TABLES,
    Question,
    answerable_pools,
    draw,
    hold_out,
    practice_tables,
    question_pools,
    write_database,
)
from megatron_replay.checkpoint.staging import publish, start_directory
from megatron_replay.errors import ConfigError, ReplayError
from megatron_replay.files import atomic_file, make_directory, sha256_of_files, write_json

MANIFEST, DATABASE, TOKENIZER = "data.json", "domain_test/database.sqlite", "tokenizer"
ROW_FILES = (
    "general_train",
    "general_heldout",
    "base_sql",
    "base_train",
    "domain_train",
    "domain_test/questions",
)
EOS, PAD = "<|endoftext|>", "<|pad|>"
SPECIAL_TOKENS = [EOS, "<|im_start|>", "<|im_end|>", PAD]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Row = dict[str, str]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; the counts are those the quick start's published figures were made with."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0, help="decides every draw")
    parser.add_argument("--vocab-size", type=int, default=1024, help="tokens of the tokenizer")
    parser.add_argument("--base-questions", type=int, default=12000, help="rows of base_sql.jsonl")
    parser.add_argument(
        "--practice-tables", type=int, default=300, help="invented tables the base also learns from"
    )
    parser.add_argument(
        "--base-domain", type=int, default=100, help="of base_sql.jsonl, rows over NEW tables too"
    )
    parser.add_argument("--domain-train", type=int, default=2000, help="rows of domain_train.jsonl")
    parser.add_argument("--domain-test", type=int, default=200, help="held-out questions")
    parser.add_argument(
        "--general-train", type=int, default=2500, help="documents of general_train.jsonl"
    )
    parser.add_argument(
        "--general-heldout", type=int, default=200, help="documents of general_heldout.jsonl"
    )
    arguments = parser.parse_args(argv)
    for name, value in vars(arguments).items():
        if name not in ("output", "seed") and value < 1:
            raise ConfigError("must be positive", where=f"--{name.replace('_', '-')}", found=value)
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
    """Write all files but the manifest."""
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
    general = [{"text": text} for text in documents[heldout_stop:train_stop]]

    database = output / DATABASE
    make_directory(database.parent)
    write_database(database, seed=seed)
    try:
        base_tables = OLD_TABLES + practice_tables(arguments.practice_tables, seed=seed)
        base_sql = sql_rows(draw(question_pools(base_tables), arguments.base_questions, seed=seed))
        rest, heldout = hold_out(answerable_pools(NEW_TABLES, database), every=10, seed=seed)
        asked = draw(rest, arguments.base_domain + arguments.domain_train, seed=seed)
        base_sql += sql_rows(asked[: arguments.base_domain])
        domain_train = sql_rows(asked[arguments.base_domain :])
        domain_test = sql_rows(draw(heldout, arguments.domain_test, seed=seed))
    except ValueError as error:
        raise ConfigError(str(error), fix="Ask for fewer rows") from error

    base_train = general + [{"text": row["prompt"] + row["completion"]} for row in base_sql]
    random.Random(seed).shuffle(base_train)
    # Only what the base sees: a tokenizer that knew the domain's words would not be a base's.
    tokenizer = train_tokenizer(
        [row["text"] for row in base_train], vocab_size=arguments.vocab_size
    )
    tokenizer.save_pretrained(output / TOKENIZER)
    contents = (general, general_heldout, base_sql, base_train, domain_train, domain_test)
    for name, rows in zip(ROW_FILES, contents, strict=True):
        write_rows(output / f"{name}.jsonl", rows)


def content_files(output: Path) -> list[Path]:
    """The files of ``output`` that this program writes, those that are there."""
    files = [output / DATABASE, *(output / f"{name}.jsonl" for name in ROW_FILES)]
    files += (output / TOKENIZER).rglob("*")
    return sorted(path for path in files if path.is_file())


def describe(output: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The manifest: what was asked for, and the hash of every file that came of it."""
    settings = {k: v for k, v in vars(arguments).items() if k != "output"}
    versions = {
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "tokenizers": tokenizers.__version__,
    }
    files = {
        str(path.relative_to(output)): sha256_of_files([path]) for path in content_files(output)
    }
    return {"settings": settings, "versions": versions, "files": files}


def up_to_date(output: Path, arguments: argparse.Namespace) -> bool:
    """True if ``output`` holds exactly what these arguments would write."""
    manifest = output / MANIFEST
    return manifest.exists() and json.loads(manifest.read_text()) == describe(output, arguments)


def main(argv: list[str] | None = None) -> int:
    """Write the data, or say that it is there."""
    try:
        arguments = parse_arguments(argv)
        start = time.monotonic()
        output = arguments.output
        if up_to_date(output, arguments):
            print(f"{output}: up to date")
            return 0
        staged = start_directory(output, overwrite=True)
        write_everything(staged, arguments)
        manifest = describe(staged, arguments)
        write_json(staged / MANIFEST, manifest)
        publish(staged, output, overwrite=True)
        print(f"{output}: {len(manifest['files'])} files, {time.monotonic() - start:.1f} s")
    except ReplayError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
