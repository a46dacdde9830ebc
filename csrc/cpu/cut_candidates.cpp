// The cut of the ordered tokens, row by row.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off")  // token_mass.h
#endif

#include <algorithm>
#include <cstring>
#include <vector>

#include "select_candidates.h"
#include "token_mass.h"

namespace {

struct TokenRow {
    const float* values;
    const std::int32_t* ids;
    std::int64_t count, total, label;
    float max, label_logit;
    double uncovered;
};

struct SetRow {
    std::int32_t* ids;  // room for count + 1
    std::int64_t num_candidates, inside;
    bool label_appended;
};

INLINE std::int64_t rounded(float mass) {
    constexpr double units = 0x1.8p52;
    return bits<std::int64_t>(static_cast<double>(mass) + units) - bits<std::int64_t>(units);
}

// Returns the size of the set.
INLINE std::int64_t cut_body(const TokenRow& row, SetRow& set, std::int64_t* masses,
                             std::int32_t* ids) {
#pragma omp simd
    for (std::int64_t i = 0; i < row.count; ++i) masses[i] = rounded(mass(row.values[i], row.max));
    std::copy(row.ids, row.ids + row.count, ids);
    const auto allowed =
        static_cast<std::int64_t>(static_cast<double>(row.total) * row.uncovered);
    std::int64_t n = 0, inside = 0;
    do inside += masses[n++];
    while (n < row.count && row.total - inside > allowed);
    set.num_candidates = n;
    const auto label = static_cast<std::int32_t>(row.label);
    set.label_appended = std::find(ids, ids + n, label) == ids + n;
    if (set.label_appended) {
        ids[n++] = label;
        inside += rounded(mass(row.label_logit, row.max));
    }
    set.inside = inside;
    for (std::int64_t i = 0; i < n; ++i) {  // as in sort_largest
        const std::int32_t id = ids[i];
        std::int32_t place = 0;
#pragma omp simd reduction(+ : place)
        for (std::int64_t j = 0; j < n; ++j) place += ids[j] < id;
        set.ids[place] = id;
    }
    return n;
}

FOR_EVERY_LEVEL(std::int64_t, cut_row,
                (const TokenRow& row, SetRow& set, std::int64_t* masses, std::int32_t* ids),
                cut_body, (row, set, masses, ids))

}  // namespace

void cut_tokens(const float* values, const std::int32_t* ids, std::int64_t rows, std::int64_t count,
                const std::int64_t* totals, const float* maxima, const std::int64_t* labels,
                const float* label_logits, double uncovered, const Cut& cut, int threads) {
    // A row takes 2 us: of fewer, a thread's start is not worth it.
    const auto team = std::clamp<std::int64_t>(rows / 64, 1, std::max(threads, 1));
#pragma omp parallel num_threads(static_cast<int>(team))
    {
        std::vector<std::int64_t> masses(count);
        std::vector<std::int32_t> set_ids(count + 1);
#pragma omp for schedule(static)
        for (std::int64_t i = 0; i < rows; ++i) {
            const TokenRow row{values + i * count, ids + i * count, count,           totals[i],
                               labels[i],          maxima[i],       label_logits[i], uncovered};
            SetRow set{cut.ids + i * (count + 1), 0, 0, false};
            cut.offsets[i + 1] = cut_row(row, set, masses.data(), set_ids.data());
            cut.num_candidates[i] = set.num_candidates;
            cut.inside[i] = set.inside;
            cut.label_appended[i] = set.label_appended;
        }
    }
    cut.offsets[0] = 0;
    for (std::int64_t i = 0; i < rows; ++i) {  // each moves down, never past the next
        const std::int64_t size = cut.offsets[i + 1];
        std::memmove(cut.ids + cut.offsets[i], cut.ids + i * (count + 1), size * sizeof *cut.ids);
        cut.offsets[i + 1] += cut.offsets[i];
    }
}
