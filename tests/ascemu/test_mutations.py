"""The emulator and the comparison with float64 see every bug that is put into the kernels."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.ascemu import cases
from tests.ascemu.compiled import QUICK, CompileError
from tests.ascemu.mutants import DIFFERS, MUTANTS

MANY = [3, 0, 11, 0, 0, 60, 201, 2]
FEW = [3, 0, 11, 0, 0, 20, 2]
#: Together they reach every branch: rows with a tail, in two parts, and of as many channels as fit;
#: tokens without pairs; more pairs than a window holds; cores with and without work.
CASES = [
    (MANY, 129, torch.float32, 1),
    (MANY, 129, torch.float16, 5),
    (FEW, 2560, torch.bfloat16, 5),
    (FEW, 4360, torch.float32, 5),
]
PASSES = "passes"


def judge(operators) -> str:
    """What is found out about a module: a finding, wrong numbers, or nothing."""
    for sizes, channels, dtype, blocks in CASES:
        case = cases.make(sizes, 211, channels).to(dtype)
        try:
            found = cases.run(case, blocks, operators)
        except RuntimeError as finding:
            return str(finding)
        for one, reference in zip(found, cases.expected(case), strict=True):
            if not cases.error(one, reference) <= 1e-6:
                return DIFFERS
    return PASSES


@pytest.fixture(scope="module")
def modules(compiler):
    """A module of each mutant, or what the compiler says: two at a time."""

    def compiled(number: int):
        mutant, name = MUTANTS[number], f"mutant{number}"
        folder = compiler.folder / name
        folder.mkdir()
        source = folder / mutant.file.name
        source.write_text(mutant.source(), "utf-8")
        kernel = mutant.kernel if mutant.header else source
        try:
            changed = compiler.kernel(kernel, name=name, first=folder, level=QUICK)
        except CompileError as error:
            return str(error)
        return compiler.module(f"{name}.so", {mutant.kernel: changed})

    with ThreadPoolExecutor(2) as pool:
        loaded = pool.map(compiled, range(len(MUTANTS)))
        return dict(zip((mutant.name for mutant in MUTANTS), loaded, strict=True))


def test_without_a_bug_nothing_is_found(operators):
    assert judge(operators) == PASSES


def test_there_are_enough_bugs():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 20


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_bug_is_caught(modules, mutant):
    result = modules[mutant.name]
    found = result if isinstance(result, str) else judge(result)
    assert re.search(mutant.caught, found), found
    if found != DIFFERS and not isinstance(result, str):
        named = rf"ascemu: {mutant.kernel.stem.removesuffix('_kernel')}_\w+, core \d+ of \d+, \w+"
        assert re.match(named, found), found
