"""Make the coefficients of csrc/cpu/atan2.h: python csrc/cpu/fit_arctangent.py [TERMS]

On [0, 1]   atan(q) ~ q + q s P(s),   s = q^2,

where P is the polynomial whose largest relative error in atan(q) is smallest. Remez's exchange
finds it: solve for an error of equal size and alternating sign at TERMS + 1 points, move the points
to where the error is largest, repeat.
"""

from __future__ import annotations

import sys

import mpmath as mp

mp.mp.dps = 40
POINTS = 2000
ROUNDS = 10


def wanted(s: mp.mpf) -> mp.mpf:
    """(atan(q) - q) / q^3: what P approximates."""
    q = mp.sqrt(s)
    return (mp.atan(q) - q) / (q * s)


def weight(s: mp.mpf) -> mp.mpf:
    """Turns an error of P into a relative error of atan(q)."""
    q = mp.sqrt(s)
    return q * s / mp.atan(q)


def fit(terms: int) -> tuple[list[mp.mpf], mp.mpf]:
    """The coefficients, constant term first, and the largest relative error."""
    grid = [(1 - mp.cos(mp.pi * k / POINTS)) / 2 for k in range(1, POINTS + 1)]
    values, weights = [wanted(s) for s in grid], [weight(s) for s in grid]
    at = [POINTS * (k + 1) // (terms + 1) - 1 for k in range(terms + 1)]
    for _ in range(ROUNDS):
        rows = [
            [grid[j] ** k for k in range(terms)] + [(-1) ** i / weights[j]]
            for i, j in enumerate(at)
        ]
        solved = mp.lu_solve(mp.matrix(rows), mp.matrix([values[j] for j in at]))
        found = list(solved)[:terms]
        errors = [
            w * (mp.polyval(found[::-1], s) - f)
            for s, f, w in zip(grid, values, weights, strict=True)
        ]
        at = peaks(errors, terms + 1)
    return found, max(abs(e) for e in errors)


def peaks(errors: list[mp.mpf], count: int) -> list[int]:
    """Where each run of one sign is largest; ``count`` neighbours of them."""
    runs: list[list[int]] = [[0]]
    for j in range(1, len(errors)):
        if (errors[j] > 0) == (errors[j - 1] > 0):
            runs[-1].append(j)
        else:
            runs.append([j])
    found = [max(run, key=lambda j: abs(errors[j])) for run in runs]
    while len(found) > count:
        del found[0 if abs(errors[found[0]]) < abs(errors[found[-1]]) else -1]
    return found


if __name__ == "__main__":
    coefficients, error = fit(int(sys.argv[1]) if len(sys.argv) > 1 else 8)
    for c in coefficients:
        print(mp.nstr(c, 10))
    print("largest relative error", mp.nstr(error, 3))
