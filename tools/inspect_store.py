"""Show what a candidate store holds; verify it, merge stores.

    python tools/inspect_store.py STORE
    python tools/inspect_store.py STORE --document 3 --tokenizer MODEL_DIR --data-path corpus
    python tools/inspect_store.py STORE --verify --data-path corpus
    python tools/inspect_store.py merge OUT STORE STORE ...

The first form prints sizes of the candidate sets, coverage and missed golds. The tokens of a
document need --tokenizer; its gold tokens need --data-path too, since the store itself keeps no
text. "merge --help" says what that is for. (A store of such a name: ./merge.)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_replay.data.document_view import describe_document, document_text
from megatron_replay.errors import EXIT_INTERRUPTED, ConfigError, ReplayError
from megatron_replay.files import require_apart
from megatron_replay.progress import Progress
from megatron_replay.store import CandidateReader
from megatron_replay.store.merge import merge_parts
from megatron_replay.store.summary import summary, summary_text
from megatron_replay.store.tally import Tally, tally
from megatron_replay.store.verify import verify
from megatron_replay.store.workers import each_shard, usable_cores

if TYPE_CHECKING:
    from megatron_replay.data.corpus import Corpus
    from megatron_replay.data.tokenizer import Tokenizer

_MERGE = """Merge the parts of one store.

Parts come from Stage 0, run with the same settings in several places (--shards). Shards that
several parts have must be equal. An interrupted merge goes on with the same command.
"""


def _parser(form: str) -> argparse.ArgumentParser:
    plain = form not in _COMMANDS
    text = {"merge": _MERGE}.get(form, __doc__)
    parser = argparse.ArgumentParser(
        prog="inspect_store.py" + ("" if plain else f" {form}"),
        description=text,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    if form == "merge":
        add("out", type=Path, metavar="OUT", help="directory to write")
        add("stores", type=Path, metavar="IN", nargs="+", help="candidate stores, in order")
    else:
        add("store", type=Path, metavar="STORE", help="a finished candidate store")
        add("--document", type=int, metavar="N", help="show this document")
        add("--tokenizer", metavar="PATH", help="with --document: show tokens as text")
        add("--data-path", metavar="PREFIX", help="with --document: show golds; with --verify: "
            "check that positions carry loss and that golds are in their sets")  # fmt: skip
        add("--show-candidates", type=int, metavar="N",
            help="with --document: of each position, at most (default: 8); likeliest first where "
            "the store has logits, otherwise by id")  # fmt: skip
        add("--figure", type=Path, metavar="FILE.png", help="draw the distributions")
        add("--verify", action="store_true", help="first check every byte, crc32 and bound")
        add("--json", action="store_true", help="print JSON, with all candidates")
    add("--workers", type=int, default=usable_cores(), metavar="N",
        help="threads that share the shards (default: %(default)s, the cores)")  # fmt: skip
    return parser


def _require_options(options: argparse.Namespace) -> None:
    if options.tokenizer is not None and options.document is None:
        raise ConfigError("shows nothing without a document", where="--tokenizer",
                          fix="Add --document")  # fmt: skip
    if options.data_path is not None and options.document is None and not options.verify:
        raise ConfigError("is of no use alone", where="--data-path",
                          fix="Add --document or --verify")  # fmt: skip
    if options.figure is not None and options.document is not None:
        raise ConfigError("draws whole stores", where="--figure", fix="Leave out --document")
    if options.figure is not None and options.figure.suffix != ".png":
        raise ConfigError("another format", where="--figure", expected="a name that ends in .png",
                          found=options.figure)  # fmt: skip
    if options.show_candidates is None:
        options.show_candidates = 8
    elif options.document is None:
        raise ConfigError("shows nothing without a document", where="--show-candidates",
                          fix="Add --document")  # fmt: skip
    elif options.json:
        raise ConfigError("JSON has all candidates", where="--show-candidates",
                          fix="Leave it out, or --json")  # fmt: skip
    if options.show_candidates < 0:
        raise ConfigError("negative", where="--show-candidates", expected="0 or more",
                          found=options.show_candidates)  # fmt: skip


def _open_tokenizer(path: str | None, reader: CandidateReader) -> Tokenizer | None:
    if path is None:
        return None
    from megatron_replay.data.tokenizer import load_tokenizer  # transformers: seconds to import

    tokenizer = load_tokenizer(path)
    fix = f"--tokenizer {path} would show other text: give the tokenizer of the store's corpus"
    reader.require(tokenizer_fingerprint=tokenizer.fingerprint, fix=fix)
    return tokenizer


def _open_corpus(prefix: str | None, reader: CandidateReader) -> Corpus | None:
    if prefix is None:
        return None
    from megatron_replay.data.corpus import Corpus

    corpus = Corpus(prefix)
    fix = f"--data-path {prefix} is another corpus: give the one that Stage 0 read"
    reader.require(
        corpus_fingerprint=corpus.fingerprint,
        tokenizer_fingerprint=corpus.tokenizer_fingerprint,
        fix=fix,
    )
    return corpus


def _verify(reader: CandidateReader, corpus: Corpus | None, workers: int) -> None:
    """Say that all is well, or raise: damage of other shards but the last is printed first."""
    start = time.monotonic()
    if corpus is not None:
        corpus.verify()
    damage = verify(reader, corpus=corpus, workers=workers)
    for error in damage[:-1]:
        print(f"error: {error}", file=sys.stderr)
    if damage:
        raise damage[-1]
    size, seconds = sum(row.bin_bytes for row in reader.rows), time.monotonic() - start
    print(
        f"{reader.directory}: every byte as written"
        + (", every position carries loss, every gold in its set" if corpus is not None else "")
        + f": {size / 1e9:.3g} GB in {reader.description.num_shards} shards, "
        f"{size / 1e9 / max(seconds, 1e-9):.2f} GB/s",
        file=sys.stderr,
    )


def _tally(reader: CandidateReader, workers: int) -> Tally:
    shards = range(reader.description.num_shards)
    counted = tally(reader, [])
    with Progress("read", len(reader), "documents") as progress:
        for _, part in each_shard(lambda shard: tally(reader, [shard]), shards, workers=workers):
            counted += part
            progress.advance(part.documents)
    return counted


def _draw(counted: Tally, content: dict[str, object], path: Path) -> None:
    try:
        from megatron_replay.evaluation.store_figure import draw_store
    except ImportError as error:
        raise ConfigError("needs matplotlib", where="--figure",
                          fix="pip install 'megatron_replay[report]'") from error  # fmt: skip
    draw_store(counted, content, path)


def _show(options: argparse.Namespace) -> str:
    _require_options(options)
    reader = CandidateReader(options.store)
    if options.figure is not None:
        require_apart(options.figure, [("STORE", options.store)], flag="--figure")
    # Before a verification, which may take an hour.
    corpus = _open_corpus(options.data_path, reader)
    tokenizer = _open_tokenizer(options.tokenizer, reader)
    if options.verify:
        _verify(reader, corpus, options.workers)
    if options.document is not None:
        view = describe_document(reader, options.document, tokenizer, corpus)
        return (
            json.dumps(view, indent=2)
            if options.json
            else document_text(view, options.show_candidates)
        )
    counted = _tally(reader, options.workers)
    content = summary(reader.description, counted)
    if options.figure is not None:
        _draw(counted, content, options.figure)
    return json.dumps(content, indent=2) if options.json else summary_text(content)


def _merge(options: argparse.Namespace) -> str:
    merged = merge_parts(options.stores, options.out, workers=options.workers)
    return f"{options.out}: {merged.num_documents:,} documents in {merged.num_shards:,} shards"


_COMMANDS = {"merge": _merge}


def run(arguments: Sequence[str]) -> str:
    """What the command prints."""
    form = arguments[0] if arguments and arguments[0] in _COMMANDS else ""
    options = _parser(form).parse_args(arguments[1:] if form else arguments)
    if options.workers < 1:
        raise ConfigError("too few", where="--workers", expected="1 or more", found=options.workers)
    return _COMMANDS.get(form, _show)(options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    try:
        print(run(sys.argv[1:] if arguments is None else arguments), flush=True)
    except ReplayError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of a pipe, head say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
