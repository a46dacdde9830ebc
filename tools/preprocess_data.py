"""Freeze JSON lines into a corpus: tokens, loss mask and document table under one prefix.

    python tools/preprocess_data.py --input train.jsonl --tokenizer MODEL_DIR --output-prefix corpus

``--format spider`` and ``bird`` read these sets' own files (``train_spider.json``), and make the
same prompts as tools/evaluate.py. The same rows, tokenizer and options give the same bytes; a
corpus that is already there and was made from the same is kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_replay.cli import exit_code_of
from megatron_replay.config import flag_name
from megatron_replay.data.corpus import Corpus, Document, corpus_file
from megatron_replay.data.corpus_writer import CorpusWriter, require_ours, written_files
from megatron_replay.data.forest import plant, stems
from megatron_replay.data.prompts import PromptStyle
from megatron_replay.data.row_formats import FORMATS, detect_format, tokenize_row
from megatron_replay.data.rows import parse_row, read_lines
from megatron_replay.data.tokenizer import Tokenizer, load_tokenizer
from megatron_replay.errors import ConfigError, DataError
from megatron_replay.evaluation.sql.sets import LAYOUTS, read_questions
from megatron_replay.files import require_apart, require_regular, sha256_of_files
from megatron_replay.flags import Parser, add_flags, from_flags
from megatron_replay.progress import Progress

_GREEN, _PLAIN = "\033[32m", "\033[0m"
#: Documents of the steps whose share of computed positions --show prints, and over how many of
#: them it is averaged.
_STEP_SIZES, _MOST_STEPS = (64, 128, 256), 16
_GROUP = 8


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="preprocess_data.py",
        description=(__doc__ or "").splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--input", nargs="+", type=Path, required=True, metavar="FILE",
        help="JSON-lines files, plain or gzip; Spider's or BIRD's questions")  # fmt: skip
    add("--tokenizer", required=True, metavar="PATH",
        help="Hugging Face directory, or a sentencepiece .model file")  # fmt: skip
    add("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx, …")
    add("--format", default="auto", choices=("auto", *FORMATS, *LAYOUTS),
        help="format of the rows; auto: decided by the keys of the first one")  # fmt: skip
    add("--on-bad-row", default="error", choices=("error", "skip"),
        help="stop at a bad row, or leave it out, listed and counted")  # fmt: skip
    add("--ignore-fields", type=_names, default=[], metavar="NAME,...",
        help="fields to drop from rows and messages; others unread are an error")  # fmt: skip
    add(
        "--show",
        type=int,
        default=0,
        metavar="N",
        help="print N documents, loss tokens marked, and what sharing prefixes saves",
    )
    add("--max-document-tokens", type=int, metavar="N",
        help="split text rows into documents of at most N tokens")  # fmt: skip
    add_flags(parser, PromptStyle)
    return parser


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _require_options(options: argparse.Namespace) -> None:
    if options.format in LAYOUTS and options.ignore_fields:
        raise ConfigError(
            f"has no effect on --format {options.format}, which reads the fields it needs",
            where="--ignore-fields",
        )
    for path in options.input:
        require_regular(path, DataError)
    if options.show < 0:
        raise ConfigError("negative", where="--show", expected="0 or more", found=options.show)
    limit = options.max_document_tokens
    if limit is not None and limit < 2:
        raise ConfigError(
            "too small", where="--max-document-tokens", expected="2 or more", found=limit
        )


def _require_output(options: argparse.Namespace, tokenizer: Tokenizer) -> None:
    """Raise where an output file is also read, or is not part of a corpus of ours."""
    inputs = [("--input", path) for path in options.input]
    folder = tokenizer.path if tokenizer.path.is_dir() else tokenizer.path.parent
    inputs += [("--tokenizer", folder / name) for name in tokenizer.files]
    for output in written_files(options.output_prefix):
        require_apart(output, inputs, flag="--output-prefix, which writes")
    require_ours(options.output_prefix)


def _lines(
    inputs: Sequence[Path], row_format: str, *, chat: bool = False
) -> Iterator[tuple[str, bytes]]:
    for path in inputs:
        if row_format not in LAYOUTS:
            yield from read_lines(path)
            continue
        for question in read_questions(path, row_format, chat=chat):
            row = {"prompt": question.prompt, "completion": question.gold}
            yield question.where, json.dumps(row).encode()


def _described(path: Path, row_format: str) -> dict[str, str]:
    """Name and SHA-256 of an input; of SQL questions, with their databases, which prompts show."""
    files = [path]
    if row_format in LAYOUTS:
        files += sorted({question.database for question in read_questions(path, row_format)})
    return {"name": path.name, "sha256": sha256_of_files(files)}


def _row_format(options: argparse.Namespace) -> str:
    """The format of every row: the flag's, or that of the first row that can be parsed."""
    found: str = options.format
    if found == "auto":
        found = _first_format(options)
    if found in LAYOUTS:
        found = "prompt"
    if options.max_document_tokens is not None and found != "text":
        raise ConfigError(
            "splits raw text only",
            where="--max-document-tokens",
            expected="text rows",
            found=f"{found} rows",
        )
    return found


def _style(options: argparse.Namespace, row_format: str, tokenizer: Tokenizer) -> PromptStyle:
    """How the rows become tokens, once nothing that was requested is without effect on them.

    Raises:
        ConfigError: something is; or the tokenizer lacks what is requested.
    """
    style = from_flags(PromptStyle, vars(options))
    if row_format in ("alpaca", "text"):
        for name in ("chat_template", "system_prompt"):
            if getattr(style, name):
                raise ConfigError(
                    f"has no effect on {row_format} rows, which are plain text",
                    where=flag_name(name),
                )
        style = replace(style, chat_template=False)
    style = style.for_tokenizer(tokenizer)
    if not style.chat_template:
        return style
    if vars(options).get("add_bos"):
        raise ConfigError(
            "has no effect on conversations: a chat template writes its own BOS token",
            where="--add-bos",
        )
    return replace(style, add_bos=False)


def _first_format(options: argparse.Namespace) -> str:
    for where, line in _lines(options.input, options.format):
        try:
            row = parse_row(where, line, frozenset(options.ignore_fields))
        except DataError:
            if options.on_bad_row == "error":
                raise
        else:
            return detect_format(row)
    raise DataError("no row to take the format from", where=options.input[0], fix="Give --format")


def _write(
    options: argparse.Namespace,
    row_format: str,
    style: PromptStyle,
    tokenizer: Tokenizer,
    source: dict[str, Any],
    num_lines: int,
) -> int:
    """Write the corpus; return the number of rows left out."""
    num_skipped = 0
    ignored = frozenset(options.ignore_fields)
    unseen = set(ignored)
    if style.chat_template and "strftime_now" in (tokenizer.chat_template or ""):
        print(
            "the chat template writes today's date: the same rows give other tokens tomorrow. "
            "Keep this corpus, or put a fixed date into the template",
            file=sys.stderr,
        )
    with (
        Progress("tokenize", num_lines, "rows") as progress,
        CorpusWriter(
            options.output_prefix, tokenizer, row_format=row_format, source=source
        ) as writer,
    ):
        for where, line in _lines(options.input, options.format, chat=bool(style.chat_template)):
            unseen -= {name for name in unseen if _may_have(line, name)}
            try:
                row = parse_row(where, line, ignored)
                document = tokenize_row(row, row_format, tokenizer, style)
            except DataError as error:
                if options.on_bad_row == "error":
                    raise
                num_skipped += 1
                print(f"skipped: {error}", file=sys.stderr)
            else:
                for piece in document.split(options.max_document_tokens or len(document)):
                    writer.add(piece)
            progress.advance()
    for name in sorted(unseen):
        print(f"warning: --ignore-fields {name}: no row has such a field", file=sys.stderr)
    return num_skipped


def _may_have(line: bytes, field: str) -> bool:
    """Whether a line may have ``field``, before it is parsed."""
    spellings = (json.dumps(field, ensure_ascii=ascii) for ascii in (True, False))
    return any(spelling.encode() in line for spelling in spellings)


def _existing(prefix: str, source: dict[str, Any]) -> Corpus | None:
    """The corpus under ``prefix`` if it was made from ``source`` and is whole."""
    if not corpus_file(prefix, "json").exists():
        return None
    try:
        corpus = Corpus(prefix)
        if corpus.description.source != source:
            return None
        corpus.verify()
    except DataError as error:
        print(f"writing again: {error}", file=sys.stderr)
        return None
    return corpus


def _show(corpus: Corpus, tokenizer: Tokenizer, count: int) -> None:
    """Print documents with their loss tokens in green, or in [[double brackets]]."""
    for i in range(min(count, len(corpus))):
        document = corpus[i]
        loss = len(document.eligible_positions())
        print(f"--- document {i}: {len(document)} tokens, {loss} with loss")
        print(_marked(document, tokenizer, colour=sys.stdout.isatty()))


def _show_sharing(corpus: Corpus) -> None:
    """Print which share of the positions is computed where prefixes are shared."""
    from megatron_replay.data.packing import document_order  # torch: seconds to import

    size, stem_D = len(corpus), stems(corpus, corpus.lengths)
    random_D = document_order(size, seed=0, epoch=0)
    grouped_D = document_order(size, seed=0, epoch=0, stem_D=stem_D, group=_GROUP)
    print("--- positions computed where prefixes are shared")
    print(f"whole corpus (Stage 0's best): {_computed_share(corpus, random_D, size):.1%}")
    for step in _STEP_SIZES:
        if step <= size:
            shares = [_computed_share(corpus, order_D, step) for order_D in (random_D, grouped_D)]
            print(
                f"steps of {step} documents: {shares[0]:.1%} in random order, "
                f"{shares[1]:.1%} in groups of {_GROUP}"
            )


def _computed_share(corpus: Corpus, order_D: npt.NDArray[np.int64], step: int) -> float:
    """Of the first steps of so many documents, none of them cut to fit a device."""
    steps = order_D[: len(order_D) // step * step].reshape(-1, step)[:_MOST_STEPS]
    forests = [plant(corpus, documents, corpus.lengths) for documents in steps]
    positions = sum(forest.positions for forest in forests)
    return sum(forest.computed for forest in forests) / max(positions, 1)


def _marked(document: Document, tokenizer: Tokenizer, *, colour: bool) -> str:
    before, after = (_GREEN, _PLAIN) if colour else ("[[", "]]")
    pieces = []
    pairs = zip(document.tokens.tolist(), document.loss_mask.tolist(), strict=True)
    for carries_loss, run in groupby(pairs, key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in run])
        pieces.append(f"{before}{text}{after}" if carries_loss else text)
    return "".join(pieces)


def run(options: argparse.Namespace) -> str:
    """Write or reuse the corpus; print samples and what sharing prefixes saves; return a summary.

    Raises:
        ReplayError: the corpus cannot be written.
    """
    _require_options(options)
    tokenizer = load_tokenizer(options.tokenizer)
    _require_output(options, tokenizer)
    num_lines = sum(1 for _ in _lines(options.input, options.format))
    row_format = _row_format(options)
    style = _style(options, row_format, tokenizer)
    source = {
        "inputs": [_described(path, options.format) for path in options.input],
        "tokenizer": tokenizer.fingerprint,
        "format": options.format,
        "on_bad_row": options.on_bad_row,
        "ignore_fields": sorted(set(options.ignore_fields)),
        "max_document_tokens": options.max_document_tokens,
        "prompts": asdict(style),
    }
    corpus, outcome = _existing(options.output_prefix, source), "up to date"
    if corpus is None:
        is_another = corpus_file(options.output_prefix, "json").exists()
        num_skipped = _write(options, row_format, style, tokenizer, source, num_lines)
        corpus = Corpus(options.output_prefix)
        instead = " in place of an earlier corpus" if is_another else ""
        outcome = f"written{instead}, {num_skipped} of {num_lines} rows skipped"
    if options.show:
        _show(corpus, tokenizer, options.show)
        _show_sharing(corpus)
    about = corpus.description
    return (
        f"{options.output_prefix}: {about.num_documents} documents ({about.format}, {style}), "
        f"{about.num_tokens} tokens, {about.num_loss_tokens} with loss, "
        f"longest {corpus.lengths.max()}, fingerprint {about.fingerprint[:12]}; {outcome}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return exit_code_of(
        lambda: run(_parser().parse_args(argv)), interrupted="run the same command again"
    )


if __name__ == "__main__":
    sys.exit(main())
