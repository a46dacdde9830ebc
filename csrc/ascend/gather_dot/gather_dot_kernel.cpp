// z[p] = <hidden[t], weight[ids[p]]> for every pair p of token t: offsets[t] <= p < offsets[t + 1].
//
// hidden [tokens, channels], weight [rows, channels] of one dtype; ids [pairs] and offsets
// [tokens + 1] int32; z [pairs] fp32, as is all arithmetic. A core has an equal run of pairs, and
// the sum of a pair is formed in an order that depends on `channels` alone: the bits are the same
// for any number of cores.
#include "kernel_operator.h"
#include "tiles.h"
#include "window.h"

namespace replay {

using AscendC::GlobalTensor;
using AscendC::LocalTensor;
using AscendC::TPosition;

// Lanes of fp32 in one repeat of a vector instruction, and the most repeats of one.
constexpr uint32_t kLanes = 64, kMaxRepeats = 255;
// A row of products starts on a block still when two BlockReduceSum have left one in 64 of it.
constexpr uint32_t kRowLanes = 512;
// Neighbouring cores write z in different lines of 64 bytes.
constexpr uint32_t kShareStep = 16;

template <typename T>
class GatherDot {
   public:
    __aicore__ inline void Init(AscendC::TPipe* pipe, GM_ADDR hidden, GM_ADDR weight, GM_ADDR ids,
                                GM_ADDR offsets, GM_ADDR z, uint32_t tokens,
                                uint32_t rows, uint32_t pairs, uint32_t channels) {
        tokens_ = tokens;
        pairs_ = pairs;
        channels_ = channels;
        width_ = WidthOf(channels);
        stride_ = RoundUp(width_, kRowLanes);
        const uint32_t parts = CeilDiv(channels, width_);
        const uint32_t wide = parts * width_ * sizeof(float);
        const uint32_t fixed =
            width_ * sizeof(T) + wide + 3 * kBlockBytes + Window<int32_t>::kBytes;
        const uint32_t sums = stride_ / 8 + stride_ / 64;
        tile_rows_ = RowsOf(fixed, 2 * width_ * sizeof(T) + (stride_ + sums) * sizeof(float));

        hidden_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(hidden),
                                static_cast<uint64_t>(tokens) * channels);
        weight_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(weight),
                                static_cast<uint64_t>(rows) * channels);
        offsets_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(offsets), tokens + 1);
        z_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(z), pairs);
        ids_.Init(pipe, ids, pairs);
        pipe->InitBuffer(weight_queue_, 2, tile_rows_ * width_ * sizeof(T));
        pipe->InitBuffer(hidden_queue_, 1, width_ * sizeof(T));
        pipe->InitBuffer(z_queue_, 2, kBlockBytes);
        pipe->InitBuffer(wide_hidden_, wide);
        pipe->InitBuffer(products_, tile_rows_ * stride_ * sizeof(float));
        pipe->InitBuffer(eighths_, tile_rows_ * stride_ / 8 * sizeof(float));
        pipe->InitBuffer(last_sums_, tile_rows_ * stride_ / 64 * sizeof(float));
        pipe->InitBuffer(part_, kBlockBytes);
    }

    __aicore__ inline void Process() {
        const uint32_t blocks = AscendC::GetBlockNum(), block = AscendC::GetBlockIdx();
        const uint32_t share = RoundUp(CeilDiv(pairs_, blocks), kShareStep);
        uint32_t pair = share * block;
        const uint32_t stop = Min(pair + share, pairs_);
        if (pair >= stop) return;
        uint32_t token = UpperBound(offsets_, tokens_ + 1, static_cast<int32_t>(pair)) - 1;
        uint32_t token_stop = offsets_.GetValue(token + 1);
        LoadHidden(token);
        while (pair < stop) {
            if (pair == token_stop) {
                do token_stop = offsets_.GetValue(++token + 1);
                while (pair == token_stop);  // tokens without pairs
                LoadHidden(token);
            }
            const uint32_t rows = Min(tile_rows_, Min(token_stop, stop) - pair);
            Tile(pair, rows);
            pair += rows;
        }
    }

   private:
    __aicore__ inline void LoadHidden(uint32_t token) {
        for (uint32_t first = 0; first < channels_; first += width_) {
            const uint32_t count = Min(width_, channels_ - first);
            LocalTensor<T> row = hidden_queue_.template AllocTensor<T>();
            LoadRow(row, hidden_[static_cast<uint64_t>(token) * channels_ + first], count);
            hidden_queue_.EnQue(row);
            row = hidden_queue_.template DeQue<T>();
            Widen(wide_hidden_.Get<float>()[first], row, Loaded(count));
            hidden_queue_.FreeTensor(row);
        }
        AscendC::PipeBarrier<PIPE_V>();
    }

    __aicore__ inline void Tile(uint32_t pair, uint32_t rows) {
        LocalTensor<float> z = z_queue_.AllocTensor<float>(), part = part_.Get<float>();
        for (uint32_t first = 0; first < channels_; first += width_) {
            const uint32_t count = Min(width_, channels_ - first);
            LoadWeight(pair, rows, first, count);
            Multiply(rows, first, Loaded(count));
            if (first == 0) {
                Sum(z, rows);
            } else {
                Sum(part, rows);
                AscendC::Add(z, z, part, static_cast<int32_t>(rows));
                AscendC::PipeBarrier<PIPE_V>();
            }
        }
        z_queue_.EnQue(z);
        z = z_queue_.DeQue<float>();
        StoreRow(z_[pair], z, rows);
        z_queue_.FreeTensor(z);
    }

    __aicore__ inline void LoadWeight(uint32_t pair, uint32_t rows, uint32_t first,
                                      uint32_t count) {
        LocalTensor<T> tile = weight_queue_.template AllocTensor<T>();
        for (uint32_t r = 0; r < rows; ++r) {
            const auto id = static_cast<uint64_t>(ids_.At(pair + r));
            LoadRow(tile[r * width_], weight_[id * channels_ + first], count);
        }
        weight_queue_.EnQue(tile);
    }

    // The loaded tile times the token's hidden channels; what a row has no channels for is zero.
    __aicore__ inline void Multiply(uint32_t rows, uint32_t first, uint32_t lanes) {
        LocalTensor<T> tile = weight_queue_.template DeQue<T>();
        LocalTensor<float> products = products_.Get<float>();
        const LocalTensor<float> hidden = wide_hidden_.Get<float>()[first];
        const auto count = static_cast<int32_t>(lanes);
        if constexpr (sizeof(T) == sizeof(float)) {
            for (uint32_t r = 0; r < rows; ++r)
                AscendC::Mul(products[r * stride_], tile[r * width_], hidden, count);
        } else {
            if (lanes == stride_) {
                Widen(products, tile, rows * stride_);
            } else {
                for (uint32_t r = 0; r < rows; ++r)
                    Widen(products[r * stride_], tile[r * width_], lanes);
            }
            AscendC::PipeBarrier<PIPE_V>();
            for (uint32_t r = 0; r < rows; ++r)
                AscendC::Mul(products[r * stride_], products[r * stride_], hidden, count);
        }
        weight_queue_.FreeTensor(tile);
        if (lanes < stride_) {
            for (uint32_t r = 0; r < rows; ++r)
                AscendC::Duplicate(products[r * stride_ + lanes], 0.0f,
                                   static_cast<int32_t>(stride_ - lanes));
        }
        AscendC::PipeBarrier<PIPE_V>();
    }

    // Each row of products, in three steps. ReduceSum would do it in one call per row, slowly.
    __aicore__ inline void Sum(const LocalTensor<float>& sums, uint32_t rows) {
        LocalTensor<float> eighths = eighths_.Get<float>(), last = last_sums_.Get<float>();
        SumBlocks(eighths, products_.Get<float>(), rows * stride_ / kLanes);
        AscendC::PipeBarrier<PIPE_V>();
        SumBlocks(last, eighths, rows * stride_ / 8 / kLanes);
        AscendC::PipeBarrier<PIPE_V>();
        const auto lanes = static_cast<int32_t>(stride_ / 64);
        AscendC::WholeReduceSum(sums, last, lanes, static_cast<int32_t>(rows), 1, 1, lanes / 8);
        AscendC::PipeBarrier<PIPE_V>();
    }

    // Every eight neighbours: a repeat leaves 8 sums of its 64 lanes.
    __aicore__ inline void SumBlocks(const LocalTensor<float>& sums, const LocalTensor<float>& from,
                                     uint32_t repeats) {
        for (uint32_t done = 0; done < repeats; done += kMaxRepeats)
            AscendC::BlockReduceSum(sums[done * 8], from[done * kLanes],
                                    static_cast<int32_t>(Min(kMaxRepeats, repeats - done)),
                                    static_cast<int32_t>(kLanes), 1, 1, 8);
    }

    __aicore__ inline void Widen(const LocalTensor<float>& to, const LocalTensor<T>& from,
                                 uint32_t count) {
        if constexpr (sizeof(T) == sizeof(float))
            AscendC::Adds(to, from, 0.0f, static_cast<int32_t>(count));
        else
            AscendC::Cast(to, from, AscendC::RoundMode::CAST_NONE, count);
    }

    // What LoadRow brought, its zeros included.
    __aicore__ inline uint32_t Loaded(uint32_t count) {
        return RoundUp(count, kBlockBytes / sizeof(T));
    }

    AscendC::TQue<TPosition::VECIN, 2> weight_queue_;
    AscendC::TQue<TPosition::VECIN, 1> hidden_queue_;
    AscendC::TQue<TPosition::VECOUT, 2> z_queue_;
    AscendC::TBuf<TPosition::VECCALC> wide_hidden_, products_, eighths_, last_sums_, part_;
    GlobalTensor<T> hidden_, weight_;
    GlobalTensor<int32_t> offsets_;
    GlobalTensor<float> z_;
    Window<int32_t> ids_;
    uint32_t tokens_, pairs_, channels_, width_, stride_, tile_rows_;
};

template <typename T>
__aicore__ inline void Run(GM_ADDR hidden, GM_ADDR weight, GM_ADDR ids, GM_ADDR offsets, GM_ADDR z,
                           uint32_t tokens, uint32_t rows, uint32_t pairs,
                           uint32_t channels) {
    AscendC::TPipe pipe;
    GatherDot<T> kernel;
    kernel.Init(&pipe, hidden, weight, ids, offsets, z, tokens, rows, pairs, channels);
    kernel.Process();
}

}  // namespace replay

// Spelt out, not made by a macro: CANN's build reads the signatures off this file.
extern "C" __global__ __aicore__ void gather_dot_fp32(GM_ADDR hidden, GM_ADDR weight, GM_ADDR ids,
                                                      GM_ADDR offsets, GM_ADDR z, uint32_t tokens,
                                                      uint32_t rows, uint32_t pairs,
                                                      uint32_t channels) {
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
    replay::Run<float>(hidden, weight, ids, offsets, z, tokens, rows, pairs, channels);
}

extern "C" __global__ __aicore__ void gather_dot_fp16(GM_ADDR hidden, GM_ADDR weight, GM_ADDR ids,
                                                      GM_ADDR offsets, GM_ADDR z, uint32_t tokens,
                                                      uint32_t rows, uint32_t pairs,
                                                      uint32_t channels) {
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
    replay::Run<half>(hidden, weight, ids, offsets, z, tokens, rows, pairs, channels);
}

extern "C" __global__ __aicore__ void gather_dot_bf16(GM_ADDR hidden, GM_ADDR weight, GM_ADDR ids,
                                                      GM_ADDR offsets, GM_ADDR z, uint32_t tokens,
                                                      uint32_t rows, uint32_t pairs,
                                                      uint32_t channels) {
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
    replay::Run<bfloat16_t>(hidden, weight, ids, offsets, z, tokens, rows, pairs, channels);
}
