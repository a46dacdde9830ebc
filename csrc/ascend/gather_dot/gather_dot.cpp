#include "gather_dot.h"

#define GATHER_DOT(name)                                                                       \
    std::uint32_t aclrtlaunch_##name(std::uint32_t blocks, aclrtStream stream, void* hidden,   \
                                     void* weight, void* ids, void* offsets, void* z,          \
                                     std::uint32_t tokens, std::uint32_t rows,                 \
                                     std::uint32_t pairs, std::uint32_t channels)
extern "C" {
GATHER_DOT(gather_dot_fp32);
GATHER_DOT(gather_dot_fp16);
GATHER_DOT(gather_dot_bf16);
}

namespace replay {

void gather_dot(Address to, std::uint32_t blocks, Dtype dtype, Address hidden, Address weight,
                Address ids, Address offsets, Address z, const GatherDotSizes& sizes) {
    launch_for(dtype, "gather_dot", aclrtlaunch_gather_dot_fp32, aclrtlaunch_gather_dot_fp16,
               aclrtlaunch_gather_dot_bf16, [&](auto* kernel) {
                   return kernel(blocks, stream(to), memory(hidden), memory(weight), memory(ids),
                                 memory(offsets), memory(z), sizes.tokens, sizes.rows, sizes.pairs,
                                 sizes.channels);
               });
}

}  // namespace replay
