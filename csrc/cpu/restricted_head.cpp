// Block by block of channels: forward adds up z while a candidate's row is in registers and passes
// all positions that have it; backward holds a row of dW, or of dH, and sums it up. What was tried
// to make it faster is in docs/log.md.
#include "restricted_head.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>

#include "head_blocks.h"

namespace {

using std::int32_t;
using std::int64_t;

// Pairs that a thread takes at a time, about: 1 ms of a core has ten of it.
constexpr int64_t kPairs = 4096;
// Positions that a thread takes at a time.
constexpr int64_t kPositions = 32;

template <class T>
struct Rows {
    const T* data;
    int64_t stride;
    const T* operator[](int64_t row) const { return data + row * stride; }
};

// Pairs by id, between two cuts.
struct Slice {
    const int32_t* rows;
    const int64_t* starts;
    const int32_t* position;
    int64_t begin, end;
};

// Copies rows, or rows[indices[i]], of one block.
template <class T>
INLINE void pack_body(const Rows<T>& rows, const int32_t* indices, int64_t begin, int64_t end,
                      int width, float* packed) {
    for (int64_t i = begin; i < end; ++i) {
        if (indices && i + kAhead < end) prefetch_block<false>(rows[indices[i + kAhead]]);
        const T* const row = rows[indices ? indices[i] : i];
        store_block(packed + i * kBlock, load_block(row, width));
    }
}

template <class T>
INLINE void dot_body(const Rows<T>& weight, const Slice& slice, const float* hidden, int width,
                     float* logits) {
    Sums sums(logits + slice.starts[slice.begin]);
    for (int64_t u = slice.begin; u < slice.end; ++u) {
        if (u + kAhead < slice.end) prefetch_block<false>(weight[slice.rows[u + kAhead]]);
        const Registers row = load_block(weight[slice.rows[u]], width);
        for (int64_t k = slice.starts[u]; k < slice.starts[u + 1]; ++k)
            sums.add(row, hidden + static_cast<int64_t>(slice.position[k]) * kBlock);
    }
    sums.finish();
}

INLINE void weight_grad_body(float* grad, int64_t stride, const Slice& slice, const float* hidden,
                             const float* slopes, int width) {
    for (int64_t u = slice.begin; u < slice.end; ++u) {
        if (u + kAhead < slice.end)
            prefetch_block<true>(grad + slice.rows[u + kAhead] * stride);
        const int64_t start = slice.starts[u];
        const Registers sum = weighted_sum(hidden, slice.position + start, slopes + start,
                                           slice.starts[u + 1] - start);
        add_block(grad + slice.rows[u] * stride, sum, width);
    }
}

INLINE void hidden_grad_body(float* grad, int64_t stride, const int64_t* offsets,
                             const int32_t* slots, const float* weight, const float* slopes,
                             int64_t begin, int64_t end, int width) {
    for (int64_t n = begin; n < end; ++n) {
        const int64_t start = offsets[n];
        const Registers sum =
            weighted_sum(weight, slots + start, slopes + start, offsets[n + 1] - start);
        store_block(grad + n * stride, sum, width);
    }
}

struct Partial {
    float max, sum;
};

INLINE Partial partial_body(const float* logits, int64_t pairs) {
    float max = -std::numeric_limits<float>::infinity(), sum = 0;
#pragma omp simd reduction(max : max)
    for (int64_t k = 0; k < pairs; ++k) max = logits[k] > max ? logits[k] : max;
    // -inf - -inf is no number
    const float top = std::max(max, std::numeric_limits<float>::lowest());
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < pairs; ++k) sum += exp_of_nonpositive(logits[k] - top);
    return {max, sum};
}

// The label's slope is (p - 1) * grad, not p * grad - grad: exactly 0 in a set of one.
INLINE void slope_body(const float* logits, int64_t pairs, int64_t label, float top, float total,
                       float grad, float* slopes) {
#pragma omp simd
    for (int64_t k = 0; k < pairs; ++k)
        slopes[k] = exp_of_nonpositive(logits[k] - top) / total * grad;
    if (label >= 0)
        slopes[label] = (exp_of_nonpositive(logits[label] - top) / total - 1.0f) * grad;
}

#define FOR_EVERY_LEVEL_AND_TYPE(RESULT, NAME, PARAMETERS, BODY, ARGUMENTS) \
    namespace of_float {                                                    \
    using T = float;                                                        \
    FOR_EVERY_LEVEL(RESULT, NAME, PARAMETERS, BODY, ARGUMENTS)              \
    }                                                                       \
    namespace of_bf16 {                                                     \
    using T = bf16;                                                         \
    FOR_EVERY_LEVEL(RESULT, NAME, PARAMETERS, BODY, ARGUMENTS)              \
    }                                                                       \
    using of_bf16::NAME;                                                    \
    using of_float::NAME;

FOR_EVERY_LEVEL_AND_TYPE(void, pack,
                         (const Rows<T>& rows, const int32_t* indices, int64_t begin, int64_t end,
                          int width, float* packed),
                         pack_body, (rows, indices, begin, end, width, packed))
FOR_EVERY_LEVEL_AND_TYPE(void, dot,
                         (const Rows<T>& weight, const Slice& slice, const float* hidden, int width,
                          float* logits),
                         dot_body, (weight, slice, hidden, width, logits))
FOR_EVERY_LEVEL(void, add_weight_grad,
                (float* grad, int64_t stride, const Slice& slice, const float* hidden,
                 const float* slopes, int width),
                weight_grad_body, (grad, stride, slice, hidden, slopes, width))
FOR_EVERY_LEVEL(void, store_hidden_grad,
                (float* grad, int64_t stride, const int64_t* offsets, const int32_t* slots,
                 const float* weight, const float* slopes, int64_t begin, int64_t end, int width),
                hidden_grad_body,
                (grad, stride, offsets, slots, weight, slopes, begin, end, width))
FOR_EVERY_LEVEL(Partial, partial, (const float* logits, int64_t pairs), partial_body,
                (logits, pairs))
FOR_EVERY_LEVEL(void, slope,
                (const float* logits, int64_t pairs, int64_t label, float top, float total,
                 float grad, float* slopes),
                slope_body, (logits, pairs, label, top, total, grad, slopes))

template <class T>
Rows<T> rows_of(const Operand& operand, int64_t channel) {
    return {static_cast<const T*>(operand.data) + channel, operand.stride};
}

void pack_operand(const Operand& operand, int64_t channel, const int32_t* indices, int64_t begin,
                  int64_t end, int width, float* packed) {
    if (operand.is_bf16)
        pack(rows_of<bf16>(operand, channel), indices, begin, end, width, packed);
    else
        pack(rows_of<float>(operand, channel), indices, begin, end, width, packed);
}

struct Free {
    void operator()(float* block) const { ::operator delete[](block, kAlignment); }
    static constexpr std::align_val_t kAlignment{64};  // else every load takes two cache lines
};
using Packed = std::unique_ptr<float[], Free>;

// Of any content, so that the thread that packs a part touches it first.
Packed packed_rows(int64_t rows) {
    return Packed(new (Free::kAlignment) float[static_cast<std::size_t>(rows) * kBlock]);
}

}  // namespace

RestrictedHead::RestrictedHead(const int32_t* ids, const int64_t* offsets, const int64_t* labels,
                               int64_t positions, int64_t rows)
    : offsets_(offsets, offsets + positions + 1) {
    find_labels(ids, labels);
    sort_by_id(ids, rows);
}

void RestrictedHead::find_labels(const int32_t* ids, const int64_t* labels) {
    label_.resize(positions());
    for (int64_t n = 0; n < positions(); ++n) {
        const int32_t* const end = ids + offsets_[n + 1];
        const int32_t* const found = std::lower_bound(ids + offsets_[n], end, labels[n]);
        label_[n] = found != end && *found == labels[n] ? found - ids : -1;
    }
}

// A counting sort, stable.
void RestrictedHead::sort_by_id(const int32_t* ids, int64_t rows) {
    const int64_t pairs = offsets_.back();
    std::vector<int32_t> slot_of(rows);
    for (int64_t p = 0; p < pairs; ++p) ++slot_of[ids[p]];
    std::vector<int64_t> next;
    int64_t start = 0;
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t count = slot_of[row];
        if (!count) continue;
        if (cuts_.empty() || start - starts_[cuts_.back()] >= kPairs) cuts_.push_back(distinct());
        slot_of[row] = static_cast<int32_t>(distinct());
        rows_.push_back(static_cast<int32_t>(row));
        starts_.push_back(start);
        start += count;
    }
    next = starts_;
    starts_.push_back(pairs);
    cuts_.push_back(distinct());
    position_.resize(pairs);
    place_.resize(pairs);
    slot_.resize(pairs);
    for (int64_t n = 0; n < positions(); ++n)
        for (int64_t p = offsets_[n]; p < offsets_[n + 1]; ++p) {
            slot_[p] = slot_of[ids[p]];
            const int64_t place = next[slot_[p]]++;
            position_[place] = static_cast<int32_t>(n);
            place_[p] = static_cast<int32_t>(place);
        }
}

void RestrictedHead::forward(const Operand& hidden, const Operand& weight, int64_t channels,
                             float* max, float* sum, float* gold, int threads) {
    const int64_t pairs = offsets_.back(), slices = static_cast<int64_t>(cuts_.size()) - 1;
    const auto packed = packed_rows(positions());
    std::vector<float> by_place(pairs);
    logits_.resize(pairs);
#pragma omp parallel num_threads(threads)
    {
        for (int64_t channel = 0; channel < channels; channel += kBlock) {
            const int width = static_cast<int>(std::min<int64_t>(kBlock, channels - channel));
#pragma omp for schedule(static)
            for (int64_t n = 0; n < positions(); n += kPositions)
                pack_operand(hidden, channel, nullptr, n, std::min(n + kPositions, positions()),
                             width, packed.get());
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < slices; ++i) {
                const Slice slice{rows_.data(), starts_.data(), position_.data(), cuts_[i],
                                  cuts_[i + 1]};
                if (weight.is_bf16)
                    dot(rows_of<bf16>(weight, channel), slice, packed.get(), width,
                        by_place.data());
                else
                    dot(rows_of<float>(weight, channel), slice, packed.get(), width,
                        by_place.data());
            }
        }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < positions(); ++n) {
            const int64_t start = offsets_[n], stop = offsets_[n + 1];
            for (int64_t p = start; p < stop; ++p) logits_[p] = by_place[place_[p]];
            const Partial found = partial(logits_.data() + start, stop - start);
            max[n] = found.max;
            sum[n] = found.sum;
            gold[n] = label_[n] < 0 ? -std::numeric_limits<float>::infinity() : logits_[label_[n]];
        }
    }
}

void RestrictedHead::backward(const Operand& hidden, const Operand& weight, int64_t channels,
                              const float* top, const float* total, const float* grad,
                              float* hidden_grad, float* weight_grad, int64_t weight_grad_stride,
                              int threads) {
    const int64_t pairs = offsets_.back(), slices = static_cast<int64_t>(cuts_.size()) - 1;
    const auto packed_hidden = packed_rows(weight_grad ? positions() : 0);
    const auto packed_weight = packed_rows(hidden_grad ? distinct() : 0);
    std::vector<float> slopes(pairs), by_place(pairs);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t n = 0; n < positions(); ++n) {
            const int64_t start = offsets_[n], stop = offsets_[n + 1];
            slope(logits_.data() + start, stop - start, label_[n] < 0 ? -1 : label_[n] - start,
                  std::max(top[n], std::numeric_limits<float>::lowest()), total[n], grad[n],
                  slopes.data() + start);
            for (int64_t p = start; p < stop; ++p) by_place[place_[p]] = slopes[p];
        }
        for (int64_t channel = 0; channel < channels; channel += kBlock) {
            const int width = static_cast<int>(std::min<int64_t>(kBlock, channels - channel));
            if (weight_grad) {
#pragma omp for schedule(static)
                for (int64_t n = 0; n < positions(); n += kPositions)
                    pack_operand(hidden, channel, nullptr, n, std::min(n + kPositions, positions()),
                                 width, packed_hidden.get());
#pragma omp for schedule(dynamic)
                for (int64_t i = 0; i < slices; ++i) {
                    const Slice slice{rows_.data(), starts_.data(), position_.data(), cuts_[i],
                                      cuts_[i + 1]};
                    add_weight_grad(weight_grad + channel, weight_grad_stride, slice,
                                    packed_hidden.get(), by_place.data(), width);
                }
            }
            if (hidden_grad) {
#pragma omp for schedule(static)
                for (int64_t i = 0; i < slices; ++i)
                    pack_operand(weight, channel, rows_.data(), cuts_[i], cuts_[i + 1], width,
                                 packed_weight.get());
#pragma omp for schedule(dynamic)
                for (int64_t n = 0; n < positions(); n += kPositions)
                    store_hidden_grad(hidden_grad + channel, channels, offsets_.data(),
                                      slot_.data(), packed_weight.get(), slopes.data(), n,
                                      std::min(n + kPositions, positions()), width);
            }
        }
    }
}
