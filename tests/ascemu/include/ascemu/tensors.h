// Views of global memory and of the unified buffer, and the two 16-bit floats.
#ifndef ASCEMU_TENSORS_H
#define ASCEMU_TENSORS_H

#include <type_traits>

#include "global_memory.h"

#if defined(__aarch64__)
using half = __fp16;
#else
using half = _Float16;
#endif

// No operators: the vector unit of a 910B has no arithmetic for it either.
struct bfloat16_t {
    std::uint16_t bits;

    bfloat16_t() = default;
    explicit bfloat16_t(float value) {
        std::uint32_t word;
        std::memcpy(&word, &value, sizeof word);
        const std::uint32_t rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
        bits = static_cast<std::uint16_t>(value != value ? 0x7fc0u : rounded);
    }
    explicit operator float() const {
        const std::uint32_t word = static_cast<std::uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &word, sizeof value);
        return value;
    }
};

namespace AscendC {

enum class TPosition { GM, VECIN, VECOUT, VECCALC };

template <typename T>
class GlobalTensor {
   public:
    void SetGlobalBuffer(T* data, std::uint64_t size) {
        data_ = data;
        size_ = size;
    }

    GlobalTensor operator[](std::uint64_t offset) const {
        ascemu::enter("GlobalTensor[]");
        ascemu::require(offset <= size_, "offset " + std::to_string(offset) + " of a tensor of " +
                                             std::to_string(size_) + " elements");
        GlobalTensor rest;
        rest.SetGlobalBuffer(data_ + offset, size_ - offset);
        return rest;
    }

    T GetValue(std::uint64_t i) const {
        const ascemu::Instruction read("GlobalTensor::GetValue", PIPE_S);
        ascemu::touch_global(read, at(i, 1), sizeof(T), false);
        return data_[i];
    }

    // Elements `i` to `i + count`, for a caller that touches them.
    T* at(std::uint64_t i, std::uint64_t count) const {
        ascemu::require(i + count <= size_, "elements " + std::to_string(i) + " to " +
                                                std::to_string(i + count) + " of a tensor of " +
                                                std::to_string(size_) + " in global memory");
        return data_ + i;
    }

   private:
    T* data_ = nullptr;
    std::uint64_t size_ = 0;
};

template <typename T>
class LocalTensor {
   public:
    LocalTensor() = default;
    LocalTensor(std::uint8_t* begin, std::size_t bytes, int slot = -1)
        : begin_(begin), end_(begin + bytes), slot_(slot) {}

    LocalTensor operator[](std::uint32_t offset) const {
        ascemu::enter("LocalTensor[]");
        ascemu::require(begin_ + offset * sizeof(T) <= end_,
                        "offset " + std::to_string(offset) + " of a tensor of " +
                            std::to_string(GetSize()) + " elements");
        LocalTensor rest = *this;
        rest.begin_ += offset * sizeof(T);
        return rest;
    }

    T GetValue(std::uint32_t i) const {
        const ascemu::Instruction read("LocalTensor::GetValue", PIPE_S);
        read.reads(bytes(i, 1), sizeof(T));
        return value(i);
    }

    std::uint32_t GetSize() const {
        return static_cast<std::uint32_t>((end_ - begin_) / sizeof(T));
    }

    template <typename U>
    LocalTensor<U> ReinterpretCast() const {
        return LocalTensor<U>(begin_, end_ - begin_, slot_);
    }

    // Elements `i` to `i + count`, for an instruction that touches them.
    std::uint8_t* bytes(std::uint64_t i, std::uint64_t count) const {
        ascemu::require(begin_ != nullptr, "a tensor without a buffer");
        ascemu::require(begin_ + (i + count) * sizeof(T) <= end_,
                        "elements " + std::to_string(i) + " to " + std::to_string(i + count) +
                            " of a tensor of " + std::to_string(GetSize()) +
                            " in the unified buffer");
        return begin_ + i * sizeof(T);
    }

    T& value(std::uint64_t i) const { return reinterpret_cast<T*>(begin_)[i]; }

    void aligned(std::size_t to) const {
        ascemu::require((begin_ - ascemu::core().buffer.data()) % to == 0,
                        "an operand is not aligned to " + std::to_string(to) + " bytes");
    }

    int slot() const { return slot_; }

   private:
    std::uint8_t* begin_ = nullptr;
    std::uint8_t* end_ = nullptr;
    int slot_ = -1;
};

}  // namespace AscendC

#endif
