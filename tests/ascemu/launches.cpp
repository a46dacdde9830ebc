// The functions that CANN's build makes of the kernels: aclrtlaunch_NAME, here on emulated cores.
#include "kernel_operator.h"

namespace {

using Bytes = std::uint8_t*;

template <class T>
std::size_t bytes(std::uint64_t rows, std::uint64_t columns = 1) {
    return rows * columns * sizeof(T);
}

template <class Kernel, class... Arguments>
std::uint32_t launch(const char* name, std::uint32_t blocks, std::vector<ascemu::Buffer> touched,
                     Kernel kernel, Arguments... arguments) {
    ascemu::Core& core = ascemu::core();
    ascemu::buffers() = std::move(touched);
    for (int block = 0; block < static_cast<int>(blocks); ++block) {
        core.start(name, block, static_cast<int>(blocks));
        kernel(arguments...);
        core.call = "end";
        ascemu::require(core.vector_only, "the kernel does not say that it needs no cube core");
        ascemu::require(core.flags.empty(), "a flag was set and never waited for");
        ascemu::require(core.left_behind.empty(), core.left_behind);
    }
    for (const ascemu::Buffer& buffer : ascemu::buffers()) ascemu::check_conflicts(buffer);
    return 0;
}

}  // namespace

extern "C" {

#define GATHER_DOT(NAME, T)                                                                       \
    void NAME(Bytes, Bytes, Bytes, Bytes, Bytes, std::uint32_t, std::uint32_t, std::uint32_t,     \
              std::uint32_t);                                                                     \
    std::uint32_t aclrtlaunch_##NAME(std::uint32_t blocks, void*, Bytes hidden, Bytes weight,     \
                                     Bytes ids, Bytes offsets, Bytes z, std::uint32_t tokens,     \
                                     std::uint32_t rows, std::uint32_t pairs,                     \
                                     std::uint32_t channels) {                                    \
        std::memset(z, 0xff, bytes<float>(pairs)); /* or what it held may be right by chance */   \
        return launch(#NAME, blocks,                                                              \
                      {{"hidden", hidden, bytes<T>(tokens, channels), false},                     \
                       {"weight", weight, bytes<T>(rows, channels), false},                       \
                       {"ids", ids, bytes<std::int32_t>(pairs), false},                           \
                       {"offsets", offsets, bytes<std::int32_t>(tokens + 1), false},              \
                       {"z", z, bytes<float>(pairs), true}},                                      \
                      NAME, hidden, weight, ids, offsets, z, tokens, rows, pairs, channels);      \
    }

GATHER_DOT(gather_dot_fp32, float)
GATHER_DOT(gather_dot_fp16, half)
GATHER_DOT(gather_dot_bf16, bfloat16_t)

#define SEGMENT_AXPY(NAME, T)                                                                     \
    void NAME(Bytes, Bytes, Bytes, Bytes, Bytes, Bytes, std::uint32_t, std::uint32_t,             \
              std::uint32_t, std::uint32_t, std::uint32_t, std::uint32_t);                        \
    std::uint32_t aclrtlaunch_##NAME(                                                             \
        std::uint32_t blocks, void*, Bytes source, Bytes indices, Bytes coefficients,             \
        Bytes offsets, Bytes rows, Bytes out, std::uint32_t sources, std::uint32_t outputs,       \
        std::uint32_t segments, std::uint32_t pairs, std::uint32_t channels,                      \
        std::uint32_t listed) {                                                                   \
        return launch(#NAME, blocks,                                                              \
                      {{"source", source, bytes<T>(sources, channels), false},                    \
                       {"indices", indices, bytes<std::int32_t>(pairs), false},                   \
                       {"coefficients", coefficients, bytes<float>(pairs), false},                \
                       {"offsets", offsets, bytes<std::int32_t>(segments + 1), false},            \
                       {"rows", rows, listed ? bytes<std::int32_t>(segments) : 0, false},         \
                       {"out", out, bytes<float>(outputs, channels), true}},                      \
                      NAME, source, indices, coefficients, offsets, rows, out, sources, outputs,  \
                      segments, pairs, channels, listed);                                         \
    }

SEGMENT_AXPY(segment_axpy_fp32, float)
SEGMENT_AXPY(segment_axpy_fp16, half)
SEGMENT_AXPY(segment_axpy_bf16, bfloat16_t)

#define SELECT_CANDIDATES(NAME, T)                                                                \
    void NAME(Bytes, Bytes, Bytes, Bytes, std::uint32_t, std::uint32_t, std::uint32_t,            \
              std::uint32_t);                                                                     \
    std::uint32_t aclrtlaunch_##NAME(std::uint32_t blocks, void*, Bytes logits, Bytes largest,    \
                                     Bytes maxima, Bytes sums, std::uint32_t rows,                \
                                     std::uint32_t size, std::uint32_t stride,                    \
                                     std::uint32_t lanes) {                                       \
        const std::size_t all_maxima = bytes<float>(rows, (size + 1023) / 1024 * 16);             \
        std::memset(maxima, 0xff, all_maxima);                                                    \
        std::memset(sums, 0xff, bytes<std::int32_t>(rows, 2 * lanes));                            \
        return launch(#NAME, blocks,                                                              \
                      {{"logits", logits, bytes<T>(rows - 1, stride) + bytes<T>(size), false},    \
                       {"largest", largest, bytes<float>(rows), false},                           \
                       {"maxima", maxima, all_maxima, true},                                      \
                       {"sums", sums, bytes<std::int32_t>(rows, 2 * lanes), true}},               \
                      NAME, logits, largest, maxima, sums, rows, size, stride, lanes);            \
    }

SELECT_CANDIDATES(select_candidates_fp32, float)
SELECT_CANDIDATES(select_candidates_fp16, half)
SELECT_CANDIDATES(select_candidates_bf16, bfloat16_t)
}
