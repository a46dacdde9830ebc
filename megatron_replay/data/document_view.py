"""One document of a candidate store, for a person: tokens as text, candidates by probability."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megatron_replay.errors import ConfigError, StoreError
from megatron_replay.store import CandidateReader, DocumentCandidates

if TYPE_CHECKING:
    from megatron_replay.data.corpus import Corpus
    from megatron_replay.data.tokenizer import Tokenizer


def probabilities(document: DocumentCandidates, i: int) -> npt.NDArray[np.float64] | None:
    """The base model's probabilities of the candidates of the i-th position, from stored logits.

    ``p_j = exp(z_j - lse)``, computed as ``(1 - tail_mass) exp(z_j) / sum_S exp(z)``: the same
    number, but it forgives that logits and lse were rounded: the p_j add up to the coverage.
    """
    if document.logits is None:
        return None
    logits_S = document.logits[document.offsets[i] : document.offsets[i + 1]].astype(np.float64)
    weights_S: npt.NDArray[np.float64] = np.exp(logits_S - logits_S.max())
    weights_S *= (1 - float(document.tail_mass[i])) / weights_S.sum()
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
        probability_S = probabilities(document, i)
        if document.logits is not None and probability_S is not None:
            numbers = zip(document.logits[chosen].tolist(), probability_S.tolist(), strict=True)
            for candidate, (logit, probability) in zip(candidates, numbers, strict=True):
                candidate |= {"logit": logit, "probability": probability}
        row = {
            "position": position,
            "coverage": 1 - float(document.tail_mass[i]),
            "lse": float(document.lse[i]),
            "gold_logprob": float(document.gold_logprob[i]),
            # Rounding lifts some a little above 1; a damaged one must not overflow.
            "gold_probability": math.exp(min(float(document.gold_logprob[i]), 0.0)),
            "candidates": candidates,
        }
        if tokens is not None:
            gold = int(tokens[position + 1])
            row |= {"token": name(int(tokens[position])), "gold": name(gold)}
            row["gold_in_set"] = gold in document.ids[chosen]
        positions.append(row)
    return {"document": document_id, "positions": positions}


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
            f"{line}; gold {_percent(row['gold_probability'])}, |S| {len(candidates)}, "
            f"coverage {_percent(row['coverage'])}, lse {row['lse']:.3f}"
        )
        # Likeliest first where the logits tell, otherwise as stored: by id.
        shown = sorted(candidates, key=lambda c: -c.get("probability", 0))
        shown_text = [_token_text(candidate) for candidate in shown[:show_candidates]]
        if len(shown) > show_candidates:
            shown_text.append(f"and {len(shown) - show_candidates} more")
        lines.append("    " + ", ".join(shown_text))
    return "\n".join(lines)


def _token_text(token: dict[str, Any]) -> str:
    text = f"{token['id']} {token['text']!r}" if "text" in token else str(token["id"])
    return f"{text} ({_percent(token['probability'])})" if "probability" in token else text


def _percent(probability: float) -> str:
    """Three significant digits, and never a 0 for what is not: 12.3 %, 0.0456 %, 1.2e-05 %."""
    return f"{100 * probability:.3g} %"
