"""Show what a candidate store holds: sizes, candidate sets, coverage; or one document of it.

    python tools/inspect_store.py STORE
    python tools/inspect_store.py STORE --document 3 --tokenizer MODEL_DIR --data-path corpus

The tokens of a document need ``--tokenizer``; its gold tokens need ``--data-path`` too, since the
store itself keeps no text. Which golds were appended to their sets is not stored: a set larger than
the cap is the only one that tells.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_replay.errors import EXIT_INTERRUPTED, ConfigError, ReplayError, StoreError
from megatron_replay.progress import Progress
from megatron_replay.store import CandidateReader, DocumentCandidates

if TYPE_CHECKING:
    from megatron_replay.data.corpus import Corpus
    from megatron_replay.data.tokenizer import Tokenizer

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
HISTOGRAM_ROWS = 13  # 256 sizes in rows of 20
BAR_WIDTH = 40


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


class _Tally:
    """What a pass over the documents adds up."""

    def __init__(self) -> None:
        self.positions_of_size = np.zeros(257, np.int64)
        self.documents_with_positions = 0
        self._tail_masses: list[np.ndarray] = []
        self._gold_logprobs: list[np.ndarray] = []

    def add(self, document: DocumentCandidates) -> None:
        self.positions_of_size += np.bincount(np.diff(document.offsets), minlength=257)
        self.documents_with_positions += len(document.positions) > 0
        self._tail_masses.append(document.tail_mass)
        self._gold_logprobs.append(document.gold_logprob)

    @property
    def num_positions(self) -> int:
        return int(self.positions_of_size.sum())

    def set_sizes(self) -> dict[str, Any]:
        """Mean, extremes, exact quantiles and histogram of the sizes of the sets."""
        counts, sizes = self.positions_of_size, np.arange(257)
        present = np.flatnonzero(counts)
        below = np.cumsum(counts) / self.num_positions
        width = -(-256 // HISTOGRAM_ROWS)
        return {
            "mean": float(counts @ sizes / self.num_positions),
            "median": int(np.searchsorted(below, 0.5)),
            "min": int(present[0]),
            "max": int(present[-1]),
            "quantiles": {f"{q:g}": int(np.searchsorted(below, q)) for q in QUANTILES},
            "histogram": [
                {
                    "from": low,
                    "to": min(low + width - 1, 256),
                    "positions": int(counts[low : low + width].sum()),
                }
                for low in range(1, int(present[-1]) + 1, width)
            ],
        }

    def coverage(self) -> dict[str, Any]:
        """Mass of the base model inside the sets."""
        inside_P = 1 - np.concatenate(self._tail_masses).astype(np.float64)
        return {
            "mean": float(inside_P.mean()),
            "min": float(inside_P.min()),
            "quantiles": {f"{q:g}": float(np.quantile(inside_P, q)) for q in QUANTILES},
        }

    def cap(self, max_candidates: object) -> dict[str, Any] | None:
        """Shares of positions at the cap and above it, when the store tells the cap."""
        if type(max_candidates) is not int or max_candidates < 1:
            return None
        counts = self.positions_of_size
        return {
            "max_candidates": max_candidates,
            "share_at_or_above": float(counts[max_candidates:].sum() / self.num_positions),
            # One more than the cap: the set was cut there and its gold appended.
            "share_above": float(counts[max_candidates + 1 :].sum() / self.num_positions),
        }

    def mean_gold_logprob(self) -> float:
        return float(np.concatenate(self._gold_logprobs).mean(dtype=np.float64))


def summarise(reader: CandidateReader) -> dict[str, Any]:
    """Read every document and describe the store as a JSON object."""
    tally = _Tally()
    with Progress("read", len(reader), "documents") as progress:
        for document in reader:
            tally.add(document)
            progress.advance()
    sizes = tally.positions_of_size @ np.arange(257)
    bin_bytes = sum(path.stat().st_size for path in reader.directory.glob("shard-*.bin"))
    summary: dict[str, Any] = {
        "description": vars(reader.description),
        "documents": len(reader),
        "documents_with_positions": tally.documents_with_positions,
        "positions": tally.num_positions,
        "candidates": int(sizes),
        "bin_bytes": bin_bytes,
    }
    if tally.num_positions:
        summary |= {
            "bytes_per_position": bin_bytes / tally.num_positions,
            "set_size": tally.set_sizes(),
            "coverage": tally.coverage(),
            "cap": tally.cap(reader.description.selection.get("max_candidates")),
            "mean_gold_logprob": tally.mean_gold_logprob(),
        }
    return summary


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


def summary_text(summary: dict[str, Any]) -> str:
    """``summarise``'s object for a reader at a terminal."""
    lines = [f"{name}: {value}" for name, value in summary["description"].items()]
    lines += [
        f"documents: {summary['documents']}, {summary['documents_with_positions']} with positions",
        f"positions: {summary['positions']}",
        f"candidates: {summary['candidates']}",
    ]
    if not summary["positions"]:
        return "\n".join(lines)
    size, coverage, cap = summary["set_size"], summary["coverage"], summary["cap"]
    lines += [
        f"bytes per position: {summary['bytes_per_position']:.1f}",
        f"mean gold log-probability: {summary['mean_gold_logprob']:.4f}",
        f"coverage: mean {coverage['mean']:.4f}, least {coverage['min']:.4f}, "
        + ", ".join(f"{float(q):.0%} {v:.4f}" for q, v in coverage["quantiles"].items()),
        f"|S|: mean {size['mean']:.1f}, median {size['median']}, {size['min']} to {size['max']}, "
        + ", ".join(f"{float(q):.0%} {v}" for q, v in size["quantiles"].items()),
    ]
    if cap is None:
        lines.append("at the cap: the store does not tell max_candidates")
    else:
        lines.append(
            f"at the cap of {cap['max_candidates']}: {cap['share_at_or_above']:.2%} of positions, "
            f"of all positions {cap['share_above']:.2%} cut there with the gold appended"
        )
    most = max(row["positions"] for row in size["histogram"])
    for row in size["histogram"]:
        bar = "#" * -(-BAR_WIDTH * row["positions"] // most)  # upwards: one position is seen
        lines.append(f"{row['from']:5}-{row['to']:<3} {row['positions']:>10} {bar}".rstrip())
    return "\n".join(lines)


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
        summary = summarise(reader)
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
        print(run(_parser().parse_args(arguments)))
    except ReplayError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
