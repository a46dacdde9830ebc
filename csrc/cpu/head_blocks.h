// The restricted head's inner loops, over one block of 128 channels: eight registers of AVX-512.
//
// A block of the positions' hidden states, or of the candidates' rows, is packed: contiguous and
// fp32. So it stays in the L2 cache, where rows a power of two apart would evict each other; and a
// row's part stays in registers while all its pairs pass.
#pragma once

#include <algorithm>

#include "lanes.h"

constexpr int kVectors = 8;
constexpr int kBlock = kVectors * kLanes;

// The loads of rows to come are begun this many rows ahead.
constexpr std::int64_t kAhead = 6;

struct Registers {
    Lanes v[kVectors];
};

template <class T>
INLINE Registers load_block(const T* from) {
    Registers r;
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) r.v[i] = load(from + kLanes * i);
    return r;
}

// Of a last block that has fewer channels: the others are 0.
template <class T>
INLINE Registers load_block(const T* from, int width) {
    if (width == kBlock) return load_block(from);
    float padded[kBlock] = {};
    for (int i = 0; i < width; ++i) padded[i] = widened(from[i]);
    return load_block(padded);
}

INLINE void store_block(float* to, const Registers& r) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) store(to + kLanes * i, r.v[i]);
}

INLINE void add_block(float* to, const Registers& r, int width) {
    if (width == kBlock) {
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i) store(to + kLanes * i, load(to + kLanes * i) + r.v[i]);
        return;
    }
    float padded[kBlock];
    store_block(padded, r);
    for (int i = 0; i < width; ++i) to[i] += padded[i];
}

INLINE void store_block(float* to, const Registers& r, int width) {
    if (width == kBlock) return store_block(to, r);
    float padded[kBlock];
    store_block(padded, r);
    std::copy(padded, padded + width, to);
}

template <bool writing, class T>
INLINE void prefetch_block(const T* from) {
    for (int i = 0; i < kBlock; i += 64 / static_cast<int>(sizeof(T)))
        __builtin_prefetch(from + i, writing, 2);
}

// sum over pairs of coefficient * packed[index].
INLINE Registers weighted_sum(const float* packed, const std::int32_t* indices,
                              const float* coefficients, std::int64_t pairs) {
    Registers sum{};
    for (std::int64_t k = 0; k < pairs; ++k) {
        const float* const from = packed + static_cast<std::int64_t>(indices[k]) * kBlock;
        const float c = coefficients[k];
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i) sum.v[i] += c * load(from + kLanes * i);
    }
    return sum;
}

// Products of packed vectors with registers, summed over the block and added to consecutive floats,
// in fours.
class Sums {
  public:
    INLINE explicit Sums(float* to) : to_(to) {}
    INLINE void add(const Registers& a, const float* b) {
        Lanes even = a.v[0] * load(b), odd = a.v[1] * load(b + kLanes);
#pragma GCC unroll 8
        for (int i = 2; i < kVectors; i += 2) {
            even += a.v[i] * load(b + kLanes * i);
            odd += a.v[i + 1] * load(b + kLanes * (i + 1));
        }
        store(lanes_ + kLanes * waiting_, even + odd);
        if (++waiting_ < 4) return;
        add_sums_of_4(to_, lanes_);
        to_ += 4;
        waiting_ = 0;
    }
    INLINE void finish() {
        float sums[4] = {};
        std::fill(lanes_ + kLanes * waiting_, lanes_ + 4 * kLanes, 0.0f);
        add_sums_of_4(sums, lanes_);
        for (int i = 0; i < waiting_; ++i) to_[i] += sums[i];
    }

  private:
    float* to_;
    int waiting_ = 0;
    alignas(64) float lanes_[4 * kLanes];
};
