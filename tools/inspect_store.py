"""Show what a candidate store holds; verify it, merge stores.

    python tools/inspect_store.py STORE
    python tools/inspect_store.py STORE --document 3 --tokenizer MODEL_DIR --data-path corpus
    python tools/inspect_store.py STORE --verify --data-path corpus
    python tools/inspect_store.py merge OUT STORE STORE ...

The first command prints sizes of the candidate sets, coverage and missed labels. --document shows
the candidates of each position: as text with --tokenizer, likeliest first where the store has
logits (otherwise by id), and with the labels of --data-path, since a store holds no text. For a
store that is named merge, write ./merge.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megatron_replay.cli import exit_code_of
from megatron_replay.errors import ConfigError, StoreError
from megatron_replay.flags import Parser
from megatron_replay.progress import Progress
from megatron_replay.store import CandidateReader
from megatron_replay.store.merge import merge_parts
from megatron_replay.store.summary import Tally, summary, summary_text, tally
from megatron_replay.store.verify import verify

if TYPE_CHECKING:
    from megatron_replay.data.corpus import Corpus
    from megatron_replay.data.tokenizer import Tokenizer

#: Candidates of a position that the text shows; JSON has all.
_SHOWN = 8

_MERGE = """Merge the parts of one store.

Parts come from Stage 0, run with the same settings in several places (--shards). Shards that
several parts have must be equal. Rerun the same command to continue an interrupted merge.
"""


def _parser(command: str) -> argparse.ArgumentParser:
    is_merge = command == "merge"
    parser = Parser(
        prog=f"inspect_store.py {command}".strip(),
        description=_MERGE if is_merge else __doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    if is_merge:
        add("out", type=Path, metavar="OUT", help="directory to write")
        add("stores", type=Path, metavar="IN", nargs="+", help="candidate stores, in order")
    else:
        add("store", type=Path, metavar="STORE", help="a finished candidate store")
        add("--document", type=int, metavar="N", help="show this document")
        add("--tokenizer", metavar="PATH", help="with --document: show tokens as text")
        add("--data-path", metavar="PREFIX", help="with --document: show labels; with --verify: "
            "check that positions carry loss and that labels are in their sets")  # fmt: skip
        add("--verify", action="store_true", help="first check every byte, crc32 and bound")
        add("--json", action="store_true", help="print JSON, with all candidates")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
        help="threads that read shards (default: %(default)s, the cores)")  # fmt: skip
    return parser


def _require_options(options: argparse.Namespace) -> None:
    if options.tokenizer is not None and options.document is None:
        raise ConfigError("shows nothing without a document", where="--tokenizer",
                          fix="Add --document")  # fmt: skip
    if options.data_path is not None and options.document is None and not options.verify:
        raise ConfigError("requires --document or --verify", where="--data-path")


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
    """Print that the store is sound, or each damaged shard; raises the last one's error."""
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
        + (", every position carries loss, every label in its set" if corpus is not None else "")
        + f": {size / 1e9:.3g} GB in {reader.description.num_shards} shards, "
        f"{size / 1e9 / max(seconds, 1e-9):.2f} GB/s",
        file=sys.stderr,
    )


def _tally(reader: CandidateReader, workers: int) -> Tally:
    shards = range(reader.description.num_shards)
    counted = tally(reader, [])
    with (
        Progress("read", len(reader), "documents") as progress,
        ThreadPoolExecutor(workers) as pool,
    ):
        for part in pool.map(lambda shard: tally(reader, [shard]), shards):
            counted += part
            progress.advance(part.documents)
    return counted


def _show(options: argparse.Namespace) -> str:
    _require_options(options)
    reader = CandidateReader(options.store)
    # Before a verification, which may take an hour.
    corpus = _open_corpus(options.data_path, reader)
    tokenizer = _open_tokenizer(options.tokenizer, reader)
    if options.verify:
        _verify(reader, corpus, options.workers)
    if options.document is not None:
        view = describe_document(reader, options.document, tokenizer, corpus)
        return json.dumps(view, indent=2) if options.json else document_text(view)
    counted = _tally(reader, options.workers)
    content = summary(reader.description, counted)
    return json.dumps(content, indent=2) if options.json else summary_text(content)


def probabilities(logits_S: npt.NDArray[np.float32], tail_mass: float) -> npt.NDArray[np.float64]:
    """The base model's probabilities of the candidates of a position, from their stored logits.

    ``p_j = exp(z_j - lse)``, computed as ``(1 - tail_mass) exp(z_j) / sum_S exp(z)``: the same
    number, but rounding of logits and lse cancels: the p_j add up to the coverage.
    """
    weights_S: npt.NDArray[np.float64] = np.exp(logits_S.astype(np.float64) - logits_S.max())
    weights_S *= (1 - tail_mass) / weights_S.sum()
    return weights_S


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
            logits_S = document.logits[chosen]
            probability_S = probabilities(logits_S, float(document.tail_mass[i]))
            for candidate, logit, probability in zip(
                candidates, logits_S.tolist(), probability_S.tolist(), strict=True
            ):
                candidate |= {"logit": logit, "probability": probability}
        row = {
            "position": position,
            "coverage": 1 - float(document.tail_mass[i]),
            "lse": float(document.lse[i]),
            "label_logprob": float(document.label_logprob[i]),
            # Rounding lifts some a little above 1; a damaged one must not overflow.
            "label_probability": math.exp(min(float(document.label_logprob[i]), 0.0)),
            "candidates": candidates,
        }
        if tokens is not None:
            label = int(tokens[position + 1])
            row |= {"token": name(int(tokens[position])), "label": name(label)}
            row["label_in_set"] = label in document.ids[chosen]
        positions.append(row)
    return {"document": document_id, "positions": positions}


def document_text(view: dict[str, Any]) -> str:
    """``describe_document``'s object for a reader at a terminal."""
    lines = [f"document {view['document']}: {len(view['positions'])} positions"]
    for row in view["positions"]:
        line = f"position {row['position']}"
        if "label" in row:
            line += f": {_token_text(row['token'])} -> {_token_text(row['label'])}"
            line += "" if row["label_in_set"] else ", NOT IN THE SET"
        candidates = row["candidates"]
        lines.append(
            f"{line}; label {_percent(row['label_probability'])}, |S| {len(candidates)}, "
            f"coverage {_percent(row['coverage'])}, lse {row['lse']:.3f}"
        )
        # Likeliest first where there are logits, otherwise as stored: by id.
        shown = sorted(candidates, key=lambda c: -c.get("probability", 0))
        shown_text = [_token_text(candidate) for candidate in shown[:_SHOWN]]
        if len(shown) > _SHOWN:
            shown_text.append(f"and {len(shown) - _SHOWN} more")
        lines.append("    " + ", ".join(shown_text))
    return "\n".join(lines)


def _token_text(token: dict[str, Any]) -> str:
    text = f"{token['id']} {token['text']!r}" if "text" in token else str(token["id"])
    return f"{text} ({_percent(token['probability'])})" if "probability" in token else text


def _percent(probability: float) -> str:
    """Three significant digits, and never a 0 for what is not: 12.3 %, 0.0456 %, 1.2e-05 %."""
    return f"{100 * probability:.3g} %"


def _merge(options: argparse.Namespace) -> str:
    merged = merge_parts(options.stores, options.out, workers=options.workers)
    return f"{options.out}: {merged.num_documents:,} documents in {merged.num_shards:,} shards"


def run(arguments: Sequence[str]) -> str:
    """What the command prints."""
    command = "merge" if list(arguments[:1]) == ["merge"] else ""
    options = _parser(command).parse_args(arguments[1:] if command else arguments)
    if options.workers < 1:
        raise ConfigError("too few", where="--workers", expected="1 or more", found=options.workers)
    return _merge(options) if command else _show(options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return exit_code_of(lambda: run(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
