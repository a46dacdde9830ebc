// out[rows[s], :] += sum of coefficients[p] * source[indices[p], :] over the pairs p of segment s,
// offsets[s] <= p < offsets[s + 1].
//
// The gradient of the hidden states: a segment a token, source = weight, indices = ids. That of the
// weight: a segment a candidate id, source = hidden, indices = tokens, out = main_grad [V, H].
//
// source [sources, channels] of one dtype; indices [pairs], offsets [segments + 1] and rows
// [segments] int32, rows distinct (with `listed` 0, rows[s] = s and the list is not read);
// coefficients [pairs] and out [outputs, channels] fp32, as is all arithmetic. A row has one owner,
// which adds its pairs one after the other to what it finds: no atomics, and the bits are the same
// for any number of cores.
#include "kernel_operator.h"
#include "tiles.h"
#include "window.h"

namespace replay {

using AscendC::GlobalTensor;
using AscendC::LocalTensor;
using AscendC::TPosition;

template <typename T>
class SegmentAxpy {
   public:
    __aicore__ inline void Init(AscendC::TPipe* pipe, GM_ADDR source, GM_ADDR indices,
                                GM_ADDR coefficients, GM_ADDR offsets, GM_ADDR rows, GM_ADDR out,
                                uint32_t sources, uint32_t outputs, uint32_t segments,
                                uint32_t pairs, uint32_t channels, uint32_t listed) {
        segments_ = segments;
        pairs_ = pairs;
        channels_ = channels;
        listed_ = listed != 0;
        width_ = WidthOf(channels);
        const uint32_t wide = width_ * sizeof(float);
        const uint32_t fixed = 3 * wide + 2 * Window<float>::kBytes;
        tile_rows_ = RowsOf(fixed, 2 * width_ * sizeof(T) + (kWidens ? wide : 0));

        source_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(source),
                                static_cast<uint64_t>(sources) * channels);
        out_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(out),
                             static_cast<uint64_t>(outputs) * channels);
        offsets_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(offsets), segments + 1);
        rows_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(rows), segments);
        indices_.Init(pipe, indices, pairs);
        coefficients_.Init(pipe, coefficients, pairs);
        pipe->InitBuffer(source_queue_, 2, tile_rows_ * width_ * sizeof(T));
        pipe->InitBuffer(found_queue_, 1, wide);
        pipe->InitBuffer(sum_queue_, 2, wide);
        if constexpr (kWidens) pipe->InitBuffer(wide_source_, tile_rows_ * wide);
    }

    // A core owns the segments that begin in its run of pairs.
    __aicore__ inline void Process() {
        const uint32_t blocks = AscendC::GetBlockNum(), block = AscendC::GetBlockIdx();
        const uint32_t share = CeilDiv(pairs_, blocks);
        const uint32_t first = Min(share * block, pairs_), stop = Min(first + share, pairs_);
        uint32_t segment = UpperBound(offsets_, segments_, static_cast<int32_t>(first) - 1);
        if (segment == segments_) return;
        uint32_t begin = offsets_.GetValue(segment);
        while (begin < stop) {  // so there is another segment, for none begins at pairs_
            const uint32_t end = offsets_.GetValue(segment + 1);
            if (begin < end) AddTo(listed_ ? rows_.GetValue(segment) : segment, begin, end);
            ++segment;
            begin = end;
        }
    }

   private:
    static constexpr bool kWidens = sizeof(T) != sizeof(float);

    __aicore__ inline void AddTo(uint32_t row, uint32_t begin, uint32_t end) {
        for (uint32_t first = 0; first < channels_; first += width_) {
            const uint32_t count = Min(width_, channels_ - first);
            const auto out = out_[static_cast<uint64_t>(row) * channels_ + first];
            LocalTensor<float> sum = Found(out, count);
            for (uint32_t pair = begin; pair < end; pair += tile_rows_) {
                const uint32_t rows = Min(tile_rows_, end - pair);
                Load(pair, rows, first, count);
                AddTile(sum, pair, rows, static_cast<int32_t>(count));
            }
            sum_queue_.EnQue(sum);
            sum = sum_queue_.template DeQue<float>();
            StoreRow(out, sum, count);
            sum_queue_.FreeTensor(sum);
        }
    }

    // What stands in global memory, in a buffer that can be moved back there.
    __aicore__ inline LocalTensor<float> Found(const GlobalTensor<float>& out, uint32_t count) {
        LocalTensor<float> found = found_queue_.template AllocTensor<float>();
        LoadRow(found, out, count);
        found_queue_.EnQue(found);
        found = found_queue_.template DeQue<float>();
        LocalTensor<float> sum = sum_queue_.template AllocTensor<float>();
        AscendC::Adds(sum, found, 0.0f, static_cast<int32_t>(count));
        found_queue_.FreeTensor(found);
        AscendC::PipeBarrier<PIPE_V>();
        return sum;
    }

    __aicore__ inline void Load(uint32_t pair, uint32_t rows, uint32_t first, uint32_t count) {
        LocalTensor<T> tile = source_queue_.template AllocTensor<T>();
        for (uint32_t r = 0; r < rows; ++r) {
            const auto index = static_cast<uint64_t>(indices_.At(pair + r));
            LoadRow(tile[r * width_], source_[index * channels_ + first], count);
        }
        source_queue_.EnQue(tile);
    }

    // Row after row, each in all its channels: the order of the sum is that of the pairs.
    __aicore__ inline void AddTile(const LocalTensor<float>& sum, uint32_t pair, uint32_t rows,
                                   int32_t count) {
        LocalTensor<T> tile = source_queue_.template DeQue<T>();
        if constexpr (kWidens) {
            LocalTensor<float> wide = wide_source_.Get<float>();
            Widen(wide, tile, rows, count);
            Add(sum, wide, pair, rows, count);
        } else {
            Add(sum, tile, pair, rows, count);
        }
        source_queue_.FreeTensor(tile);
    }

    __aicore__ inline void Widen(const LocalTensor<float>& to, const LocalTensor<T>& from,
                                 uint32_t rows, uint32_t count) {
        const auto mode = AscendC::RoundMode::CAST_NONE;
        if (count == width_) {
            AscendC::Cast(to, from, mode, rows * width_);
        } else {
            for (uint32_t r = 0; r < rows; ++r)
                AscendC::Cast(to[r * width_], from[r * width_], mode, count);
        }
        AscendC::PipeBarrier<PIPE_V>();
    }

    __aicore__ inline void Add(const LocalTensor<float>& sum, const LocalTensor<float>& tile,
                               uint32_t pair, uint32_t rows, int32_t count) {
        for (uint32_t r = 0; r < rows; ++r) {
            AscendC::Axpy(sum, tile[r * width_], coefficients_.At(pair + r), count);
            AscendC::PipeBarrier<PIPE_V>();
        }
    }

    AscendC::TQue<TPosition::VECIN, 2> source_queue_;
    AscendC::TQue<TPosition::VECIN, 1> found_queue_;
    AscendC::TQue<TPosition::VECOUT, 2> sum_queue_;
    AscendC::TBuf<TPosition::VECCALC> wide_source_;
    GlobalTensor<T> source_;
    GlobalTensor<float> out_;
    GlobalTensor<int32_t> offsets_, rows_;
    Window<int32_t> indices_;
    Window<float> coefficients_;
    uint32_t segments_, pairs_, channels_, width_, tile_rows_;
    bool listed_;
};

template <typename T>
__aicore__ inline void Run(GM_ADDR source, GM_ADDR indices, GM_ADDR coefficients, GM_ADDR offsets,
                           GM_ADDR rows, GM_ADDR out, uint32_t sources, uint32_t outputs,
                           uint32_t segments, uint32_t pairs, uint32_t channels, uint32_t listed) {
    AscendC::TPipe pipe;
    SegmentAxpy<T> kernel;
    kernel.Init(&pipe, source, indices, coefficients, offsets, rows, out, sources, outputs,
                segments, pairs, channels, listed);
    kernel.Process();
}

}  // namespace replay

// Spelt out, not made by a macro: CANN's build reads the signatures off this file.
extern "C" __global__ __aicore__ void segment_axpy_fp32(
    GM_ADDR source, GM_ADDR indices, GM_ADDR coefficients, GM_ADDR offsets, GM_ADDR rows,
    GM_ADDR out, uint32_t sources, uint32_t outputs, uint32_t segments, uint32_t pairs,
    uint32_t channels, uint32_t listed) {
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
    replay::Run<float>(source, indices, coefficients, offsets, rows, out, sources, outputs,
                       segments, pairs, channels, listed);
}

extern "C" __global__ __aicore__ void segment_axpy_fp16(
    GM_ADDR source, GM_ADDR indices, GM_ADDR coefficients, GM_ADDR offsets, GM_ADDR rows,
    GM_ADDR out, uint32_t sources, uint32_t outputs, uint32_t segments, uint32_t pairs,
    uint32_t channels, uint32_t listed) {
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
    replay::Run<half>(source, indices, coefficients, offsets, rows, out, sources, outputs,
                      segments, pairs, channels, listed);
}

extern "C" __global__ __aicore__ void segment_axpy_bf16(
    GM_ADDR source, GM_ADDR indices, GM_ADDR coefficients, GM_ADDR offsets, GM_ADDR rows,
    GM_ADDR out, uint32_t sources, uint32_t outputs, uint32_t segments, uint32_t pairs,
    uint32_t channels, uint32_t listed) {
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
    replay::Run<bfloat16_t>(source, indices, coefficients, offsets, rows, out, sources, outputs,
                            segments, pairs, channels, listed);
}
