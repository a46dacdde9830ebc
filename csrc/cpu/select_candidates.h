// One rank's part of candidate selection; megatron_replay/selection/shard_selection.py
// has the definition, and these functions its bits.
#pragma once

#include <cstdint>

enum class LogitType { fp32, bf16, fp16 };

// [rows, size]; rows ``stride`` elements apart, of any alignment.
struct Logits {
    const void* data;
    LogitType type;
    std::int64_t rows, size, stride;
};

// maxima[row]: the row's largest logit; +inf where it holds a NaN.
void row_maxima(const Logits& logits, float* maxima, int threads);

// maxima[row]: given, or (when ``given`` is not) found; totals[row]: the shard's mass; values[row],
// ids[row]: its first ``count`` tokens by (value descending, id ascending); 1 <= count <= size. Of a
// row without a finite maximum, zeros.
void shard_tokens(const Logits& logits, std::int64_t vocab_start, std::int64_t count, bool given,
                  float* maxima, std::int64_t* totals, float* values, std::int32_t* ids,
                  int threads);

// Sets of [rows, count] tokens in that order, cut where the mass behind is at most ``uncovered`` of
// the total, with the labels added. ids: those of all rows, one after another, in room for
// rows * (count + 1).
struct Cut {
    std::int32_t* ids;
    std::int64_t *offsets, *num_candidates;
    std::uint8_t* label_appended;
    std::int64_t* inside;
};
void cut_tokens(const float* values, const std::int32_t* ids, std::int64_t rows, std::int64_t count,
                const std::int64_t* totals, const float* maxima, const std::int64_t* labels,
                const float* label_logits, double uncovered, const Cut& cut, int threads);
