"""Bugs for the kernels, each one a substitution, and what must be said about it.

``DIFFERS`` where a device, too, would do what it is told, and only the numbers are wrong; otherwise
a pattern of the emulator's finding or of the compiler's message.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.ascemu.compiled import CSRC, GATHER_DOT, SEGMENT_AXPY

TILES = CSRC / "common" / "tiles.h"
WINDOW = CSRC / "common" / "window.h"
DIFFERS = "differs from float64"


@dataclass(frozen=True)
class Mutant:
    """``old`` stands once in ``file``; ``kernel`` is compiled with ``new`` in its place."""

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
        assert text.count(self.old) == 1, f"{self.name}: stands {text.count(self.old)} times"
        return text.replace(self.old, self.new)


def _lines(*parts: str) -> str:
    return "\n".join(parts) + "\n"


_WAIT = "        AscendC::WaitFlag<AscendC::HardEvent::{event}>({id});"
_SET = "        AscendC::SetFlag<AscendC::HardEvent::{event}>({id});"
_BARRIER = "AscendC::PipeBarrier<PIPE_V>();"

SYNCHRONISATION = [
    Mutant(
        "ids are read before they are there",
        GATHER_DOT,
        _lines(_SET.format(event="MTE2_S", id="moved"), _WAIT.format(event="MTE2_S", id="moved")),
        "        (void)moved;\n",
        "core 0 of 1, LocalTensor::GetValue: missing synchronisation: pipe S reads",
        WINDOW,
    ),
    Mutant(
        "ids are replaced while they are read",
        SEGMENT_AXPY,
        _lines(_SET.format(event="S_MTE2", id="read"), _WAIT.format(event="S_MTE2", id="read")),
        "        (void)read;\n",
        "missing synchronisation: pipe MTE2 writes .* which pipe S read",
        WINDOW,
    ),
    Mutant(
        "a wait without its flag",
        GATHER_DOT,
        _SET.format(event="MTE2_S", id="moved"),
        "",
        "WaitFlag: nothing sets the flag",
        WINDOW,
    ),
    Mutant(
        "a flag without its wait",
        SEGMENT_AXPY,
        _WAIT.format(event="S_MTE2", id="read"),
        "",
        "end: a flag was set and never waited for|missing synchronisation",
        WINDOW,
    ),
    Mutant(
        "a flag of the wrong pipes",
        GATHER_DOT,
        _lines(_SET.format(event="MTE2_S", id="moved"), _WAIT.format(event="MTE2_S", id="moved")),
        _lines(_SET.format(event="MTE2_V", id="moved"), _WAIT.format(event="MTE2_V", id="moved")),
        "missing synchronisation: pipe S reads",
        WINDOW,
    ),
    Mutant(
        "products are summed before they are there",
        GATHER_DOT,
        f"        }}\n        {_BARRIER}\n    }}\n\n    // Each row of products",
        "        }\n    }\n\n    // Each row of products",
        "BlockReduceSum: missing synchronisation: pipe V reads",
    ),
    Mutant(
        "sums are summed before they are there",
        GATHER_DOT,
        f"rows * stride_ / kLanes);\n        {_BARRIER}",
        "rows * stride_ / kLanes);",
        "BlockReduceSum: missing synchronisation: pipe V reads",
    ),
    Mutant(
        "z leaves before it is there",
        GATHER_DOT,
        "        z_queue_.EnQue(z);\n        z = z_queue_.DeQue<float>();\n",
        "",
        "DataCopyPad into global memory: missing synchronisation: pipe MTE3 reads",
    ),
    Mutant(
        "the tile is used before it is there",
        GATHER_DOT,
        "        LocalTensor<T> tile = weight_queue_.template DeQue<T>();",
        "        LocalTensor<T> tile = weight_queue_.template AllocTensor<T>();",
        "reads the unified buffer where nothing was written|missing synchronisation",
    ),
    Mutant(
        "main_grad is added to before it is there",
        SEGMENT_AXPY,
        "        found_queue_.EnQue(found);\n"
        "        found = found_queue_.template DeQue<float>();\n",
        "",
        "Adds: missing synchronisation: pipe V reads",
    ),
    Mutant(
        "the next row is added before the last is done",
        SEGMENT_AXPY,
        f"coefficients_.At(pair + r), count);\n            {_BARRIER}",
        "coefficients_.At(pair + r), count);",
        "Axpy: missing synchronisation: pipe V reads",
    ),
    Mutant(
        "rows are added before they are widened",
        SEGMENT_AXPY,
        f"from[r * width_], mode, count);\n        }}\n        {_BARRIER}",
        "from[r * width_], mode, count);\n        }",
        "segment_axpy_fp16, .* Axpy: missing synchronisation: pipe V reads",
    ),
    Mutant(
        "a row leaves before it is summed",
        SEGMENT_AXPY,
        "            sum_queue_.EnQue(sum);\n"
        "            sum = sum_queue_.template DeQue<float>();\n",
        "",
        "missing synchronisation: pipe MTE3 reads",
    ),
]

QUEUES = [
    Mutant(
        "a tile is not queued",
        GATHER_DOT,
        "        weight_queue_.EnQue(tile);\n",
        "",
        "DeQue: the queue is empty",
    ),
    Mutant(
        "a tile is not freed",
        GATHER_DOT,
        "        weight_queue_.FreeTensor(tile);\n",
        "",
        "AllocTensor: no buffer of the queue is free",
    ),
    Mutant(
        "a row is freed twice",
        GATHER_DOT,
        "            hidden_queue_.FreeTensor(row);\n",
        "            hidden_queue_.FreeTensor(row);\n            hidden_queue_.FreeTensor(row);\n",
        "FreeTensor: the tensor was freed already",
    ),
    Mutant(
        "a tensor goes to another queue",
        SEGMENT_AXPY,
        "        source_queue_.FreeTensor(tile);\n",
        "        found_queue_.FreeTensor(tile);\n",
        "FreeTensor: the tensor (was freed already|is not of this queue)",
    ),
    Mutant(
        "the last row is not freed",
        SEGMENT_AXPY,
        "            sum_queue_.FreeTensor(sum);\n",
        "            if (end < pairs_) sum_queue_.FreeTensor(sum);\n",
        "end: a tensor of a queue was never freed",
    ),
]

MEMORY = [
    Mutant(
        "more rows than fit",
        GATHER_DOT,
        "kBufferBytes = 190 * 1024;",
        "kBufferBytes = 256 * 1024;",
        "InitBuffer: .* bytes do not fit the unified buffer's 196608",
        TILES,
    ),
    Mutant(
        "half a window's buffer",
        SEGMENT_AXPY,
        "InitBuffer(buffer_, kBytes);",
        "InitBuffer(buffer_, kBytes / 2);",
        "elements 0 to .* of a tensor of 128 in the unified buffer",
        WINDOW,
    ),
    Mutant(
        "a window beyond the list",
        GATHER_DOT,
        "held_ = Min(kSize, size_ - start);",
        "held_ = kSize;",
        "elements 0 to 256 of a tensor of .* in global memory",
        WINDOW,
    ),
    Mutant(
        "one row too many in a tile",
        GATHER_DOT,
        "        for (uint32_t r = 0; r < rows; ++r) {\n",
        "        for (uint32_t r = 0; r <= rows; ++r) {\n",
        r"LocalTensor\[\]: offset|elements .* of a tensor of|reads .* where nothing was written",
    ),
    Mutant(
        "the row after the id's",
        GATHER_DOT,
        "weight_[id * channels_ + first]",
        "weight_[(id + 1) * channels_ + first]",
        "DataCopyPad into the unified buffer: elements 0 to .* in global memory",
    ),
    Mutant(
        "the rows of a tile stand unaligned",
        GATHER_DOT,
        "LoadRow(tile[r * width_], weight_",
        "LoadRow(tile[r * count], weight_",
        "an operand is not aligned to 32 bytes",
    ),
    Mutant(
        "parts of any width",
        SEGMENT_AXPY,
        "CeilDiv(channels, kMaxWidth)), 16);",
        "CeilDiv(channels, kMaxWidth)), 1);",
        "elements 0 to 136 of a tensor of 129|an operand is not aligned to 32 bytes",
        TILES,
    ),
    Mutant(
        "whole blocks where z has none",
        GATHER_DOT,
        "    AscendC::DataCopyPad(to, from, AscendC::DataCopyExtParams{1, bytes, 0, 0, 0});",
        "    AscendC::DataCopy(to, from, count + 0 * bytes);",
        "DataCopy into global memory: .* bytes are no multiple of 32",
        TILES,
    ),
    Mutant(
        "more blocks than a copy has",
        SEGMENT_AXPY,
        "AscendC::DataCopyExtParams{1, bytes, 0, 0, 0}",
        "AscendC::DataCopyExtParams{4096, bytes, 0, 0, 0}",
        "blockCount 4096 outside 1 to 4095",
        TILES,
    ),
    Mutant(
        "the tail is not filled up",
        GATHER_DOT,
        "zeros{true, 0, static_cast<uint8_t>(missing),",
        "zeros{false, 0, static_cast<uint8_t>(missing),",
        "reads the unified buffer where nothing was written",
        TILES,
    ),
    Mutant(
        "the tail is filled up by itself",
        GATHER_DOT,
        "zeros{true, 0, static_cast<uint8_t>(missing),",
        "zeros{true, 0, static_cast<uint8_t>(0 * missing),",
        "reads the unified buffer where nothing was written",
        TILES,
    ),
    Mutant(
        "lanes beyond the row hold anything",
        GATHER_DOT,
        "        if (lanes < stride_) {",
        "        if (false) {",
        "BlockReduceSum: reads the unified buffer where nothing was written",
    ),
    Mutant(
        "a row and a bit",
        SEGMENT_AXPY,
        "StoreRow(out, sum, count);",
        "StoreRow(out, sum, RoundUp(count, 8));",
        "touches bytes of out|global memory|reads the unified buffer where nothing",
    ),
    Mutant(
        "all repeats in one instruction",
        GATHER_DOT,
        "kMaxRepeats = 255;",
        "kMaxRepeats = 4096;",
        "BlockReduceSum: repeatTime 320 outside 0 to 255",
    ),
    Mutant(
        "the wrong stride between repeats",
        GATHER_DOT,
        "1, 1, lanes / 8);",
        "1, 1, lanes / 4);",
        "WholeReduceSum: elements|WholeReduceSum: reads|" + DIFFERS,
    ),
    Mutant(
        "bf16 is multiplied",
        GATHER_DOT,
        "        weight_queue_.FreeTensor(tile);\n",
        "        AscendC::Mul(tile, tile, tile, count);\n        weight_queue_.FreeTensor(tile);\n",
        "no vector arithmetic of this type: Cast first",
    ),
]

WORK = [
    Mutant(
        "shares overlap",
        GATHER_DOT,
        "const uint32_t stop = Min(pair + share, pairs_);",
        "const uint32_t stop = Min(pair + share + 1, pairs_);",
        "touches bytes of z at .* which DataCopyPad into global memory of core",
    ),
    Mutant(
        "the last pair is nobody's",
        GATHER_DOT,
        "const uint32_t stop = Min(pair + share, pairs_);",
        "const uint32_t stop = Min(pair + share, pairs_ - 1);",
        DIFFERS,
    ),
    Mutant(
        "the last token's hidden state",
        GATHER_DOT,
        "tokens without pairs\n                LoadHidden(token);\n",
        "tokens without pairs\n",
        DIFFERS,
    ),
    Mutant(
        "a token without pairs is not passed over",
        GATHER_DOT,
        "while (pair == token_stop);",
        "while (false);",
        "a count of 0|repeatTime|mask|blockLen 0",
    ),
    Mutant(
        "the second part replaces the first",
        GATHER_DOT,
        "            if (first == 0) {",
        "            if (first < channels_) {",
        DIFFERS,
    ),
    Mutant(
        "the first part's hidden channels for all",
        GATHER_DOT,
        "hidden = wide_hidden_.Get<float>()[first];",
        "hidden = wide_hidden_.Get<float>()[0 * first];",
        DIFFERS,
    ),
    Mutant(
        "a segment has two owners",
        SEGMENT_AXPY,
        "while (begin < stop) {",
        "while (begin < pairs_) {",
        "touches bytes of out",
    ),
    Mutant(
        "a segment that begins a share is nobody's",
        SEGMENT_AXPY,
        "static_cast<int32_t>(first) - 1)",
        "static_cast<int32_t>(first))",
        DIFFERS,
    ),
    Mutant(
        "a segment that ends a share is nobody's",
        SEGMENT_AXPY,
        "stop = Min(first + share, pairs_);",
        "stop = Min(first + share - 1, pairs_);",
        DIFFERS,
    ),
    Mutant(
        "one coefficient for all of a tile",
        SEGMENT_AXPY,
        "coefficients_.At(pair + r)",
        "coefficients_.At(pair + 0 * r)",
        DIFFERS,
    ),
    Mutant(
        "the list of rows is not read",
        SEGMENT_AXPY,
        "listed_ ? rows_.GetValue(segment) : segment",
        "segment",
        DIFFERS,
    ),
    Mutant(
        "main_grad is replaced",
        SEGMENT_AXPY,
        "        AscendC::Adds(sum, found, 0.0f, static_cast<int32_t>(count));",
        "        AscendC::Duplicate(sum, 0.0f, static_cast<int32_t>(count));",
        DIFFERS,
    ),
]

MUTANTS = SYNCHRONISATION + QUEUES + MEMORY + WORK
