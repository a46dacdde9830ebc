// atan2(y, x) for x >= 0, without branches, so that loops over it become SIMD.
//
// With q = min(|y|, x) / max(|y|, x) in [0, 1] the angle is atan(q), or pi/2 - atan(q) above the
// diagonal. atan(q) = q + q s P(s), s = q^2; fit_arctangent.py makes P, which alone is off by
// 1.7e-8, 0.28 ulp.
#pragma once

#include <cmath>

#include "levels.h"

INLINE float atan2_of_nonnegative(float y, float x) {
    const float a = std::fabs(y);
    const bool steep = a > x;
    const float larger = steep ? a : x;
    const float smaller = steep ? x : a;
    // 0/0 is 0 and inf/inf is 1, as in C's atan2; a NaN on either side is in larger or smaller.
    const float q = smaller == larger ? (larger > 0.0f ? 1.0f : 0.0f) : smaller / larger;
    const float s = q * q;
    float series = 0.002920693216f;
    series = series * s - 0.01636793205f;
    series = series * s + 0.0432118676f;
    series = series * s - 0.07552214878f;
    series = series * s + 0.1066600493f;
    series = series * s - 0.1421105538f;
    series = series * s + 0.1999377284f;
    series = series * s - 0.3333315274f;
    const float flat = series * s * q + q;
    // pi/2 as the sum of two floats: one alone is off by 0.37 ulp.
    constexpr float half_pi = 1.57079637f, half_pi_rest = -4.37113883e-8f;
    const float angle = steep ? (half_pi - flat) + half_pi_rest : flat;
    return std::copysign(angle, y);
}
