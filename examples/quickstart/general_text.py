"""General English text that every Python installation already holds: the reference in pydoc."""

from __future__ import annotations

import random
from pydoc_data import topics

from megatron_replay.errors import ConfigError

#: Characters of a piece, about 130 tokens: more would be cut where perplexity is measured.
CHARACTERS = 500


def general_texts(count: int) -> list[str]:
    """``count`` pieces of whole paragraphs, drawn from all topics; about 800 with CPython 3.11.

    Raises:
        ConfigError: there are fewer.
    """
    pieces = []
    for topic in topics.topics.values():
        piece = ""
        for paragraph in topic.split("\n\n"):
            piece += f"{paragraph}\n\n"
            if len(piece) >= CHARACTERS:
                pieces.append(piece.strip())
                piece = ""
    if count > len(pieces):
        raise ConfigError(
            "Python's reference has less general text", expected=f"{len(pieces)}", found=count
        )
    return random.Random(0).sample(pieces, count)
