// Plain loops that the compiler turns into SIMD: each is bound by memory, but for the arctangent on
// a single core. What was tried to make them faster is in docs/log.md.
#include "momentum_step.h"

#include <array>
#include <cstring>

#include "atan2.h"
#include "chunks.h"
#include "levels.h"

namespace {

INLINE std::array<double, 3> dot_body(const float* m, const float* g, std::int64_t size) {
    std::array<double, 3> total{};
    for (std::int64_t start = 0; start < size; start += kBlock) {
        const std::int64_t stop = std::min(start + kBlock, size);
        float mg = 0, mm = 0, gg = 0;
#pragma omp simd reduction(+ : mg, mm, gg)
        for (std::int64_t i = start; i < stop; ++i) {
            mg += m[i] * g[i];
            mm += m[i] * m[i];
            gg += g[i] * g[i];
        }
        total[0] += mg;
        total[1] += mm;
        total[2] += gg;
    }
    return total;
}

INLINE double square_body(const float* g, std::int64_t size) {
    double total = 0;
    for (std::int64_t start = 0; start < size; start += kBlock) {
        const std::int64_t stop = std::min(start + kBlock, size);
        float gg = 0;
#pragma omp simd reduction(+ : gg)
        for (std::int64_t i = start; i < stop; ++i) gg += g[i] * g[i];
        total += gg;
    }
    return total;
}

// To nearest, ties to even; a NaN stays one.
INLINE std::uint16_t to_bf16(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<std::uint16_t>(x != x ? 0x7fc0u : rounded);
}

struct Slice {
    float* p;
    const float* g;
    float *m, *v;
    std::uint16_t* copy;
    std::int64_t size;
};

template <bool bounded, bool copying>
INLINE double step_variant(const Slice& slice, const Coefficients& coefficients) {
    const Coefficients c = coefficients;
    float* const p = slice.p;
    const float* const g = slice.g;
    float* const m = slice.m;
    float* const v = slice.v;
    std::uint16_t* const copy = slice.copy;
    double total = 0;
    for (std::int64_t start = 0; start < slice.size; start += kBlock) {
        const std::int64_t stop = std::min(start + kBlock, slice.size);
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (std::int64_t i = start; i < stop; ++i) {
            const float clipped = c.clip * g[i];
            const float new_m = c.keep_m * m[i] + c.take_g * g[i];
            const float new_v = c.keep_v * v[i] + c.take_v * (clipped * clipped);
            const float root = c.scale_v * std::sqrt(new_v);
            const float u = bounded ? atan2_of_nonnegative(new_m, root) : new_m / (root + c.eps);
            const float new_p = c.decay * p[i] - c.move * u;
            m[i] = new_m;
            v[i] = new_v;
            p[i] = new_p;
            squares += u * u;
        }
        // A loop of its own: 16-bit stores among the others make gcc unroll twice and run out of
        // registers, at half the speed.
        if (copying) {
#pragma omp simd
            for (std::int64_t i = start; i < stop; ++i) copy[i] = to_bf16(p[i]);
        }
        total += squares;
    }
    return total;
}

INLINE double step_body(const Slice& slice, const Coefficients& c, bool bounded) {
    if (bounded)
        return slice.copy ? step_variant<true, true>(slice, c) : step_variant<true, false>(slice, c);
    return slice.copy ? step_variant<false, true>(slice, c) : step_variant<false, false>(slice, c);
}

INLINE void arctangent_body(const float* y, const float* x, float* out, std::int64_t size) {
#pragma omp simd
    for (std::int64_t i = 0; i < size; ++i) out[i] = atan2_of_nonnegative(y[i], x[i]);
}

using Dots = std::array<double, 3>;
FOR_EVERY_LEVEL(Dots, dot_chunk, (const float* m, const float* g, std::int64_t size), dot_body,
                (m, g, size))
FOR_EVERY_LEVEL(double, square_chunk, (const float* g, std::int64_t size), square_body, (g, size))
FOR_EVERY_LEVEL(double, step_chunk, (const Slice& slice, const Coefficients& c, bool bounded),
                step_body, (slice, c, bounded))
FOR_EVERY_LEVEL(void, arctangent_chunk,
                (const float* y, const float* x, float* out, std::int64_t size), arctangent_body,
                (y, x, out, size))

}  // namespace

void dot_products(const std::vector<const float*>& exp_avgs, const std::vector<const float*>& grads,
                  const std::vector<std::int64_t>& sizes, double* sums, int threads) {
    sum_over_chunks<3>(sizes, threads, sums, [&](const Chunk& chunk) {
        return dot_chunk(exp_avgs[chunk.tensor] + chunk.start, grads[chunk.tensor] + chunk.start,
                         chunk.size);
    });
}

void square_sums(const std::vector<const float*>& grads, const std::vector<std::int64_t>& sizes,
                 double* sums, int threads) {
    sum_over_chunks<1>(sizes, threads, sums, [&](const Chunk& chunk) {
        return std::array{square_chunk(grads[chunk.tensor] + chunk.start, chunk.size)};
    });
}

void momentum_step(const Step& step, const Coefficients* coefficients, std::int64_t stride,
                   bool bounded, double* sums, int threads) {
    sum_over_chunks<1>(step.sizes, threads, sums, [&](const Chunk& chunk) {
        const std::size_t i = chunk.tensor;
        const Coefficients& c = coefficients[static_cast<std::int64_t>(i) * stride];
        if (c.proceed == 0.0f) return std::array{0.0};
        std::uint16_t* const copy = step.copies.empty() ? nullptr : step.copies[i] + chunk.start;
        const Slice slice{step.params[i] + chunk.start,
                          step.grads[i] + chunk.start,
                          step.exp_avgs[i] + chunk.start,
                          step.exp_avg_sqs[i] + chunk.start,
                          copy,
                          chunk.size};
        return std::array{step_chunk(slice, c, bounded)};
    });
}

void arctangent(const float* y, const float* x, float* out, std::int64_t size) {
    arctangent_chunk(y, x, out, size);
}
