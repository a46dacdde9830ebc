// The restricted head's inner loops, over one block of channels, as many as a few registers hold.
//
// A block of many rows is packed: fp32, a row's part beside the next row's. So it stays in the L2
// cache, where parts of rows a power of two apart would evict each other.
#pragma once

#include <algorithm>

#include "lanes.h"

// Channels of a block; a last block may have fewer, the others are then 0.
template <int kVectors>
constexpr int kWidth = kVectors * kLanes;

template <int kVectors>
struct Registers {
    Lanes v[kVectors];
};

template <int kVectors, class T>
INLINE Registers<kVectors> load_block(const T* from) {
    Registers<kVectors> r;
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) r.v[i] = load(from + kLanes * i);
    return r;
}

template <int kVectors, class T>
INLINE Registers<kVectors> load_block(const T* from, int width) {
    if (width == kWidth<kVectors>) return load_block<kVectors>(from);
    float padded[kWidth<kVectors>] = {};
    for (int i = 0; i < width; ++i) padded[i] = widened(from[i]);
    return load_block<kVectors>(padded);
}

template <int kVectors>
INLINE void store_block(float* to, const Registers<kVectors>& r) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) store(to + kLanes * i, r.v[i]);
}

template <int kVectors>
INLINE void store_block(float* to, const Registers<kVectors>& r, int width) {
    if (width == kWidth<kVectors>) return store_block(to, r);
    float padded[kWidth<kVectors>];
    store_block(padded, r);
    std::copy(padded, padded + width, to);
}

template <int kVectors>
INLINE void add_block(float* to, const Registers<kVectors>& r, int width) {
    if (width == kWidth<kVectors>) {
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i) store(to + kLanes * i, load(to + kLanes * i) + r.v[i]);
        return;
    }
    float padded[kWidth<kVectors>];
    store_block(padded, r);
    for (int i = 0; i < width; ++i) to[i] += padded[i];
}

// Begins to load a block, of a row that comes kAhead rows later: 64 cache lines of fp32.
template <int kVectors>
constexpr int kAhead = 64 / kVectors;

template <int kVectors, bool writing, class T>
INLINE void prefetch_block(const T* from) {
    constexpr int line = 64 / static_cast<int>(sizeof(T));
    for (int i = 0; i < kWidth<kVectors>; i += line) __builtin_prefetch(from + i, writing, 2);
}

// sum over pairs of coefficient * packed[index].
template <int kVectors>
INLINE Registers<kVectors> weighted_sum(const float* packed, const std::int32_t* indices,
                                        const float* coefficients, std::int64_t pairs) {
    Registers<kVectors> sum{};
    for (std::int64_t k = 0; k < pairs; ++k) {
        const std::int64_t index = indices[k];
        const float* const from = packed + index * kWidth<kVectors>;
        const float c = coefficients[k];
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i) sum.v[i] += c * load(from + kLanes * i);
    }
    return sum;
}

// sums[j] += sum over indices of coefficient * packed[index], for j < kSums; coefficients are
// [., kSums].
template <int kVectors, int kSums>
INLINE void add_weighted_sums(float* const* sums, const float* packed, const std::int32_t* indices,
                              std::int64_t size, const float* coefficients) {
    Registers<kVectors> sum[kSums];
#pragma GCC unroll 4
    for (int j = 0; j < kSums; ++j) sum[j] = load_block<kVectors>(sums[j]);
    for (std::int64_t k = 0; k < size; ++k) {
        const std::int64_t index = indices[k];
        const auto from = load_block<kVectors>(packed + index * kWidth<kVectors>);
#pragma GCC unroll 4
        for (int j = 0; j < kSums; ++j) {
            const float c = coefficients[k * kSums + j];
#pragma GCC unroll 8
            for (int i = 0; i < kVectors; ++i) sum[j].v[i] += c * from.v[i];
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < kSums; ++j) store_block(sums[j], sum[j]);
}

// Dot products over a block, added to consecutive floats, four at a time.
class DotProducts {
  public:
    INLINE explicit DotProducts(float* to) : to_(to) {}

    template <int kVectors>
    INLINE void add(const Registers<kVectors>& a, const float* b) {
        static_assert(kVectors % 2 == 0);
        Lanes even = a.v[0] * load(b), odd = a.v[1] * load(b + kLanes);
#pragma GCC unroll 8
        for (int i = 2; i < kVectors; i += 2) {
            even += a.v[i] * load(b + kLanes * i);
            odd += a.v[i + 1] * load(b + kLanes * (i + 1));
        }
        waiting_[count_] = folded(even + odd);
        if (++count_ < 4) return;
        add_sums(to_, waiting_);
        to_ += 4;
        count_ = 0;
    }

    INLINE void finish() {
        float sums[4] = {};
        for (int i = count_; i < 4; ++i) waiting_[i] = Quarter{};
        add_sums(sums, waiting_);
        for (int i = 0; i < count_; ++i) to_[i] += sums[i];
    }

  private:
    float* to_;
    int count_ = 0;
    Quarter waiting_[4];
};
