// Sums of a repeat: of each of its eight blocks, or of all of it, as binary trees of neighbours; and
// the maximum of all of it.
#ifndef ASCEMU_REDUCTIONS_H
#define ASCEMU_REDUCTIONS_H

#include "vectors.h"

namespace AscendC {

enum class ReduceOrder { ORDER_VALUE_INDEX, ORDER_INDEX_VALUE, ORDER_ONLY_VALUE, ORDER_ONLY_INDEX };

template <typename T>
constexpr int kBlockLanes = static_cast<int>(ascemu::kBlock / sizeof(T));

inline void CheckRepeat(std::int32_t repeats, std::int32_t mask, int lanes) {
    ascemu::require(repeats >= 0 && repeats <= 255,
                    "repeatTime " + std::to_string(repeats) + " outside 0 to 255");
    ascemu::require(mask >= 1 && mask <= lanes,
                    "mask " + std::to_string(mask) + " outside 1 to " + std::to_string(lanes));
}

template <typename T>
T TreeSum(std::vector<T> values) {
    while (values.size() > 1) {
        if (values.size() % 2) values.push_back(T(0));
        for (std::size_t i = 0; i < values.size() / 2; ++i)
            values[i] = static_cast<T>(values[2 * i] + values[2 * i + 1]);
        values.resize(values.size() / 2);
    }
    return values[0];
}

// The lanes of block `block` of a repeat that the mask leaves in.
template <typename T>
void ReadBlock(const ascemu::Instruction& by, const LocalTensor<T>& from, std::int64_t start,
               int lanes, std::vector<T>& values) {
    by.reads(from.bytes(start, lanes), lanes * sizeof(T));
    for (int i = 0; i < lanes; ++i) values.push_back(from.value(start + i));
}

// Strides in blocks, that of the target in the eight sums of a repeat.
template <typename T>
void BlockReduceSum(const LocalTensor<T>& to, const LocalTensor<T>& from, std::int32_t repeats,
                    std::int32_t mask, std::int32_t to_stride, std::int32_t from_block_stride,
                    std::int32_t from_stride) {
    static_assert(kFloat<T>, "BlockReduceSum takes half and float: Cast first");
    constexpr int lanes = kBlockLanes<T>;
    const ascemu::Instruction by("BlockReduceSum", PIPE_V);
    CheckRepeat(repeats, mask, 8 * lanes);
    to.aligned(8 * sizeof(T));
    from.aligned(ascemu::kBlock);
    for (std::int64_t r = 0; r < repeats; ++r)
        for (int b = 0; b * lanes < mask; ++b) {
            std::vector<T> values;
            ReadBlock(by, from, (r * from_stride + b * from_block_stride) * lanes,
                      std::min(lanes, mask - b * lanes), values);
            const std::int64_t target = r * to_stride * 8 + b;
            by.writes(to.bytes(target, 1), sizeof(T));
            to.value(target) = TreeSum(std::move(values));
        }
}

// Strides in blocks, that of the target in elements.
template <typename T, typename Reduce>
void WholeReduce(const char* call, const LocalTensor<T>& to, const LocalTensor<T>& from,
                 std::int32_t mask, std::int32_t repeats, std::int32_t to_stride,
                 std::int32_t from_block_stride, std::int32_t from_stride, Reduce reduce) {
    static_assert(kFloat<T>, "a 910B reduces half and float: Cast first");
    constexpr int lanes = kBlockLanes<T>;
    const ascemu::Instruction by(call, PIPE_V);
    CheckRepeat(repeats, mask, 8 * lanes);
    to.aligned(sizeof(T));
    from.aligned(ascemu::kBlock);
    for (std::int64_t r = 0; r < repeats; ++r) {
        std::vector<T> values;
        for (int b = 0; b * lanes < mask; ++b)
            ReadBlock(by, from, (r * from_stride + b * from_block_stride) * lanes,
                      std::min(lanes, mask - b * lanes), values);
        by.writes(to.bytes(r * to_stride, 1), sizeof(T));
        to.value(r * to_stride) = reduce(std::move(values));
    }
}

template <typename T>
void WholeReduceSum(const LocalTensor<T>& to, const LocalTensor<T>& from, std::int32_t mask,
                    std::int32_t repeats, std::int32_t to_stride, std::int32_t from_block_stride,
                    std::int32_t from_stride) {
    WholeReduce("WholeReduceSum", to, from, mask, repeats, to_stride, from_block_stride,
                from_stride, TreeSum<T>);
}

template <typename T>
void WholeReduceMax(const LocalTensor<T>& to, const LocalTensor<T>& from, std::int32_t mask,
                    std::int32_t repeats, std::int32_t to_stride, std::int32_t from_block_stride,
                    std::int32_t from_stride,
                    ReduceOrder order = ReduceOrder::ORDER_VALUE_INDEX) {
    WholeReduce("WholeReduceMax", to, from, mask, repeats, to_stride, from_block_stride,
                from_stride, [&](const std::vector<T>& values) {
                    ascemu::require(order == ReduceOrder::ORDER_ONLY_VALUE,
                                    "only ORDER_ONLY_VALUE is emulated");
                    return *std::max_element(values.begin(), values.end());
                });
}

}  // namespace AscendC

#endif
