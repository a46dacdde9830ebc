// A list in global memory, read element by element by the scalar unit through a copy of a stretch.
#ifndef REPLAY_ASCEND_WINDOW_H
#define REPLAY_ASCEND_WINDOW_H

#include "tiles.h"

namespace replay {

// A scalar read of global memory stalls for hundreds of cycles, and a kernel needs one or two
// elements of a list for every row that it moves.
template <typename T>
class Window {
   public:
    static constexpr uint32_t kSize = 256;
    static constexpr uint32_t kBytes = kSize * sizeof(T);

    __aicore__ inline void Init(AscendC::TPipe* pipe, GM_ADDR list, uint32_t size) {
        pipe_ = pipe;
        size_ = size;
        list_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(list), size);
        pipe->InitBuffer(buffer_, kBytes);
    }

    __aicore__ inline T At(uint32_t i) {
        if (i < start_ || i >= start_ + held_) Fetch(i);
        return buffer_.template Get<T>().GetValue(i - start_);
    }

   private:
    __aicore__ inline void Fetch(uint32_t start) {
        start_ = start;
        held_ = Min(kSize, size_ - start);
        // The scalar unit is done with the old elements; then it waits for the new ones.
        const auto read = static_cast<event_t>(pipe_->FetchEventID(AscendC::HardEvent::S_MTE2));
        AscendC::SetFlag<AscendC::HardEvent::S_MTE2>(read);
        AscendC::WaitFlag<AscendC::HardEvent::S_MTE2>(read);
        LoadRow(buffer_.template Get<T>(), list_[start], held_);
        const auto moved = static_cast<event_t>(pipe_->FetchEventID(AscendC::HardEvent::MTE2_S));
        AscendC::SetFlag<AscendC::HardEvent::MTE2_S>(moved);
        AscendC::WaitFlag<AscendC::HardEvent::MTE2_S>(moved);
    }

    AscendC::TPipe* pipe_;
    AscendC::TBuf<AscendC::TPosition::VECCALC> buffer_;
    AscendC::GlobalTensor<T> list_;
    uint32_t size_, start_ = 0, held_ = 0;
};

}  // namespace replay

#endif
