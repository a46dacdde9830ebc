// atan2(y, x) for x >= 0, without branches, so that loops over it become SIMD.
//
// With q = min(|y|, x) / max(|y|, x) in [0, 1] the angle is atan(q), or pi/2 - atan(q) above the
// diagonal. atan(q) = q + q s P(s), s = q^2; fit_arctangent.py makes P, which alone is off by
// 1.7e-8, 0.28 ulp.
//
// Largest error against float64's atan2, in spacings of fp32 at the exact value, measured once over
// all of these (tests/kernels/test_arctangent.py tries every 97th q):
//                                    with FMA    without
//     every fp32 q in [0, 1]: (q, 1)     1.12       1.31
//                             (1, q)     1.34       1.51
//     84 million pairs of any sizes      1.72       1.72     (1.76 in another draw)
// Zeros, denormals, a NaN, and one infinity give what C's atan2 gives; two infinities give NaN,
// for a comparison and a selection less.
#pragma once

#include <cmath>

#include "levels.h"

INLINE float atan2_of_nonnegative(float y, float x) {
    const float a = std::fabs(y);
    const bool steep = a > x;
    const float larger = steep ? a : x;
    const float smaller = steep ? x : a;
    // So that 0 / 0 is 0. Asked in this way, for a NaN must stay one.
    constexpr float least = 1e-45f;
    const float q = smaller / (larger < least ? least : larger);
    const float s = q * q;
    float series = 0.002920692236f;
    series = series * s - 0.01636792865f;
    series = series * s + 0.04321186309f;
    series = series * s - 0.07552214603f;
    series = series * s + 0.1066600486f;
    series = series * s - 0.1421105538f;
    series = series * s + 0.1999377285f;
    series = series * s - 0.3333315274f;
    const float flat = series * s * q + q;
    // pi/2 as the sum of two floats: one alone is off by 0.37 ulp.
    constexpr float half_pi = 1.57079637f, half_pi_rest = -4.37113883e-8f;
    const float angle = steep ? (half_pi - flat) + half_pi_rest : flat;
    return std::copysign(angle, y);
}
