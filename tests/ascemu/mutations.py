"""Bugs put into the kernels: the emulator, or the comparison of results, must find each of them.

Not part of the suite, because it tests the emulator and takes a minute: run ``make mutation`` after
a change of tests/ascemu or csrc/ascend.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron_replay.kernels.ascend_head import PairOperators
from tests.ascemu import cases
from tests.ascemu.compiled import (
    CSRC,
    GATHER_DOT,
    QUICK,
    SEGMENT_AXPY,
    SELECT_CANDIDATES,
    CompileError,
)

TILES = CSRC / "common" / "tiles.h"
WINDOW = CSRC / "common" / "window.h"
#: The finding where a device would also run the code as written, with wrong numbers.
DIFFERS = "differs from the expected result"


@dataclass(frozen=True)
class Mutant:
    """A kernel compiled with ``new`` in place of ``old``, which occurs once in the file.

    Attributes:
        caught: pattern of the emulator's finding, or of the compiler's message.
        header: the changed file, where it is not the kernel's own.
    """

    name: str
    kernel: Path
    old: str
    new: str
    caught: str
    header: Path | None = None

    @property
    def file(self) -> Path:
        return self.header or self.kernel

    def source(self) -> str:
        text = self.file.read_text("utf-8")
        assert text.count(self.old) == 1, f"{self.name}: occurs {text.count(self.old)} times"
        return text.replace(self.old, self.new)


# fmt: off
MUTANTS = [
    Mutant("ids are read before they have arrived", GATHER_DOT,
        "        AscendC::SetFlag<AscendC::HardEvent::MTE2_S>(moved);\n"
        "        AscendC::WaitFlag<AscendC::HardEvent::MTE2_S>(moved);\n",
        "        (void)moved;\n",
        "core 0 of 1, LocalTensor::GetValue: missing synchronisation: pipe S reads", WINDOW),
    Mutant("ids are replaced while they are read", SEGMENT_AXPY,
        "        AscendC::SetFlag<AscendC::HardEvent::S_MTE2>(read);\n"
        "        AscendC::WaitFlag<AscendC::HardEvent::S_MTE2>(read);\n",
        "        (void)read;\n",
        "missing synchronisation: pipe MTE2 writes .* which pipe S read", WINDOW),
    Mutant("a wait without its flag", GATHER_DOT,
        "        AscendC::SetFlag<AscendC::HardEvent::MTE2_S>(moved);", "",
        "WaitFlag: nothing sets the flag", WINDOW),
    Mutant("a flag without its wait", SEGMENT_AXPY,
        "        AscendC::WaitFlag<AscendC::HardEvent::S_MTE2>(read);", "",
        "end: a flag was set and never waited for|missing synchronisation", WINDOW),
    Mutant("products are summed before they are computed", GATHER_DOT,
        "        }\n        AscendC::PipeBarrier<PIPE_V>();\n    }\n\n    // Each row of products",
        "        }\n    }\n\n    // Each row of products",
        "BlockReduceSum: missing synchronisation: pipe V reads"),
    Mutant("z is copied out before it is computed", GATHER_DOT,
        "        z_queue_.EnQue(z);\n        z = z_queue_.DeQue<float>();\n", "",
        "DataCopyPad into global memory: missing synchronisation: pipe MTE3 reads"),
    Mutant("main_grad is added to before it has arrived", SEGMENT_AXPY,
        "        found_queue_.EnQue(found);\n"
        "        found = found_queue_.template DeQue<float>();\n", "",
        "Adds: missing synchronisation: pipe V reads"),
    Mutant("a tile is not queued", GATHER_DOT, "        weight_queue_.EnQue(tile);\n", "",
        "DeQue: the queue is empty"),
    Mutant("a tile is not freed", GATHER_DOT, "        weight_queue_.FreeTensor(tile);\n", "",
        "AllocTensor: no buffer of the queue is free"),
    Mutant("a row is freed twice", GATHER_DOT, "            hidden_queue_.FreeTensor(row);\n",
        "            hidden_queue_.FreeTensor(row);\n"
        "            hidden_queue_.FreeTensor(row);\n",
        "FreeTensor: the tensor was freed already"),
    Mutant("a tensor goes to another queue", SEGMENT_AXPY,
        "        source_queue_.FreeTensor(tile);\n", "        found_queue_.FreeTensor(tile);\n",
        "FreeTensor: the tensor (was freed already|is not of this queue)"),
    Mutant("the last sum is not freed", SEGMENT_AXPY, "            sum_queue_.FreeTensor(sum);\n",
        "            if (end < pairs_) sum_queue_.FreeTensor(sum);\n",
        "end: a tensor of a queue was never freed"),
    Mutant("more rows than fit", GATHER_DOT, "kBufferBytes = 190 * 1024;",
        "kBufferBytes = 256 * 1024;",
        "InitBuffer: .* bytes do not fit the unified buffer's 196608", TILES),
    Mutant("half a window's buffer", SEGMENT_AXPY, "InitBuffer(buffer_, kBytes);",
        "InitBuffer(buffer_, kBytes / 2);",
        "elements 0 to .* of a tensor of 128 in the unified buffer", WINDOW),
    Mutant("a window reaches beyond the list", GATHER_DOT, "held_ = Min(kSize, size_ - start);",
        "held_ = kSize;", "elements 0 to 256 of a tensor of .* in global memory", WINDOW),
    Mutant("the wrong row is read", GATHER_DOT, "weight_[id * channels_ + first]",
        "weight_[(id + 1) * channels_ + first]",
        "DataCopyPad into the unified buffer: elements 0 to .* in global memory"),
    Mutant("the rows of a tile stand unaligned", GATHER_DOT, "LoadRow(tile[r * width_], weight_",
        "LoadRow(tile[r * count], weight_", "an operand is not aligned to 32 bytes"),
    Mutant("a copy of whole blocks, where z has a tail", GATHER_DOT,
        "    AscendC::DataCopyPad(to, from, AscendC::DataCopyExtParams{1, bytes, 0, 0, 0});",
        "    AscendC::DataCopy(to, from, count + 0 * bytes);",
        "DataCopy into global memory: .* bytes are no multiple of 32", TILES),
    Mutant("more blocks than a copy has", SEGMENT_AXPY,
        "AscendC::DataCopyExtParams{1, bytes, 0, 0, 0}",
        "AscendC::DataCopyExtParams{4096, bytes, 0, 0, 0}", "blockCount 4096 outside 1 to 4095",
        TILES),
    Mutant("the tail is not filled up", GATHER_DOT, "zeros{true, 0, static_cast<uint8_t>(missing),",
        "zeros{false, 0, static_cast<uint8_t>(missing),",
        "reads the unified buffer where nothing was written", TILES),
    Mutant("more than a row is written", SEGMENT_AXPY, "StoreRow(out, sum, count);",
        "StoreRow(out, sum, RoundUp(count, 8));",
        "touches bytes of out|global memory|reads the unified buffer where nothing"),
    Mutant("all repeats in one instruction", GATHER_DOT, "kMaxRepeats = 255;",
        "kMaxRepeats = 4096;", "BlockReduceSum: repeatTime 320 outside 0 to 255"),
    Mutant("bf16 is multiplied", GATHER_DOT, "        weight_queue_.FreeTensor(tile);\n",
        "        AscendC::Mul(tile, tile, tile, count);\n"
        "        weight_queue_.FreeTensor(tile);\n",
        "no vector arithmetic of this type: Cast first"),
    Mutant("shares overlap", GATHER_DOT, "const uint32_t stop = Min(pair + share, pairs_);",
        "const uint32_t stop = Min(pair + share + 1, pairs_);",
        "touches bytes of z at .* which DataCopyPad into global memory of core"),
    Mutant("the last pair is left out", GATHER_DOT,
        "const uint32_t stop = Min(pair + share, pairs_);",
        "const uint32_t stop = Min(pair + share, pairs_ - 1);", DIFFERS),
    Mutant("the second part replaces the first", GATHER_DOT, "            if (first == 0) {",
        "            if (first < channels_) {", DIFFERS),
    Mutant("a segment has two owners", SEGMENT_AXPY, "while (begin < stop) {",
        "while (begin < pairs_) {", "touches bytes of out"),
    Mutant("the list of rows is not read", SEGMENT_AXPY,
        "listed_ ? rows_.GetValue(segment) : segment", "segment", DIFFERS),
    Mutant("main_grad is replaced", SEGMENT_AXPY,
        "        AscendC::Adds(sum, found, 0.0f, static_cast<int32_t>(count));",
        "        AscendC::Duplicate(sum, 0.0f, static_cast<int32_t>(count));", DIFFERS),
    Mutant("a mass is added up before it is computed", SELECT_CANDIDATES,
        "        AscendC::Add(bits, bits, k.ReinterpretCast<int32_t>(), n);\n        Sync();\n",
        "        AscendC::Add(bits, bits, k.ReinterpretCast<int32_t>(), n);\n",
        "Cast: missing synchronisation: pipe V reads"),
    Mutant("maxima are taken before logits are widened", SELECT_CANDIDATES,
        "RoundMode::CAST_NONE, count);\n            Sync();\n", "RoundMode::CAST_NONE, count);\n",
        "WholeReduceMax: missing synchronisation: pipe V reads"),
    Mutant("maxima are stored before they are computed", SELECT_CANDIDATES,
        "        maxima_queue_.EnQue(maxima);\n"
        "        maxima = maxima_queue_.template DeQue<float>();\n", "",
        "DataCopyPad into global memory: missing synchronisation: pipe MTE3 reads"),
    Mutant("a tile of twice the ids", SELECT_CANDIDATES, "kTile = 4096;", "kTile = 8192;",
        "InitBuffer: .* bytes do not fit the unified buffer's 196608"),
    Mutant("a short block is taken for a whole one", SELECT_CANDIDATES,
        "count / kIds, rest = count % kIds;", "CeilDiv(count, kIds), rest = 0;", DIFFERS),
    Mutant("value and index of a maximum", SELECT_CANDIDATES, "ORDER_ONLY_VALUE",
        "ORDER_VALUE_INDEX", "only ORDER_ONLY_VALUE is emulated"),
    Mutant("rows of maxima overlap", SELECT_CANDIDATES, "kMaximaStep = 16;", "kMaximaStep = 1;",
        DIFFERS),
    Mutant("sums of a row are added to those of the one before", SELECT_CANDIDATES,
        "            AscendC::Duplicate(low_sums_",
        "            if (row == 0) AscendC::Duplicate(low_sums_", DIFFERS),
    Mutant("low parts are left out of the last sum", SELECT_CANDIDATES,
        "AscendC::Add(sums[held], low, low[held], n);", "AscendC::Add(sums[held], low, low, n);",
        DIFFERS),
    Mutant("differences have no lower bound", SELECT_CANDIDATES,
        "        AscendC::Maxs(f, f, kLowest, n);\n", "", DIFFERS),
    Mutant("a mass is rounded up at a half", SELECT_CANDIDATES, "rint = RoundMode::CAST_RINT",
        "rint = RoundMode::CAST_ROUND", "only CAST_RINT is emulated"),
    Mutant("a mass is rounded before it is split", SELECT_CANDIDATES,
        "        AscendC::Muls(low, low, kUnit, n);\n",
        "        AscendC::Muls(low, low, 0.0f, n);\n", DIFFERS),
]
# fmt: on

#: Together they reach every branch: rows with a tail, in two parts, and of as many channels as fit;
#: tokens without pairs; more pairs than a window holds; cores with and without work.
CASES = [
    ([3, 0, 11, 0, 0, 60, 201, 2], 129, torch.float32, 1),
    ([3, 0, 11, 0, 0, 60, 201, 2], 129, torch.float16, 5),
    ([3, 0, 11, 0, 0, 20, 2], 2560, torch.bfloat16, 5),
    ([3, 0, 11, 0, 0, 20, 2], 4360, torch.float32, 5),
]


#: Ids, dtypes and cores: a tile and a block that are short; cores with several rows, and with none.
SELECTED = [(4096 + 65, torch.float32, 1), (5000, torch.bfloat16, 5), (70, torch.float16, 3)]


def judge(operators) -> str:
    """The first finding about a module; "" where there is none."""
    generator = torch.Generator().manual_seed(0)
    try:
        for sizes, channels, dtype, blocks in CASES:
            case = cases.make(sizes, 211, channels).to(dtype)
            pairs = PairOperators(cases.on_cores(operators, blocks))
            cases.require_right(cases.run(case, pairs), case)
        for ids, dtype, blocks in SELECTED:
            logits_TV = (6 * torch.randn(4, ids, generator=generator)).to(dtype)
            logits_TV[1, : ids // 2] = -torch.inf
            logits_TV[2, 0] = -300
            cases.require_same_selection(logits_TV, cases.on_cores(operators, blocks))
    except RuntimeError as finding:
        return str(finding)
    except AssertionError:
        return DIFFERS
    return ""


@pytest.fixture(scope="module")
def modules(compiler):
    """The module of each mutant, or the compiler's message; compiles two at a time."""
    compiler.precompile(QUICK)

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
        return list(pool.map(compiled, range(len(MUTANTS))))


def test_nothing_is_found_in_the_kernels_as_they_are(operators):
    assert judge(operators) == ""


@pytest.mark.parametrize("number", range(len(MUTANTS)), ids=[mutant.name for mutant in MUTANTS])
def test_a_bug_is_found(modules, number):
    mutant, result = MUTANTS[number], modules[number]
    found = result if isinstance(result, str) else judge(result)
    assert re.search(mutant.caught, found), found
    if found != DIFFERS and not isinstance(result, str):
        named = rf"ascemu: {mutant.kernel.stem.removesuffix('_kernel')}_\w+, core \d+ of \d+, \w+"
        assert re.match(named, found), found
