"""Show what a candidate store holds: sizes, candidate sets, coverage; or one document of it.

    python tools/inspect_store.py STORE
    python tools/inspect_store.py STORE --document 3 --tokenizer MODEL_DIR --data-path corpus

The tokens of a document need ``--tokenizer``; its gold tokens need ``--data-path`` too, since the
store itself keeps no text.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_replay.errors import EXIT_INTERRUPTED, ConfigError, ReplayError, StoreError
from megatron_replay.store import CandidateReader
from megatron_replay.store.summary import summarize, summary_text

if TYPE_CHECKING:
    from megatron_replay.data.corpus import Corpus
    from megatron_replay.data.tokenizer import Tokenizer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="inspect_store.py",
        description=(__doc__ or "").splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("store", type=Path, metavar="DIR", help="a finished candidate store")
    parser.add_argument("--document", type=int, metavar="N", help="show this document")
    parser.add_argument("--tokenizer", metavar="PATH", help="with --document: show tokens as text")
    parser.add_argument("--data-path", metavar="PREFIX", help="with --document: show gold tokens")
    parser.add_argument(
        "--show-candidates", type=int, default=8, metavar="N", help="of each position, at most"
    )
    parser.add_argument(
        "--verify", action="store_true", help="first check every byte against its crc32"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with all candidates")
    return parser


def _require_options(options: argparse.Namespace) -> None:
    for flag, value in (("--tokenizer", options.tokenizer), ("--data-path", options.data_path)):
        if value is not None and options.document is None:
            raise ConfigError("shows nothing without a document", where=flag, fix="Add --document")
    if options.show_candidates < 0:
        raise ConfigError(
            "negative",
            where="--show-candidates",
            expected="0 or more",
            found=options.show_candidates,
        )


def describe_document(
    reader: CandidateReader,
    document_id: int,
    tokenizer: Tokenizer | None,
    corpus: Corpus | None,
) -> dict[str, Any]:
    """One document as a JSON object, each position with all its candidates."""
    if not 0 <= document_id < len(reader):
        raise ConfigError(
            "no such document",
            where="--document",
            expected=f"0 to {len(reader) - 1}",
            found=document_id,
        )
    document = reader[document_id]
    tokens = None if corpus is None else corpus[document_id].tokens
    if tokens is not None and (document.positions >= len(tokens) - 1).any():
        raise StoreError(
            "positions lie beyond the corpus",
            where=f"document {document_id}",
            expected=f"positions below {len(tokens) - 1}",
            found=int(document.positions[-1]),
        )

    def name(token: int) -> dict[str, Any]:
        return {"id": token} | ({} if tokenizer is None else {"text": tokenizer.decode([token])})

    positions = []
    for i, position in enumerate(document.positions.tolist()):
        chosen = slice(int(document.offsets[i]), int(document.offsets[i + 1]))
        candidates = [name(token) for token in document.ids[chosen].tolist()]
        if document.logits is not None:
            for candidate, logit in zip(candidates, document.logits[chosen].tolist(), strict=True):
                candidate["logit"] = logit
        row = {
            "position": position,
            "coverage": 1 - float(document.tail_mass[i]),
            "lse": float(document.lse[i]),
            "gold_logprob": float(document.gold_logprob[i]),
            "candidates": candidates,
        }
        if tokens is not None:
            gold = int(tokens[position + 1])
            row |= {"token": name(int(tokens[position])), "gold": name(gold)}
            row["gold_in_set"] = gold in document.ids[chosen]
        positions.append(row)
    return {"document": document_id, "positions": positions}


def _token_text(token: dict[str, Any]) -> str:
    text = f"{token['id']} {token['text']!r}" if "text" in token else str(token["id"])
    return f"{text} ({token['logit']:.2f})" if "logit" in token else text


def document_text(view: dict[str, Any], show_candidates: int) -> str:
    """``describe_document``'s object for a reader at a terminal."""
    lines = [f"document {view['document']}: {len(view['positions'])} positions"]
    for row in view["positions"]:
        line = f"position {row['position']}"
        if "gold" in row:
            line += f": {_token_text(row['token'])} -> {_token_text(row['gold'])}"
            line += "" if row["gold_in_set"] else ", NOT IN THE SET"
        candidates = row["candidates"]
        lines.append(
            f"{line}; |S| {len(candidates)}, coverage {row['coverage']:.4f}, "
            f"lse {row['lse']:.3f}, gold log-probability {row['gold_logprob']:.3f}"
        )
        # Likeliest first where the logits tell, otherwise as stored: by id.
        shown = sorted(candidates, key=lambda c: -c["logit"] if "logit" in c else 0)
        shown_text = [_token_text(candidate) for candidate in shown[:show_candidates]]
        if len(shown) > show_candidates:
            shown_text.append(f"and {len(shown) - show_candidates} more")
        lines.append("    " + ", ".join(shown_text))
    return "\n".join(lines)


def _open_tokenizer(path: str | None, reader: CandidateReader) -> Tokenizer | None:
    if path is None:
        return None
    from megatron_replay.data.tokenizer import load_tokenizer  # transformers: seconds to import

    tokenizer = load_tokenizer(path)
    reader.require(tokenizer_fingerprint=tokenizer.fingerprint)
    return tokenizer


def _open_corpus(prefix: str | None, reader: CandidateReader) -> Corpus | None:
    if prefix is None:
        return None
    from megatron_replay.data.corpus import Corpus

    corpus = Corpus(prefix)
    reader.require(corpus_fingerprint=corpus.fingerprint)
    return corpus


def run(options: argparse.Namespace) -> str:
    """What the command prints."""
    _require_options(options)
    reader = CandidateReader(options.store)
    if options.verify:
        reader.verify()
        print(f"{options.store}: every byte as written", file=sys.stderr)
    if options.document is None:
        summary = summarize(reader)
        return json.dumps(summary, indent=2) if options.json else summary_text(summary)
    tokenizer = _open_tokenizer(options.tokenizer, reader)
    corpus = _open_corpus(options.data_path, reader)
    view = describe_document(reader, options.document, tokenizer, corpus)
    return (
        json.dumps(view, indent=2) if options.json else document_text(view, options.show_candidates)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    try:
        print(run(_parser().parse_args(arguments)), flush=True)
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
