// A row at a time, from memory once. Pass 1 finds the maxima of blocks of 64 ids; the K-th largest
// of them bounds the K-th largest logit from below, so that the first K tokens lie in K blocks,
// which are read again; pass 2 sums the masses of a row that is still in the cache, and asks for
// the next one meanwhile. Integers are summed, so nothing depends on order, level or threads.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off")
#endif

#include "select_candidates.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "token_mass.h"

namespace {

constexpr std::int64_t kBlock = 64;
// Ids whose masses are summed in 32 bits: of at most 2^19 units of 2^19. With longer ones, 2048 ids,
// the next row is asked for in bursts that the caches do not keep up with: 10 % slower.
constexpr std::int64_t kChunk = 8 * kBlock;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Fp32 {
    using Stored = float;
    static INLINE float widen(float x) { return x; }
};

struct Bf16 {
    using Stored = std::uint16_t;
    static INLINE float widen(std::uint16_t x) {
        return bits<float>(static_cast<std::uint32_t>(x) << 16);
    }
};

struct Fp16 {
    using Stored = std::uint16_t;
    static INLINE float widen(std::uint16_t x) {
        const std::uint32_t sign = (x & 0x8000u) << 16, rest = (x & 0x7fffu) << 13;
        // Exact, denormals included; infinities and NaN have an exponent of their own.
        const std::uint32_t finite = bits<std::uint32_t>(bits<float>(rest) * 0x1p112f);
        return bits<float>(sign | (rest >= 0x0f800000u ? rest | 0x7f800000u : finite));
    }
};

// A chunk in fp32: itself, or in the buffer, where it is widened once for all that is asked of it.
template <class Type>
INLINE const float* widened(const typename Type::Stored* x, std::int64_t n, float* buffer) {
    if constexpr (std::is_same_v<Type, Fp32>) {
        return x;
    } else {
#pragma omp simd
        for (std::int64_t i = 0; i < n; ++i) buffer[i] = Type::widen(x[i]);
        return buffer;
    }
}

// A number below 2^22 and this, added in fp32: the last bits are the number's, rounded.
constexpr float kUnits = 0x1.8p23f;
// The same in units of 2^19, for numbers up to 2^38.
constexpr float kHighUnits = 0x1.8p42f;

// Sum of the masses of a chunk. low: all are below 2^20, as for differences of at most -12.5.
template <bool low>
INLINE std::int64_t sum_chunk(const float* x, std::int64_t n, float max) {
    std::uint32_t low_bits = 0, high_bits = 0;
#pragma omp simd reduction(+ : low_bits, high_bits)
    for (std::int64_t i = 0; i < n; ++i) {
        float y = mass(x[i], max);
        if (!low) {
            const float high = y + kHighUnits;
            high_bits += bits<std::uint32_t>(high);
            y -= high - kHighUnits;  // exact, and of at most 2^18
        }
        low_bits += bits<std::uint32_t>(y + kUnits);
    }
    const std::uint32_t count = static_cast<std::uint32_t>(n);
    low_bits -= count * bits<std::uint32_t>(kUnits);
    if (low) return low_bits;
    high_bits -= count * bits<std::uint32_t>(kHighUnits);
    return (static_cast<std::int64_t>(high_bits) << 19) + static_cast<std::int32_t>(low_bits);
}

template <class Type>
INLINE std::int64_t total_mass(const typename Type::Stored* x, std::int64_t size, float max,
                               const float* block_maxima, const typename Type::Stored* next) {
    constexpr std::int64_t line = 64 / sizeof(typename Type::Stored);
    std::int64_t total = 0;
    for (std::int64_t start = 0; start < size; start += kChunk) {
        const std::int64_t n = std::min(kChunk, size - start);
        if (next)
            for (std::int64_t i = 0; i < n; i += line) __builtin_prefetch(next + start + i, 0, 2);
        const float* const maxima = block_maxima + start / kBlock;
        const float difference =
            *std::max_element(maxima, maxima + (n + kBlock - 1) / kBlock) - max;
        if (difference <= -28.0f) continue;
        alignas(64) float buffer[kChunk];
        const float* const chunk = widened<Type>(x + start, n, buffer);
        total += difference > -12.5f ? sum_chunk<false>(chunk, n, max)
                                     : sum_chunk<true>(chunk, n, max);
    }
    return total;
}

INLINE float block_max(const float* x, std::int64_t n) {
    float max = -kInfinity;
#pragma omp simd reduction(max : max)
    for (std::int64_t i = 0; i < n; ++i) max = x[i] > max ? x[i] : max;
    return max;
}

// Maxima drop NaN, so it is asked for on its own, of two numbers at a time.
INLINE bool has_nan(const float* x, std::int64_t n) {
    const std::int64_t half = n / 2, other = n - half;
    std::uint32_t found = 0;
#pragma omp simd reduction(| : found)
    for (std::int64_t i = 0; i < other; ++i) found |= __builtin_isunordered(x[i], x[half + i]);
    return found != 0;
}

// Pass 1. Returns the row's maximum, or +inf if it holds a NaN.
template <class Type>
INLINE float find_maxima(const typename Type::Stored* x, std::int64_t size, float* block_maxima) {
    float max = -kInfinity;
    bool nan = false;
    for (std::int64_t start = 0; start < size; start += kChunk) {
        const std::int64_t n = std::min(kChunk, size - start);
        alignas(64) float buffer[kChunk];
        const float* const chunk = widened<Type>(x + start, n, buffer);
        for (std::int64_t at = 0; at < n; at += kBlock) {
            const float found = n - at >= kBlock ? block_max(chunk + at, kBlock)
                                                 : block_max(chunk + at, n - at);
            max = std::max(max, found);
            if (block_maxima) block_maxima[(start + at) / kBlock] = found;
        }
        nan |= has_nan(chunk, n);
    }
    return nan ? kInfinity : max;
}

// A number that at least ``count`` of ``values`` reach, and that no more than ``count`` exceed.
INLINE float kth_largest(const float* values, std::int64_t n, std::int64_t count, float largest) {
    std::int64_t reached = ordered(-kInfinity), above = ordered(largest);
    while (reached < above) {
        const std::int32_t middle = static_cast<std::int32_t>((reached + above + 1) >> 1);
        const float bound = value_of(middle);
        std::int32_t found = 0;
#pragma omp simd reduction(+ : found)
        for (std::int64_t i = 0; i < n; ++i) found += values[i] >= bound;
        if (found == count) return bound;
        if (found > count) reached = middle;
        else above = middle - 1;
    }
    return value_of(static_cast<std::int32_t>(reached));
}

// Calls found(i), ascending, where wanted(i); n <= kBlock.
template <class Wanted, class Found>
INLINE void for_each(std::int64_t n, const Wanted& wanted, const Found& found) {
    alignas(64) std::uint8_t flags[kBlock] = {};
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) flags[i] = wanted(i);
    for (std::int64_t start = 0; start < n; start += 8) {
        std::uint64_t word;
        std::memcpy(&word, flags + start, 8);
        if (!word) continue;
        for (std::int64_t i = start; i < start + 8; ++i)
            if (flags[i]) found(i);
    }
}

struct Scratch {
    std::vector<float> block_maxima;
    std::vector<std::int64_t> keys;

    Scratch(std::int64_t size, std::int64_t count)
        : block_maxima((size + kBlock - 1) / kBlock),
          keys(std::min<std::int64_t>(count, block_maxima.size()) * kBlock) {}
};

// A token as an integer, of which there are no two alike: it sorts as (value, id descending).
INLINE std::int64_t key_of(float value, std::int64_t id) {
    return (static_cast<std::int64_t>(ordered(value)) << 32) + (kMaxVocabSize - id);
}

// values[0 .. count), ids[0 .. count) = the tokens of the largest of ``found``, descending.
INLINE void sort_largest(std::int64_t* found, std::int64_t n, std::int64_t count, float* values,
                         std::int32_t* ids) {
    if (n > 2 * count) {
        std::nth_element(found, found + count, found + n, std::greater<std::int64_t>());
        n = count;
    }
    // A key's place is the number of keys above it: n^2 comparisons, by SIMD, are faster than the
    // branches of a sort.
    for (std::int64_t i = 0; i < n; ++i) {
        const std::int64_t key = found[i];
        std::int64_t place = 0;
#pragma omp simd reduction(+ : place)
        for (std::int64_t j = 0; j < n; ++j) place += found[j] > key;
        if (place >= count) continue;
        values[place] = value_of(static_cast<std::int32_t>(key >> 32));
        ids[place] = static_cast<std::int32_t>(kMaxVocabSize - (key & 0xffffffff));
    }
}

// The first tokens lie in the first ``count`` blocks by (maximum descending, block ascending);
// shard_selection.py has the proof. None is below the least of those maxima.
template <class Type>
INLINE void first_tokens(const typename Type::Stored* x, std::int64_t size, float max,
                         std::int64_t vocab_start, std::int64_t count, Scratch& scratch,
                         float* values, std::int32_t* ids) {
    const std::int64_t blocks = static_cast<std::int64_t>(scratch.block_maxima.size());
    const float* const maxima = scratch.block_maxima.data();
    std::int64_t* const found = scratch.keys.data();
    float bound = -kInfinity;
    std::int64_t num_tied = blocks;
    if (blocks > count) {
        bound = kth_largest(maxima, blocks, count, max);
        std::int32_t above = 0;
#pragma omp simd reduction(+ : above)
        for (std::int64_t b = 0; b < blocks; ++b) above += maxima[b] > bound;
        num_tied = count - above;
    }
    std::int64_t n = 0;
    const auto take = [&](std::int64_t block) {
        if (maxima[block] == bound && num_tied-- <= 0) return;
        const std::int64_t start = block * kBlock;
        for_each(
            std::min(kBlock, size - start),
            [&](std::int64_t i) { return Type::widen(x[start + i]) >= bound; },
            [&](std::int64_t i) {
                found[n++] = key_of(Type::widen(x[start + i]), vocab_start + start + i);
            });
    };
    for (std::int64_t b = 0; b < blocks; b += kBlock)
        for_each(
            std::min(kBlock, blocks - b), [&](std::int64_t i) { return maxima[b + i] >= bound; },
            [&](std::int64_t i) { take(b + i); });
    sort_largest(found, n, count, values, ids);
}

struct Row {
    const void *data, *next;
    std::int64_t size, vocab_start, count;
    bool given;
    float* max;
    std::int64_t* total;
    float* values;
    std::int32_t* ids;
};

template <class Type>
INLINE void row_body(const Row& row, Scratch& scratch) {
    const auto* x = static_cast<const typename Type::Stored*>(row.data);
    const float found = find_maxima<Type>(x, row.size, scratch.block_maxima.data());
    if (!row.given) *row.max = found;
    const float max = *row.max;
    if (!std::isfinite(max) || !(found <= max)) {
        *row.total = 0;
        std::fill(row.values, row.values + row.count, 0.0f);
        std::fill(row.ids, row.ids + row.count, 0);
        return;
    }
    first_tokens<Type>(x, row.size, found, row.vocab_start, row.count, scratch, row.values,
                       row.ids);
    *row.total = total_mass<Type>(x, row.size, max, scratch.block_maxima.data(),
                                  static_cast<const typename Type::Stored*>(row.next));
}

#define ROWS_OF(TYPE)                                                                            \
    FOR_EVERY_LEVEL(void, row_##TYPE, (const Row& row, Scratch& scratch), row_body<TYPE>,        \
                    (row, scratch))                                                              \
    FOR_EVERY_LEVEL(float, max_##TYPE,                                                           \
                    (const TYPE::Stored* x, std::int64_t size, float* block_maxima),             \
                    find_maxima<TYPE>, (x, size, block_maxima))
ROWS_OF(Fp32)
ROWS_OF(Bf16)
ROWS_OF(Fp16)
#undef ROWS_OF

const char* address(const Logits& logits, std::int64_t row) {
    const std::int64_t width = logits.type == LogitType::fp32 ? 4 : 2;
    return static_cast<const char*>(logits.data) + row * logits.stride * width;
}

int team_size(const Logits& logits, int threads) {
    return static_cast<int>(std::clamp<std::int64_t>(logits.rows, 1, std::max(threads, 1)));
}

}  // namespace

void row_maxima(const Logits& logits, float* maxima, int threads) {
#pragma omp parallel for schedule(static) num_threads(team_size(logits, threads))
    for (std::int64_t i = 0; i < logits.rows; ++i) {
        const void* const x = address(logits, i);
        switch (logits.type) {
            case LogitType::fp32:
                maxima[i] = max_Fp32(static_cast<const float*>(x), logits.size, nullptr);
                break;
            case LogitType::bf16:
                maxima[i] = max_Bf16(static_cast<const std::uint16_t*>(x), logits.size, nullptr);
                break;
            case LogitType::fp16:
                maxima[i] = max_Fp16(static_cast<const std::uint16_t*>(x), logits.size, nullptr);
                break;
        }
    }
}

void shard_tokens(const Logits& logits, std::int64_t vocab_start, std::int64_t count, bool given,
                  float* maxima, std::int64_t* totals, float* values, std::int32_t* ids,
                  int threads) {
#pragma omp parallel num_threads(team_size(logits, threads))
    {
        Scratch scratch(logits.size, count);
        // Rows that follow each other to one thread, which asks for the next one ahead.
#pragma omp for schedule(static)
        for (std::int64_t i = 0; i < logits.rows; ++i) {
            const Row row{address(logits, i),
                          i + 1 < logits.rows ? address(logits, i + 1) : nullptr,
                          logits.size,
                          vocab_start,
                          count,
                          given,
                          maxima + i,
                          totals + i,
                          values + i * count,
                          ids + i * count};
            switch (logits.type) {
                case LogitType::fp32: row_Fp32(row, scratch); break;
                case LogitType::bf16: row_Bf16(row, scratch); break;
                case LogitType::fp16: row_Fp16(row, scratch); break;
            }
        }
    }
}
