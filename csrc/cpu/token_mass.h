// Keys and masses of tokens: megatron_replay/selection/shard_selection.py, bit for bit.
//
// A mass is bits that torch computes by one operation after the other: nothing may be contracted,
// so a file that includes this begins with gcc's pragma; clang's follows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "levels.h"

#if defined(__clang__)
#pragma clang fp contract(off)
#endif

constexpr std::int64_t kMaxVocabSize = 1 << 24;

template <class To, class From>
INLINE To bits(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

// Signed integers that sort as the floats, both zeros as 0; and back.
INLINE std::int32_t ordered(float x) {
    const std::int32_t b = bits<std::int32_t>(x + 0.0f);
    return b ^ ((b >> 31) & 0x7fffffff);
}

INLINE float value_of(std::int32_t x) {
    return bits<float>(x ^ ((x >> 31) & 0x7fffffff));
}

// shard_selection.py, before rounding to units.
INLINE float mass(float x, float max) {
    constexpr float shift = 0x1.8p23f + 38;  // rounds to an integer, and adds 38 to it
    // Differences are negative or +0, so that their bits sort backwards: the smaller are above.
    const float d = bits<float>(std::min(bits<std::uint32_t>(x - max), 0xc1e00000u));  // -28
    const float t = d * 0x1.715476p+0f;
    const float k = t + shift;
    const float f = t - (k - shift);
    const float square = f * f;
    const float upper = f * 0x1.5bb9fcp-10f + 0x1.3cea9ep-7f;
    const float middle = f * 0x1.c6b754p-5f + 0x1.ebf9bcp-3f;
    const float p = (upper * square + middle) * square + (f * 0x1.62e42ap-1f + 1.0f);
    // k's last bits are those of the integer; an exponent is 23 bits up.
    return bits<float>(bits<std::uint32_t>(p) + (bits<std::uint32_t>(k) << 23));
}
