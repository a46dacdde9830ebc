"""The largest error of the compiled atan2, the numbers of csrc/cpu/atan2.h:

    python -m benchmarks.arctangent [LEVEL]        avx512, avx2 or base; minutes

Every fp32 q in [0, 1] as (q, 1) and as (1, q); then pairs of random bits, and of random ratios.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np

from megatron_replay.kernels import _cpu

ONE, INFINITY = 0x3F80_0000, 0x7F80_0000
CHUNK = 1 << 22
RANDOM_CHUNKS = 10
Pairs = tuple[np.ndarray, np.ndarray]


def ratios() -> Iterator[np.ndarray]:
    for start in range(0, ONE + 1, CHUNK):
        yield np.arange(start, min(start + CHUNK, ONE + 1), dtype=np.uint32).view(np.float32)


def of_random_bits(rng: np.random.Generator) -> Pairs:
    y, x = rng.integers(0, INFINITY, (2, CHUNK), dtype=np.uint32).view(np.float32)
    return y, x


def of_random_ratios(rng: np.random.Generator) -> Pairs:
    _, x = of_random_bits(rng)
    with np.errstate(over="ignore"):
        y = x * np.exp(3 * rng.standard_normal(CHUNK)).astype(np.float32)
    return np.minimum(y, np.finfo(np.float32).max), x


def ulps(y: np.ndarray, x: np.ndarray) -> float:
    """The largest error, in spacings of fp32 at the exact value."""
    found = np.empty_like(y)
    _cpu.arctangent(y.ctypes.data, x.ctypes.data, found.ctypes.data, y.size)
    exact = np.arctan2(y.astype(np.float64), x.astype(np.float64))
    return float(np.max(abs(found - exact) / np.spacing(exact.astype(np.float32))))


def main() -> None:
    if len(sys.argv) > 1:
        _cpu.use_level(sys.argv[1])
    rng = np.random.default_rng(0)
    print("level", _cpu.level())
    both = [(ulps(q, np.ones_like(q)), ulps(np.ones_like(q), q)) for q in ratios()]
    for name, worst in zip(("(q, 1)", "(1, q)"), zip(*both, strict=True), strict=True):
        print(f"every q, {name}   {max(worst):.2f} ulp")
    for pairs in (of_random_bits, of_random_ratios):
        worst = max(ulps(*pairs(rng)) for _ in range(RANDOM_CHUNKS))
        print(f"{pairs.__name__.replace('_', ' ')}   {worst:.2f} ulp")


if __name__ == "__main__":
    main()
