// How rows of global memory are cut to fit the unified buffer, and how they are moved.
#ifndef REPLAY_ASCEND_TILES_H
#define REPLAY_ASCEND_TILES_H

#include "kernel_operator.h"

namespace replay {

// What moves and vector instructions count in; a place in the unified buffer is a multiple of it.
constexpr uint32_t kBlockBytes = 32;
// Of the 192 KiB of a vector core 2 are left to the runtime.
constexpr uint32_t kBufferBytes = 190 * 1024;
// A longer row is split evenly: 4096 fp32 products are what two BlockReduceSum bring to the 64
// lanes of one WholeReduceSum.
constexpr uint32_t kMaxWidth = 4096;
// Rows of a tile: at 2560 channels of two bytes they fill the buffer, at 40 KB a move.
constexpr uint32_t kMaxRows = 8;

__aicore__ inline uint32_t Min(uint32_t a, uint32_t b) { return a < b ? a : b; }

__aicore__ inline uint32_t CeilDiv(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

__aicore__ inline uint32_t RoundUp(uint32_t a, uint32_t b) { return CeilDiv(a, b) * b; }

// Channels processed at a time: all of them, or near-equal parts. A multiple of 16, so that every
// part and every row of a tile starts on a block, in two bytes as in four.
__aicore__ inline uint32_t WidthOf(uint32_t channels) {
    return RoundUp(CeilDiv(channels, CeilDiv(channels, kMaxWidth)), 16);
}

// Rows of a tile, where each needs `each` bytes beside the `fixed` ones.
__aicore__ inline uint32_t RowsOf(uint32_t fixed, uint32_t each) {
    return Min(kMaxRows, (kBufferBytes - fixed) / each);
}

// The first of `size` ascending values that exceeds `value`; `size` if none does. Each step is a
// scalar read of global memory.
__aicore__ inline uint32_t UpperBound(const AscendC::GlobalTensor<int32_t>& values,
                                           uint32_t size, int32_t value) {
    uint32_t low = 0, high = size;
    while (low < high) {
        const uint32_t middle = low + (high - low) / 2;
        if (values.GetValue(middle) > value) high = middle;
        else low = middle + 1;
    }
    return low;
}

// Global memory may be of any alignment. What the last block lacks is filled with zeros: left to
// itself DataCopyPad repeats the first element there.
template <typename T>
__aicore__ inline void LoadRow(const AscendC::LocalTensor<T>& to,
                               const AscendC::GlobalTensor<T>& from, uint32_t count) {
    const uint32_t bytes = count * sizeof(T);
    const uint32_t missing = (RoundUp(bytes, kBlockBytes) - bytes) / sizeof(T);
    const AscendC::DataCopyExtParams copy{1, bytes, 0, 0, 0};
    const AscendC::DataCopyPadExtParams<T> zeros{true, 0, static_cast<uint8_t>(missing),
                                                 static_cast<T>(0)};
    AscendC::DataCopyPad(to, from, copy, zeros);
}

// Exactly `count` elements are written, so that another core's neighbours stay as they are.
template <typename T>
__aicore__ inline void StoreRow(const AscendC::GlobalTensor<T>& to,
                                const AscendC::LocalTensor<T>& from, uint32_t count) {
    const uint32_t bytes = count * sizeof(T);
    AscendC::DataCopyPad(to, from, AscendC::DataCopyExtParams{1, bytes, 0, 0, 0});
}

}  // namespace replay

#endif
