#include "segment_axpy.h"

#define SEGMENT_AXPY(name)                                                                     \
    std::uint32_t aclrtlaunch_##name(std::uint32_t blocks, aclrtStream stream, void* source,   \
                                     void* indices, void* coefficients, void* offsets,         \
                                     void* rows, void* out, std::uint32_t sources,             \
                                     std::uint32_t outputs, std::uint32_t segments,            \
                                     std::uint32_t pairs, std::uint32_t channels,              \
                                     std::uint32_t listed)
extern "C" {
SEGMENT_AXPY(segment_axpy_fp32);
SEGMENT_AXPY(segment_axpy_fp16);
SEGMENT_AXPY(segment_axpy_bf16);
}

namespace replay {

void segment_axpy(Address to, std::uint32_t blocks, Dtype dtype, Address source, Address indices,
                  Address coefficients, Address offsets, Address rows, Address out,
                  const SegmentAxpySizes& sizes) {
    const std::uint32_t listed = rows != 0;
    launch_for(dtype, "segment_axpy", aclrtlaunch_segment_axpy_fp32, aclrtlaunch_segment_axpy_fp16,
               aclrtlaunch_segment_axpy_bf16, [&](auto* kernel) {
                   return kernel(blocks, stream(to), memory(source), memory(indices),
                                 memory(coefficients), memory(offsets), memory(rows), memory(out),
                                 sizes.sources, sizes.outputs, sizes.segments, sizes.pairs,
                                 sizes.channels, listed);
               });
}

}  // namespace replay
