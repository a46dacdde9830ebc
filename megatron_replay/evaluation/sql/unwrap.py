"""Finds the query in an answer that has more than a query."""

from __future__ import annotations

import re

_FENCE = re.compile(r"```(?:sql(?:ite)?\b|\w*\n)?(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_LABEL = re.compile(r"sql\s*:", re.IGNORECASE)


def unwrapped(answer: str) -> str:
    """The query of a chat model's answer.

    That is what the first code fence holds; without a fence, what follows "SQL:" at the start, up
    to a blank line; otherwise the whole answer. A thought that ends in ``</think>`` is left out.
    """
    text = answer.rpartition("</think>")[2].strip()
    if fence := _FENCE.search(text):
        return fence[1].strip()
    if label := _LABEL.match(text):
        return text[label.end() :].strip().split("\n\n")[0]
    return text
