// maxima[t, b] = the largest of logits[t, 64 b : 64 b + 64], and the row's mass in two parts:
//     sum of round(exp(logits[t, i] - largest[t]) 2^38) over i = 2^19 sum(sums[t, 0]) + sum(sums[t, 1])
//
// logits [rows, size] of one dtype, rows `stride` elements apart; largest [rows] fp32, a row's
// maximum over all shards; maxima [rows, CeilDiv(size, 64) rounded up to 16] fp32; sums
// [rows, 2, lanes] int32, lanes a power of two from 64 to 2048, size <= 2048 lanes.
//
// A mass has the bits of token_masses in megatron_replay/selection/shard_selection.py: every
// instruction here rounds one fp32 operation, to nearest and halves to even, or is exact. None
// multiplies and adds, as Axpy does. Integers are summed, so the order is no matter.
#include "kernel_operator.h"
#include "tiles.h"
#include "window.h"

namespace replay {

using AscendC::GlobalTensor;
using AscendC::LocalTensor;
using AscendC::RoundMode;
using AscendC::TPosition;

// Ids of a block: the lanes of one repeat.
constexpr uint32_t kIds = 64;
// Ids of a tile: the largest power of two whose buffers fit. Sums are halved down to `lanes`.
constexpr uint32_t kTile = 4096;
// Neighbouring rows of maxima, of different cores, are in different lines of 64 bytes.
constexpr uint32_t kMaximaStep = 16;

// Of token_masses. The polynomial comes times 2^19, so that 2^k times it is a mass in units of
// 2^19: at most 2^19, and its sums fit 32 bits, as do those of what its rounding leaves.
constexpr float kLowest = -28.0f, kLog2E = 0x1.715476p+0f;
constexpr float kUnit = 0x1p19f;
constexpr float kC5 = 0x1.5bb9fcp-10f * kUnit, kC4 = 0x1.3cea9ep-7f * kUnit;
constexpr float kC3 = 0x1.c6b754p-5f * kUnit, kC2 = 0x1.ebf9bcp-3f * kUnit;
constexpr float kC1 = 0x1.62e42ap-1f * kUnit;
// One in the exponent of an fp32 number.
constexpr float kExponent = 0x1p23f;

template <typename T>
class SelectCandidates {
   public:
    __aicore__ inline void Init(AscendC::TPipe* pipe, GM_ADDR logits, GM_ADDR largest,
                                GM_ADDR maxima, GM_ADDR sums, uint32_t rows, uint32_t size,
                                uint32_t stride, uint32_t lanes) {
        rows_ = rows;
        size_ = size;
        stride_ = stride;
        lanes_ = lanes;
        maxima_stride_ = RoundUp(CeilDiv(size, kIds), kMaximaStep);

        logits_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(logits),
                                static_cast<uint64_t>(rows - 1) * stride + size);
        maxima_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(maxima),
                                static_cast<uint64_t>(rows) * maxima_stride_);
        sums_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(sums),
                              static_cast<uint64_t>(rows) * 2 * lanes);
        largest_.Init(pipe, largest, rows);
        pipe->InitBuffer(tile_queue_, 2, kTile * sizeof(T));
        pipe->InitBuffer(maxima_queue_, 2, kTile / kIds * sizeof(float));
        pipe->InitBuffer(sums_queue_, 1, 2 * lanes * sizeof(int32_t));
        pipe->InitBuffer(high_sums_, kTile * sizeof(int32_t));
        pipe->InitBuffer(low_sums_, kTile * sizeof(int32_t));
        pipe->InitBuffer(f_, kTile * sizeof(float));
        pipe->InitBuffer(k_, kTile * sizeof(float));
        pipe->InitBuffer(square_, kTile * sizeof(float));
        pipe->InitBuffer(p_, kTile * sizeof(float));
        pipe->InitBuffer(odd_, kTile * sizeof(float));
    }

    __aicore__ inline void Process() {
        const uint32_t blocks = AscendC::GetBlockNum(), block = AscendC::GetBlockIdx();
        const uint32_t share = CeilDiv(rows_, blocks);
        const uint32_t stop = Min(share * (block + 1), rows_);
        for (uint32_t row = share * block; row < stop; ++row) {
            const float largest = largest_.At(row);
            AscendC::Duplicate(high_sums_.Get<int32_t>(), 0, static_cast<int32_t>(kTile));
            AscendC::Duplicate(low_sums_.Get<int32_t>(), 0, static_cast<int32_t>(kTile));
            for (uint32_t start = 0; start < size_; start += kTile) {
                const uint32_t count = Min(kTile, size_ - start);
                Load(row, start, count);
                Tile(row, start, count, largest);
            }
            StoreSums(row);
        }
    }

   private:
    static constexpr bool kWidens = sizeof(T) != sizeof(float);

    __aicore__ inline void Load(uint32_t row, uint32_t start, uint32_t count) {
        LocalTensor<T> tile = tile_queue_.template AllocTensor<T>();
        LoadRow(tile, logits_[static_cast<uint64_t>(row) * stride_ + start], count);
        tile_queue_.EnQue(tile);
    }

    __aicore__ inline void Tile(uint32_t row, uint32_t start, uint32_t count, float largest) {
        LocalTensor<T> tile = tile_queue_.template DeQue<T>();
        const LocalTensor<float> z = Widened(tile, count);
        StoreMaxima(row, start, z, count);
        Sync();
        const auto n = static_cast<int32_t>(count);
        AscendC::Adds(f_.Get<float>(), z, -largest, n);
        tile_queue_.FreeTensor(tile);
        Sync();
        AddMasses(n);
    }

    __aicore__ inline LocalTensor<float> Widened(const LocalTensor<T>& tile, uint32_t count) {
        if constexpr (kWidens) {
            LocalTensor<float> z = f_.Get<float>();
            AscendC::Cast(z, tile, RoundMode::CAST_NONE, count);
            Sync();
            return z;
        } else {
            return tile;
        }
    }

    // A repeat a block; the last of a row may be short.
    __aicore__ inline void StoreMaxima(uint32_t row, uint32_t start, const LocalTensor<float>& z,
                                       uint32_t count) {
        const auto order = AscendC::ReduceOrder::ORDER_ONLY_VALUE;
        const auto ids = static_cast<int32_t>(kIds);
        const uint32_t whole = count / kIds, rest = count % kIds;
        LocalTensor<float> maxima = maxima_queue_.template AllocTensor<float>();
        if (whole > 0)
            AscendC::WholeReduceMax(maxima, z, ids, static_cast<int32_t>(whole), 1, 1, 8, order);
        if (rest > 0) {
            Sync();
            AscendC::WholeReduceMax(maxima[whole], z[whole * kIds], static_cast<int32_t>(rest), 1,
                                    1, 1, 8, order);
        }
        maxima_queue_.EnQue(maxima);
        maxima = maxima_queue_.template DeQue<float>();
        StoreRow(maxima_[static_cast<uint64_t>(row) * maxima_stride_ + start / kIds], maxima,
                 CeilDiv(count, kIds));
        maxima_queue_.FreeTensor(maxima);
    }

    // Adds the masses of n differences z - largest, which are in f_, to the sums of their lanes.
    __aicore__ inline void AddMasses(int32_t n) {
        const auto rint = RoundMode::CAST_RINT;
        const auto count = static_cast<uint32_t>(n);
        LocalTensor<float> f = f_.Get<float>(), k = k_.Get<float>(), square = square_.Get<float>();
        LocalTensor<float> p = p_.Get<float>(), odd = odd_.Get<float>();
        AscendC::Maxs(f, f, kLowest, n);
        Sync();
        AscendC::Muls(f, f, kLog2E, n);
        Sync();
        AscendC::Cast(k, f, rint, count);
        Sync();
        AscendC::Sub(f, f, k, n);
        Sync();
        AscendC::Mul(square, f, f, n);
        AscendC::Muls(p, f, kC5, n);
        AscendC::Muls(odd, f, kC3, n);
        AscendC::Muls(k, k, kExponent, n);
        Sync();
        AscendC::Adds(p, p, kC4, n);
        AscendC::Adds(odd, odd, kC2, n);
        AscendC::Muls(f, f, kC1, n);
        AscendC::Cast(k.ReinterpretCast<int32_t>(), k, rint, count);
        Sync();
        AscendC::Mul(p, p, square, n);
        AscendC::Adds(f, f, kUnit, n);
        Sync();
        AscendC::Add(p, p, odd, n);
        Sync();
        AscendC::Mul(p, p, square, n);
        Sync();
        AscendC::Add(p, p, f, n);
        Sync();
        // 2^k p, exactly: p is normal, and so is the result.
        LocalTensor<int32_t> bits = p.ReinterpretCast<int32_t>();
        AscendC::Add(bits, bits, k.ReinterpretCast<int32_t>(), n);
        Sync();
        // The mass is 2^19 high + low, exactly before low is rounded; 2^19 high is even.
        LocalTensor<float> high = square, low = p;
        AscendC::Cast(high, p, rint, count);
        Sync();
        AscendC::Sub(low, p, high, n);
        Sync();
        AscendC::Muls(low, low, kUnit, n);
        AscendC::Cast(high.ReinterpretCast<int32_t>(), high, rint, count);
        Sync();
        AscendC::Cast(low.ReinterpretCast<int32_t>(), low, rint, count);
        AddTo(high_sums_.Get<int32_t>(), high.ReinterpretCast<int32_t>(), n);
        Sync();
        AddTo(low_sums_.Get<int32_t>(), low.ReinterpretCast<int32_t>(), n);
        Sync();
    }

    // The sums of kTile lanes, in `lanes`.
    __aicore__ inline void StoreSums(uint32_t row) {
        LocalTensor<int32_t> high = high_sums_.Get<int32_t>(), low = low_sums_.Get<int32_t>();
        uint32_t held = kTile / 2;
        for (; held > lanes_; held /= 2) {
            AddTo(high, high[held], static_cast<int32_t>(held));
            AddTo(low, low[held], static_cast<int32_t>(held));
            Sync();
        }
        const auto n = static_cast<int32_t>(held);
        LocalTensor<int32_t> sums = sums_queue_.template AllocTensor<int32_t>();
        AscendC::Add(sums, high, high[held], n);
        AscendC::Add(sums[held], low, low[held], n);
        sums_queue_.EnQue(sums);
        sums = sums_queue_.template DeQue<int32_t>();
        StoreRow(sums_[static_cast<uint64_t>(row) * 2 * held], sums, 2 * held);
        sums_queue_.FreeTensor(sums);
        Sync();
    }

    __aicore__ inline void AddTo(const LocalTensor<int32_t>& sums, const LocalTensor<int32_t>& more,
                                 int32_t n) {
        AscendC::Add(sums, sums, more, n);
    }

    __aicore__ inline void Sync() { AscendC::PipeBarrier<PIPE_V>(); }

    AscendC::TQue<TPosition::VECIN, 2> tile_queue_;
    AscendC::TQue<TPosition::VECOUT, 2> maxima_queue_;
    AscendC::TQue<TPosition::VECOUT, 1> sums_queue_;
    AscendC::TBuf<TPosition::VECCALC> high_sums_, low_sums_, f_, k_, square_, p_, odd_;
    GlobalTensor<T> logits_;
    GlobalTensor<float> maxima_;
    GlobalTensor<int32_t> sums_;
    Window<float> largest_;
    uint32_t rows_, size_, stride_, lanes_, maxima_stride_;
};

template <typename T>
__aicore__ inline void Run(GM_ADDR logits, GM_ADDR largest, GM_ADDR maxima, GM_ADDR sums,
                           uint32_t rows, uint32_t size, uint32_t stride, uint32_t lanes) {
    AscendC::TPipe pipe;
    SelectCandidates<T> kernel;
    kernel.Init(&pipe, logits, largest, maxima, sums, rows, size, stride, lanes);
    kernel.Process();
}

}  // namespace replay

// Spelt out, not made by a macro: CANN's build reads the signatures off this file.
extern "C" __global__ __aicore__ void select_candidates_fp32(GM_ADDR logits, GM_ADDR largest,
                                                             GM_ADDR maxima, GM_ADDR sums,
                                                             uint32_t rows, uint32_t size,
                                                             uint32_t stride, uint32_t lanes) {
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
    replay::Run<float>(logits, largest, maxima, sums, rows, size, stride, lanes);
}

extern "C" __global__ __aicore__ void select_candidates_fp16(GM_ADDR logits, GM_ADDR largest,
                                                             GM_ADDR maxima, GM_ADDR sums,
                                                             uint32_t rows, uint32_t size,
                                                             uint32_t stride, uint32_t lanes) {
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
    replay::Run<half>(logits, largest, maxima, sums, rows, size, stride, lanes);
}

extern "C" __global__ __aicore__ void select_candidates_bf16(GM_ADDR logits, GM_ADDR largest,
                                                             GM_ADDR maxima, GM_ADDR sums,
                                                             uint32_t rows, uint32_t size,
                                                             uint32_t stride, uint32_t lanes) {
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
    replay::Run<bfloat16_t>(logits, largest, maxima, sums, rows, size, stride, lanes);
}
