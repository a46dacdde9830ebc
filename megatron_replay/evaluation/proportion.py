"""How sure a share of correct answers is."""

from __future__ import annotations

import math


def standard_error(correct: int, total: int) -> float:
    """``√(p(1-p)/n)`` of ``correct / total``, with p shrunk as Agresti and Coull (1998) do.

    ``p = (correct + 2)/(total + 4)``, n = total + 4: the plain formula claims an error of zero for
    0 of n.
    """
    n = total + 4
    p = (correct + 2) / n
    return math.sqrt(p * (1 - p) / n)
