// Flags, barriers, and the buffers and queues that a TPipe hands out.
#ifndef ASCEMU_QUEUES_H
#define ASCEMU_QUEUES_H

#include <deque>
#include <exception>

#include "tensors.h"

namespace AscendC {

enum class HardEvent { MTE2_V, V_MTE2, MTE3_V, V_MTE3, MTE2_S, S_MTE2, V_S, S_V };

constexpr std::pair<int, int> Ends(HardEvent event) {
    switch (event) {
        case HardEvent::MTE2_V: return {PIPE_MTE2, PIPE_V};
        case HardEvent::V_MTE2: return {PIPE_V, PIPE_MTE2};
        case HardEvent::MTE3_V: return {PIPE_MTE3, PIPE_V};
        case HardEvent::V_MTE3: return {PIPE_V, PIPE_MTE3};
        case HardEvent::MTE2_S: return {PIPE_MTE2, PIPE_S};
        case HardEvent::S_MTE2: return {PIPE_S, PIPE_MTE2};
        case HardEvent::V_S: return {PIPE_V, PIPE_S};
        default: return {PIPE_S, PIPE_V};
    }
}

inline int FlagOf(HardEvent event, event_t id) {
    ascemu::require(id >= 0 && id < ascemu::kEvents, "an event id outside 0 to 7");
    return static_cast<int>(event) * ascemu::kEvents + id;
}

template <HardEvent event>
void SetFlag(event_t id) {
    ascemu::enter("SetFlag");
    const bool added =
        ascemu::core().flags.emplace(FlagOf(event, id), ascemu::snapshot(Ends(event).first)).second;
    ascemu::require(added, "the flag is set already");
}

template <HardEvent event>
void WaitFlag(event_t id) {
    ascemu::enter("WaitFlag");
    auto& flags = ascemu::core().flags;
    const auto found = flags.find(FlagOf(event, id));
    ascemu::require(found != flags.end(), "nothing sets the flag: the kernel would hang");
    ascemu::join(ascemu::core().knows[Ends(event).second], found->second);
    flags.erase(found);
}

template <pipe_t pipe>
void PipeBarrier() {
    static_assert(pipe != PIPE_S, "the scalar unit has no barrier");
    ascemu::enter("PipeBarrier");
    auto& c = ascemu::core();
    if constexpr (pipe == PIPE_ALL)
        for (auto& clock : c.knows) clock = c.issued;
    else
        c.knows[pipe][pipe] = c.issued[pipe];
}

// A buffer of a queue: who may have it, and what its last user knew when giving it on.
struct Slot {
    enum State { idle, allocated, queued, taken };
    std::uint8_t* begin;
    std::size_t bytes;
    State state = idle;
    ascemu::Clock filled{}, freed{};
};

template <TPosition position, int depth>
class TQue {
    static_assert(position == TPosition::VECIN || position == TPosition::VECOUT);
    static constexpr int kFiller = position == TPosition::VECIN ? PIPE_MTE2 : PIPE_V;
    static constexpr int kTaker = position == TPosition::VECIN ? PIPE_V : PIPE_MTE3;

   public:
    template <typename T>
    LocalTensor<T> AllocTensor() {
        ascemu::enter("AllocTensor");
        for (std::size_t i = 0; i < slots_.size(); ++i)
            if (slots_[i].state == Slot::idle) {
                slots_[i].state = Slot::allocated;
                ascemu::join(ascemu::core().knows[kFiller], slots_[i].freed);
                return LocalTensor<T>(slots_[i].begin, slots_[i].bytes, static_cast<int>(i));
            }
        ascemu::fail("no buffer of the queue is free: the kernel would hang");
    }

    template <typename T>
    void EnQue(const LocalTensor<T>& tensor) {
        ascemu::enter("EnQue");
        Slot& slot = of(tensor, "the tensor is not of this queue");
        ascemu::require(slot.state == Slot::allocated, "the tensor was not allocated for it");
        ascemu::require(waiting_.size() < depth, "the queue is full");
        slot.state = Slot::queued;
        slot.filled = ascemu::snapshot(kFiller);
        waiting_.push_back(tensor.slot());
    }

    template <typename T>
    LocalTensor<T> DeQue() {
        ascemu::enter("DeQue");
        ascemu::require(!waiting_.empty(), "the queue is empty: the kernel would hang");
        const int i = waiting_.front();
        waiting_.pop_front();
        slots_[i].state = Slot::taken;
        ascemu::join(ascemu::core().knows[kTaker], slots_[i].filled);
        return LocalTensor<T>(slots_[i].begin, slots_[i].bytes, i);
    }

    template <typename T>
    void FreeTensor(const LocalTensor<T>& tensor) {
        ascemu::enter("FreeTensor");
        Slot& slot = of(tensor, "the tensor is not of this queue");
        ascemu::require(slot.state != Slot::idle, "the tensor was freed already");
        ascemu::require(slot.state != Slot::queued, "the tensor waits in the queue");
        slot.state = Slot::idle;
        slot.freed = ascemu::snapshot(kTaker);
    }

    ~TQue() {
        for (const Slot& slot : slots_)
            if (slot.state != Slot::idle && std::uncaught_exceptions() == 0)
                ascemu::core().left_behind = "a tensor of a queue was never freed";
    }

    std::vector<Slot>& slots() { return slots_; }

   private:
    template <typename T>
    Slot& of(const LocalTensor<T>& tensor, const char* what) {
        const int slot = tensor.slot();
        ascemu::require(slot >= 0 && slot < static_cast<int>(slots_.size()), what);
        return slots_[slot];
    }

    std::vector<Slot> slots_;
    std::deque<int> waiting_;
};

// A buffer that the kernel itself keeps in order.
template <TPosition position>
class TBuf {
   public:
    template <typename T>
    LocalTensor<T> Get() const {
        ascemu::enter("TBuf::Get");
        ascemu::require(begin_ != nullptr, "InitBuffer was not called");
        return LocalTensor<T>(begin_, bytes_);
    }

    void set(std::uint8_t* begin, std::size_t bytes) {
        begin_ = begin;
        bytes_ = bytes;
    }

   private:
    std::uint8_t* begin_ = nullptr;
    std::size_t bytes_ = 0;
};

class TPipe {
   public:
    TPipe() {
        ascemu::require(ascemu::core().pipe == nullptr, "a core has one TPipe");
        ascemu::core().pipe = this;
    }
    ~TPipe() { ascemu::core().pipe = nullptr; }

    template <TPosition position, int depth>
    void InitBuffer(TQue<position, depth>& queue, std::uint8_t count, std::uint32_t bytes) {
        for (int i = 0; i < count; ++i) {
            std::uint8_t* begin = take(bytes);
            queue.slots().push_back({begin, bytes});
        }
    }

    template <TPosition position>
    void InitBuffer(TBuf<position>& buffer, std::uint32_t bytes) {
        buffer.set(take(bytes), bytes);
    }

    event_t FetchEventID(HardEvent event) {
        for (event_t id = 0; id < ascemu::kEvents; ++id)
            if (!ascemu::core().flags.count(FlagOf(event, id))) return id;
        ascemu::fail("all eight events are in use");
    }

   private:
    std::uint8_t* take(std::size_t bytes) {
        ascemu::enter("InitBuffer");
        auto& c = ascemu::core();
        ascemu::require(bytes > 0, "a buffer of 0 bytes");
        ascemu::require(++buffers_ <= 64, "more than 64 buffers");
        const std::size_t start = c.taken;
        c.taken += (bytes + ascemu::kBlock - 1) / ascemu::kBlock * ascemu::kBlock;
        ascemu::require(c.taken <= ascemu::kUnifiedBuffer,
                        std::to_string(c.taken) + " bytes do not fit the unified buffer's 196608");
        return c.buffer.data() + start;
    }

    int buffers_ = 0;
};

}  // namespace AscendC

#endif
