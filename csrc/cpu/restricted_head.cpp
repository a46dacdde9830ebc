// Block by block of channels. A pass over rows of the weight, which come from memory, and one over
// the packed hidden states, which are in the L2 cache, take turns slice by slice: at one time they
// compete for the cache's few buffers of loads under way, and each is slower than alone. What else
// was tried is in docs/log.md.
#include "restricted_head.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <new>

#include "head_blocks.h"

namespace {

using std::int32_t;
using std::int64_t;

// Registers of a block. Forward adds up lanes once a pair and block, so wide blocks; backward does
// not, and more rows of a narrow block fit in the cache.
constexpr int kForward = 8, kBackward = 4;
// Fours of positions that a thread takes at a time.
constexpr int64_t kFours = 8;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// To subtract instead of a lower maximum, where nothing counted: -inf - -inf is no number.
constexpr float kLowest = std::numeric_limits<float>::lowest();

template <class T>
struct Rows {
    const T* data;
    int64_t stride;
    const T* operator[](int64_t row) const { return data + row * stride; }
};

// Row indices[i] of a block to place i, for begin <= i < end.
template <int kVectors, class T>
INLINE void pack_body(const Rows<T>& rows, const int32_t* indices, int64_t begin, int64_t end,
                      int width, float* packed) {
    for (int64_t i = begin; i < end; ++i) {
        if (i + kAhead<kVectors> < end)
            prefetch_block<kVectors, false>(rows[indices[i + kAhead<kVectors>]]);
        store_block(packed + i * kWidth<kVectors>, load_block<kVectors>(rows[indices[i]], width));
    }
}

// z += one block's part, of the pairs of ids begin to end, sorted by id.
template <class T>
INLINE void dot_body(const Rows<T>& weight, const HeadPairs& pairs, int64_t begin, int64_t end,
                     const float* hidden, int width, float* logits) {
    alignas(64) float staged[HeadPairs::kSliceRows * kWidth<kForward>];
    pack_body<kForward>(weight, pairs.row.data() + begin, 0, end - begin, width, staged);
    DotProducts products(logits + pairs.starts[begin]);
    for (int64_t u = begin; u < end; ++u) {
        const auto row = load_block<kForward>(staged + (u - begin) * kWidth<kForward>);
        for (int64_t k = pairs.starts[u]; k < pairs.starts[u + 1]; ++k)
            products.add(row, hidden + int64_t{pairs.rank[k]} * kWidth<kForward>);
    }
    products.finish();
}

INLINE void weight_grad_body(float* grad, int64_t stride, const HeadPairs& pairs, int64_t begin,
                             int64_t end, const float* hidden, const float* slopes, int width) {
    constexpr int ahead = kAhead<kBackward>;
    alignas(64) float staged[HeadPairs::kSliceRows * kWidth<kBackward>];
    for (int64_t u = begin; u < end; ++u) {
        const int64_t start = pairs.starts[u];
        store_block(staged + (u - begin) * kWidth<kBackward>,
                    weighted_sum<kBackward>(hidden, pairs.rank.data() + start, slopes + start,
                                            pairs.starts[u + 1] - start));
    }
    for (int64_t u = begin; u < end; ++u) {
        if (u + ahead < end)
            prefetch_block<kBackward, true>(grad + pairs.row[u + ahead] * stride);
        add_block(grad + pairs.row[u] * stride,
                  load_block<kBackward>(staged + (u - begin) * kWidth<kBackward>), width);
    }
}

// Of positions of the fours begin to end: a row that several of a four have is loaded once.
INLINE void hidden_grad_body(float* grad, int64_t stride, const HeadPairs& pairs, int64_t begin,
                             int64_t end, const float* weight, const float* slopes, int width) {
    for (int64_t f = begin; f < end; ++f) {
        alignas(64) float sums[4][kWidth<kBackward>] = {};
        const int32_t* slots = pairs.four_slots.data() + pairs.four_starts[f];
        const float* slope = slopes + pairs.four_starts[f];
        for (int mask = 1; mask < 16; ++mask) {
            const int64_t size = pairs.four_counts[16 * f + mask];
            if (!size) continue;
            float* to[4];
            int shared = 0;
            for (int t = 0; t < 4; ++t)
                if (mask >> t & 1) to[shared++] = sums[t];
            switch (shared) {
                case 1: add_weighted_sums<kBackward, 1>(to, weight, slots, size, slope); break;
                case 2: add_weighted_sums<kBackward, 2>(to, weight, slots, size, slope); break;
                case 3: add_weighted_sums<kBackward, 3>(to, weight, slots, size, slope); break;
                default: add_weighted_sums<kBackward, 4>(to, weight, slots, size, slope);
            }
            slots += size;
            slope += size * shared;
        }
        for (int64_t r = 4 * f; r < std::min(4 * f + 4, pairs.positions()); ++r)
            store_block(grad + pairs.order[r] * stride, load_block<kBackward>(sums[r - 4 * f]),
                        width);
    }
}

struct Partial {
    float max, sum;
};

INLINE Partial partial_body(const float* logits, int64_t size) {
    float max = -kInfinity, sum = 0;
#pragma omp simd reduction(max : max)
    for (int64_t k = 0; k < size; ++k) max = logits[k] > max ? logits[k] : max;
    const float top = std::max(max, kLowest);
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < size; ++k) sum += exp_of_nonpositive(logits[k] - top);
    return {max, sum};
}

// The label's slope is (p - 1) * grad, not p * grad - grad: exactly 0 in a set of one.
INLINE void slope_body(const float* logits, int64_t size, int64_t label, float top, float total,
                       float grad, float* slopes) {
#pragma omp simd
    for (int64_t k = 0; k < size; ++k)
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

FOR_EVERY_LEVEL_AND_TYPE(void, pack_wide,
                         (const Rows<T>& rows, const int32_t* indices, int64_t begin, int64_t end,
                          int width, float* packed),
                         pack_body<kForward>, (rows, indices, begin, end, width, packed))
FOR_EVERY_LEVEL_AND_TYPE(void, pack_narrow,
                         (const Rows<T>& rows, const int32_t* indices, int64_t begin, int64_t end,
                          int width, float* packed),
                         pack_body<kBackward>, (rows, indices, begin, end, width, packed))
FOR_EVERY_LEVEL_AND_TYPE(void, add_dots,
                         (const Rows<T>& weight, const HeadPairs& pairs, int64_t begin, int64_t end,
                          const float* hidden, int width, float* logits),
                         dot_body, (weight, pairs, begin, end, hidden, width, logits))
FOR_EVERY_LEVEL(void, add_weight_grad,
                (float* grad, int64_t stride, const HeadPairs& pairs, int64_t begin, int64_t end,
                 const float* hidden, const float* slopes, int width),
                weight_grad_body, (grad, stride, pairs, begin, end, hidden, slopes, width))
FOR_EVERY_LEVEL(void, store_hidden_grad,
                (float* grad, int64_t stride, const HeadPairs& pairs, int64_t begin, int64_t end,
                 const float* weight, const float* slopes, int width),
                hidden_grad_body, (grad, stride, pairs, begin, end, weight, slopes, width))
FOR_EVERY_LEVEL(Partial, partial, (const float* logits, int64_t size), partial_body, (logits, size))
FOR_EVERY_LEVEL(void, find_slopes,
                (const float* logits, int64_t size, int64_t label, float top, float total,
                 float grad, float* slopes),
                slope_body, (logits, size, label, top, total, grad, slopes))

// Calls work with the operand's rows, from a channel on, as what they are.
template <class Work>
void with_rows(const Operand& operand, int64_t channel, const Work& work) {
    if (operand.is_bf16)
        work(Rows<bf16>{static_cast<const bf16*>(operand.data) + channel, operand.stride});
    else
        work(Rows<float>{static_cast<const float*>(operand.data) + channel, operand.stride});
}

// By all threads of a team, which then wait for each other.
template <int kVectors>
void pack(const Operand& operand, int64_t channel, int width, const std::vector<int32_t>& indices,
          float* packed) {
    const int64_t size = static_cast<int64_t>(indices.size());
#pragma omp for schedule(static)
    for (int64_t i = 0; i < size; i += HeadPairs::kSliceRows)
        with_rows(operand, channel, [&](const auto& rows) {
            const int64_t end = std::min(i + HeadPairs::kSliceRows, size);
            if (kVectors == kForward)
                pack_wide(rows, indices.data(), i, end, width, packed);
            else
                pack_narrow(rows, indices.data(), i, end, width, packed);
        });
}

struct Free {
    static constexpr std::align_val_t alignment{64};  // else every load takes two cache lines
    void operator()(float* block) const { ::operator delete[](block, alignment); }
};
using Packed = std::unique_ptr<float[], Free>;

template <int kVectors>
int width_of(int64_t channel, int64_t channels) {
    return static_cast<int>(std::min<int64_t>(kWidth<kVectors>, channels - channel));
}

// Of any content, so that the thread that packs a part touches it first.
template <int kVectors>
Packed packed_rows(int64_t rows) {
    return Packed(new (Free::alignment) float[static_cast<std::size_t>(rows) * kWidth<kVectors>]);
}

}  // namespace

RestrictedHead::RestrictedHead(const int32_t* ids, const int64_t* offsets, const int64_t* labels,
                               int64_t positions, int64_t rows, int threads)
    : pairs_(ids, offsets, positions, rows, threads), label_(positions) {
    for (int64_t n = 0; n < positions; ++n) {
        const int32_t* const first = ids + offsets[n];
        const int32_t* const last = ids + offsets[n + 1];
        const int32_t* const found = std::lower_bound(first, last, labels[n]);
        label_[n] = found != last && *found == labels[n] ? found - first : -1;
    }
}

void RestrictedHead::forward(const Operand& hidden, const Operand& weight, int64_t channels,
                             float* max, float* sum, float* label_logit, int threads) {
    const HeadPairs& pairs = pairs_;
    const Packed packed_hidden = packed_rows<kForward>(pairs.positions());
    std::vector<float> sorted(pairs.count());
    logits_.resize(pairs.count());
#pragma omp parallel num_threads(threads)
    {
        for (int64_t channel = 0; channel < channels; channel += kWidth<kForward>) {
            const int width = width_of<kForward>(channel, channels);
            pack<kForward>(hidden, channel, width, pairs.order, packed_hidden.get());
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < pairs.slices(); ++i)
                with_rows(weight, channel, [&](const auto& rows) {
                    add_dots(rows, pairs, pairs.cuts[i], pairs.cuts[i + 1], packed_hidden.get(),
                             width, sorted.data());
                });
        }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < pairs.positions(); ++n) {
            const int64_t start = pairs.offsets[n], stop = pairs.offsets[n + 1];
            for (int64_t p = start; p < stop; ++p) logits_[p] = sorted[pairs.place[p]];
            const Partial found = partial(logits_.data() + start, stop - start);
            max[n] = found.max;
            sum[n] = found.sum;
            label_logit[n] = label_[n] < 0 ? -kInfinity : logits_[start + label_[n]];
        }
    }
}

void RestrictedHead::backward(const Operand& hidden, const Operand& weight, int64_t channels,
                              const float* top, const float* total, const float* grad,
                              float* hidden_grad, float* weight_grad, int64_t weight_grad_stride,
                              int threads) {
    const HeadPairs& pairs = pairs_;
    const Packed packed_hidden = packed_rows<kBackward>(weight_grad ? pairs.positions() : 0);
    const Packed packed_weight = packed_rows<kBackward>(hidden_grad ? pairs.distinct() : 0);
    std::vector<float> seated(pairs.count()), sorted(pairs.count());
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> slopes;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < pairs.positions(); ++n) {
            const int64_t start = pairs.offsets[n], stop = pairs.offsets[n + 1];
            slopes.resize(stop - start);
            find_slopes(logits_.data() + start, stop - start, label_[n], std::max(top[n], kLowest),
                        total[n], grad[n], slopes.data());
            for (int64_t p = start; p < stop; ++p) {
                sorted[pairs.place[p]] = slopes[p - start];
                seated[pairs.seat[p]] = slopes[p - start];
            }
        }
        // One gradient after the other: block by block in turn both take a quarter longer.
        for (int64_t channel = 0; hidden_grad && channel < channels; channel += kWidth<kBackward>) {
            const int width = width_of<kBackward>(channel, channels);
            pack<kBackward>(weight, channel, width, pairs.row, packed_weight.get());
#pragma omp for schedule(dynamic)
            for (int64_t f = 0; f < pairs.fours(); f += kFours)
                store_hidden_grad(hidden_grad + channel, channels, pairs, f,
                                  std::min(f + kFours, pairs.fours()), packed_weight.get(),
                                  seated.data(), width);
        }
        for (int64_t channel = 0; weight_grad && channel < channels; channel += kWidth<kBackward>) {
            const int width = width_of<kBackward>(channel, channels);
            pack<kBackward>(hidden, channel, width, pairs.order, packed_hidden.get());
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < pairs.slices(); ++i)
                add_weight_grad(weight_grad + channel, weight_grad_stride, pairs, pairs.cuts[i],
                                pairs.cuts[i + 1], packed_hidden.get(), sorted.data(), width);
        }
    }
}
