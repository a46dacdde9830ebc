// SIMD in the compiler's vectors, which every level lowers to the instructions it has: 16 lanes of
// fp32, one register of AVX-512, two of AVX2, four of SSE or NEON.
#pragma once

#include <cstdint>
#include <cstring>

#include "levels.h"

// How vectors would be passed differs between levels; here all is inlined, and none is.
#pragma GCC diagnostic ignored "-Wpsabi"

constexpr int kLanes = 16;

typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef float Quarter __attribute__((vector_size(kLanes)));

using bf16 = std::uint16_t;

INLINE float widened(float x) { return x; }
INLINE float widened(bf16 x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

// From memory of any alignment.
INLINE Lanes load(const float* from) {
    Lanes lanes;
    std::memcpy(&lanes, from, sizeof lanes);
    return lanes;
}
INLINE Lanes load(const bf16* from) {
    typedef std::uint16_t Halves __attribute__((vector_size(2 * kLanes)));
    typedef std::uint32_t Words __attribute__((vector_size(4 * kLanes)));
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    const Words words = __builtin_convertvector(halves, Words) << 16;
    Lanes lanes;
    std::memcpy(&lanes, &words, sizeof lanes);
    return lanes;
}
INLINE void store(float* to, const Lanes& lanes) { std::memcpy(to, &lanes, sizeof lanes); }

// Four lanes whose sum is the sum of all.
INLINE Quarter folded(const Lanes& lanes) {
    typedef float Half __attribute__((vector_size(2 * kLanes)));
    Half low, high;
    std::memcpy(&low, &lanes, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&lanes) + sizeof low, sizeof high);
    low += high;
    Quarter first, second;
    std::memcpy(&first, &low, sizeof first);
    std::memcpy(&second, reinterpret_cast<const char*>(&low) + sizeof first, sizeof second);
    return first + second;
}

// Lanes i, j, k and l of a's and then b's.
template <int i, int j, int k, int l>
INLINE Quarter chosen(const Quarter& a, const Quarter& b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, i, j, k, l);
#else
    typedef std::int32_t Places __attribute__((vector_size(sizeof(Quarter))));
    return __builtin_shuffle(a, b, Places{i, j, k, l});
#endif
}

// sums[i] += the sum of quarters[i], for i < 4.
INLINE void add_sums(float* sums, const Quarter* quarters) {
    // Each step halves what is left of a vector and puts two vectors into one.
    const Quarter a = chosen<0, 4, 1, 5>(quarters[0], quarters[1]) +
                      chosen<2, 6, 3, 7>(quarters[0], quarters[1]);
    const Quarter b = chosen<0, 4, 1, 5>(quarters[2], quarters[3]) +
                      chosen<2, 6, 3, 7>(quarters[2], quarters[3]);
    Quarter total;
    std::memcpy(&total, sums, sizeof total);
    total += chosen<0, 1, 4, 5>(a, b) + chosen<2, 3, 6, 7>(a, b);
    std::memcpy(sums, &total, sizeof total);
}

// exp(x) for x <= 0, 0 where that is below the normal numbers; NaN for NaN. Without branches.
//
// With n = round(x / ln 2) and r = x - n ln 2, in [-0.347, 0.347]: 2^n (1 + r + r^2 P(r)), P the
// Taylor series to r^7, which leaves off 6e-9. ln 2 is taken off in two parts, of which n times the
// first is exact.
INLINE float exp_of_nonpositive(float x) {
    constexpr float lowest = -87.3365402f;  // ln of the smallest normal number
    constexpr float round = 12582912.0f;    // 1.5 * 2^23: adding it rounds to a whole number
    const float clamped = x < lowest ? lowest : x;
    const float shifted = clamped * 1.44269502f + round;
    const float n = shifted - round;
    float r = clamped - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float series = 1.98412698e-4f;
    series = series * r + 1.38888889e-3f;
    series = series * r + 8.33333333e-3f;
    series = series * r + 4.16666667e-2f;
    series = series * r + 1.66666667e-1f;
    series = series * r + 0.5f;
    const float value = series * (r * r) + r + 1.0f;
    std::uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3f800000u;  // n is in the low bits of the shifted number
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return x < lowest ? 0.0f : value * power;
}
