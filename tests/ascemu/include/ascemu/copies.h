// DataCopy and DataCopyPad, between global memory and the unified buffer.
#ifndef ASCEMU_COPIES_H
#define ASCEMU_COPIES_H

#include "tensors.h"

namespace AscendC {

// Strides are gaps between blocks: bytes in global memory, 32-byte blocks in the unified buffer.
struct DataCopyExtParams {
    std::uint16_t blockCount;
    std::uint32_t blockLen, srcStride, dstStride, rsv;
};

template <typename T>
struct DataCopyPadExtParams {
    bool isPad;
    std::uint8_t leftPadding, rightPadding;
    T paddingValue;
};

inline std::size_t WholeBlocks(std::size_t bytes) {
    return (bytes + ascemu::kBlock - 1) / ascemu::kBlock * ascemu::kBlock;
}

template <typename T>
void DataCopy(const LocalTensor<T>& to, const GlobalTensor<T>& from, std::uint32_t count) {
    const ascemu::Instruction move("DataCopy into the unified buffer", PIPE_MTE2);
    const std::size_t bytes = count * sizeof(T);
    ascemu::require(bytes > 0 && bytes % ascemu::kBlock == 0,
                    std::to_string(bytes) + " bytes are no multiple of 32");
    to.aligned(ascemu::kBlock);
    const T* source = from.at(0, count);
    ascemu::touch_global(move, source, bytes, false);
    move.writes(to.bytes(0, count), bytes);
    std::memcpy(to.bytes(0, count), source, bytes);
}

template <typename T>
void DataCopy(const GlobalTensor<T>& to, const LocalTensor<T>& from, std::uint32_t count) {
    const ascemu::Instruction move("DataCopy into global memory", PIPE_MTE3);
    const std::size_t bytes = count * sizeof(T);
    ascemu::require(bytes > 0 && bytes % ascemu::kBlock == 0,
                    std::to_string(bytes) + " bytes are no multiple of 32");
    from.aligned(ascemu::kBlock);
    T* target = to.at(0, count);
    ascemu::touch_global(move, target, bytes, true);
    move.reads(from.bytes(0, count), bytes);
    std::memcpy(target, from.bytes(0, count), bytes);
}

template <typename T>
void CheckBlocks(const DataCopyExtParams& copy) {
    ascemu::require(copy.blockCount >= 1 && copy.blockCount <= 4095,
                    "blockCount " + std::to_string(copy.blockCount) + " outside 1 to 4095");
    ascemu::require(copy.blockLen >= 1 && copy.blockLen <= 2097151,
                    "blockLen " + std::to_string(copy.blockLen) + " outside 1 to 2097151");
    ascemu::require(copy.blockLen % sizeof(T) == 0, "blockLen is no whole number of elements");
}

template <typename T>
void DataCopyPad(const LocalTensor<T>& to, const GlobalTensor<T>& from,
                 const DataCopyExtParams& copy, const DataCopyPadExtParams<T>& pad) {
    const ascemu::Instruction move("DataCopyPad into the unified buffer", PIPE_MTE2);
    CheckBlocks<T>(copy);
    to.aligned(ascemu::kBlock);
    const std::size_t left = pad.leftPadding * sizeof(T), right = pad.rightPadding * sizeof(T);
    ascemu::require(left <= ascemu::kBlock && right <= ascemu::kBlock, "padding of over 32 bytes");
    const std::size_t row = WholeBlocks(left + copy.blockLen + right);
    const bool filled = pad.isPad && left + right > 0;
    for (std::size_t b = 0; b < copy.blockCount; ++b) {
        const std::size_t source = b * (copy.blockLen + copy.srcStride);
        const std::size_t target = b * (row + copy.dstStride * ascemu::kBlock);
        ascemu::require(source % sizeof(T) == 0, "srcStride is no multiple of the element's size");
        const T* data = from.at(source / sizeof(T), copy.blockLen / sizeof(T));
        ascemu::touch_global(move, data, copy.blockLen, false);
        std::uint8_t* place = to.bytes(target / sizeof(T), row / sizeof(T));
        // What fills the last block is the padding value, or is left open.
        move.writes(place, row, filled);
        std::memset(place, 0xff, row);
        for (std::size_t i = 0; filled && i < row / sizeof(T); ++i)
            std::memcpy(place + i * sizeof(T), &pad.paddingValue, sizeof(T));
        move.writes(place + left, copy.blockLen);
        std::memcpy(place + left, data, copy.blockLen);
    }
}

template <typename T>
void DataCopyPad(const GlobalTensor<T>& to, const LocalTensor<T>& from,
                 const DataCopyExtParams& copy) {
    const ascemu::Instruction move("DataCopyPad into global memory", PIPE_MTE3);
    CheckBlocks<T>(copy);
    from.aligned(ascemu::kBlock);
    const std::size_t row = WholeBlocks(copy.blockLen);
    for (std::size_t b = 0; b < copy.blockCount; ++b) {
        const std::size_t source = b * (row + copy.srcStride * ascemu::kBlock);
        const std::size_t target = b * (copy.blockLen + copy.dstStride);
        ascemu::require(target % sizeof(T) == 0, "dstStride is no multiple of the element's size");
        T* place = to.at(target / sizeof(T), copy.blockLen / sizeof(T));
        ascemu::touch_global(move, place, copy.blockLen, true);
        const std::uint8_t* data = from.bytes(source / sizeof(T), copy.blockLen / sizeof(T));
        move.reads(data, copy.blockLen);
        std::memcpy(place, data, copy.blockLen);
    }
}

}  // namespace AscendC

#endif
