// Vector instructions on a count of elements.
#ifndef ASCEMU_VECTORS_H
#define ASCEMU_VECTORS_H

#include <cmath>
#include <functional>
#include <limits>

#include "tensors.h"

namespace AscendC {

enum class RoundMode { CAST_NONE, CAST_RINT, CAST_ROUND };

template <typename T>
constexpr bool kFloat = std::is_same_v<T, float> || std::is_same_v<T, half>;
template <typename T>
constexpr bool kArithmetic =
    kFloat<T> || std::is_same_v<T, std::int16_t> || std::is_same_v<T, std::int32_t>;

template <typename T>
const std::uint8_t* Source(const ascemu::Instruction& by, const LocalTensor<T>& from,
                           std::int64_t count) {
    ascemu::require(count > 0, "a count of " + std::to_string(count));
    from.aligned(ascemu::kBlock);
    const std::uint8_t* data = from.bytes(0, count);
    by.reads(data, count * sizeof(T));
    return data;
}

// Where results go; a source may be the same elements, but none that begin elsewhere among them.
template <typename T>
void Target(const ascemu::Instruction& by, const LocalTensor<T>& to, std::int64_t count,
            std::initializer_list<const std::uint8_t*> sources) {
    ascemu::require(count > 0, "a count of " + std::to_string(count));
    to.aligned(ascemu::kBlock);
    const std::uint8_t* data = to.bytes(0, count);
    for (const std::uint8_t* source : sources)
        ascemu::require(source <= data || source >= data + count * sizeof(T),
                        "the target overlaps a source that begins elsewhere");
    by.writes(data, count * sizeof(T));
}

template <typename T, typename Result>
void Elementwise(const char* call, const LocalTensor<T>& to, const LocalTensor<T>& a,
                 const LocalTensor<T>& b, std::int32_t count, Result result) {
    static_assert(kArithmetic<T>, "a 910B has no vector arithmetic of this type: Cast first");
    const ascemu::Instruction by(call, PIPE_V);
    const std::uint8_t* first = Source(by, a, count);
    const std::uint8_t* second = Source(by, b, count);
    Target(by, to, count, {first, second});
    for (std::int32_t i = 0; i < count; ++i)
        to.value(i) = static_cast<T>(result(a.value(i), b.value(i)));
}

template <typename T>
void Add(const LocalTensor<T>& to, const LocalTensor<T>& a, const LocalTensor<T>& b,
         const std::int32_t& count) {
    Elementwise("Add", to, a, b, count, std::plus<>());
}

template <typename T>
void Sub(const LocalTensor<T>& to, const LocalTensor<T>& a, const LocalTensor<T>& b,
         const std::int32_t& count) {
    Elementwise("Sub", to, a, b, count, std::minus<>());
}

template <typename T>
void Mul(const LocalTensor<T>& to, const LocalTensor<T>& a, const LocalTensor<T>& b,
         const std::int32_t& count) {
    Elementwise("Mul", to, a, b, count, std::multiplies<>());
}

template <typename T>
void Adds(const LocalTensor<T>& to, const LocalTensor<T>& a, const T& scalar,
          const std::int32_t& count) {
    Elementwise("Adds", to, a, a, count, [&](const auto& x, const auto&) { return x + scalar; });
}

template <typename T>
void Muls(const LocalTensor<T>& to, const LocalTensor<T>& a, const T& scalar,
          const std::int32_t& count) {
    Elementwise("Muls", to, a, a, count, [&](const auto& x, const auto&) { return x * scalar; });
}

// What becomes of NaN is not documented; here it is dropped.
template <typename T>
void Maxs(const LocalTensor<T>& to, const LocalTensor<T>& a, const T& scalar,
          const std::int32_t& count) {
    Elementwise("Maxs", to, a, a, count,
                [&](const auto& x, const auto&) { return x > scalar ? x : scalar; });
}

template <typename T>
void Duplicate(const LocalTensor<T>& to, const T& scalar, const std::int32_t& count) {
    const ascemu::Instruction by("Duplicate", PIPE_V);
    Target(by, to, count, {});
    for (std::int32_t i = 0; i < count; ++i) to.value(i) = scalar;
}

// to += scalar * from. Whether a device rounds the product is not documented; here it does.
template <typename T>
void Axpy(const LocalTensor<T>& to, const LocalTensor<T>& from, const T& scalar,
          const std::int32_t& count) {
    static_assert(kFloat<T>, "Axpy takes half and float: Cast first");
    const ascemu::Instruction by("Axpy", PIPE_V);
    const std::uint8_t* source = Source(by, from, count);
    Source(by, to, count);
    Target(by, to, count, {source});
    for (std::int32_t i = 0; i < count; ++i) {
        const T product = static_cast<T>(from.value(i) * scalar);
        to.value(i) = static_cast<T>(to.value(i) + product);
    }
}

// Rounded to nearest, halves to even; what an integer cannot hold becomes the nearest it can.
template <typename T>
T Rounded(float value) {
    const float whole = std::nearbyint(value);
    if constexpr (std::is_same_v<T, float>) return whole;
    if (whole != whole) return 0;
    if (whole >= 0x1p31f) return std::numeric_limits<T>::max();
    return whole < -0x1p31f ? std::numeric_limits<T>::min() : static_cast<T>(whole);
}

template <typename T, typename U>
void Cast(const LocalTensor<T>& to, const LocalTensor<U>& from, const RoundMode& mode,
          const std::uint32_t& count) {
    constexpr bool widens =
        std::is_same_v<T, float> && (std::is_same_v<U, half> || std::is_same_v<U, bfloat16_t>);
    constexpr bool rounds = std::is_same_v<U, float> &&
                            (std::is_same_v<T, float> || std::is_same_v<T, std::int32_t>);
    static_assert(widens || rounds,
                  "of the Casts only those from a 16-bit float to float, and from float to an "
                  "integer in float or int32_t, are emulated");
    const ascemu::Instruction by("Cast", PIPE_V);
    ascemu::require(mode == (widens ? RoundMode::CAST_NONE : RoundMode::CAST_RINT),
                    widens ? "a Cast that widens takes CAST_NONE" : "only CAST_RINT is emulated");
    const std::uint8_t* source = Source(by, from, count);
    Target(by, to, count, {source});
    for (std::uint32_t i = 0; i < count; ++i) {
        if constexpr (widens) to.value(i) = static_cast<float>(from.value(i));
        else to.value(i) = Rounded<T>(from.value(i));
    }
}

}  // namespace AscendC

#endif
