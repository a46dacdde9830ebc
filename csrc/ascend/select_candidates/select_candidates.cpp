#include "select_candidates.h"

#define SELECT_CANDIDATES(name)                                                                \
    std::uint32_t aclrtlaunch_##name(std::uint32_t blocks, aclrtStream stream, void* logits,   \
                                     void* largest, void* maxima, void* sums,                  \
                                     std::uint32_t rows, std::uint32_t size,                   \
                                     std::uint32_t stride, std::uint32_t lanes)
extern "C" {
SELECT_CANDIDATES(select_candidates_fp32);
SELECT_CANDIDATES(select_candidates_fp16);
SELECT_CANDIDATES(select_candidates_bf16);
}

namespace replay {

void select_candidates(Address to, std::uint32_t blocks, Dtype dtype, Address logits,
                       Address largest, Address maxima, Address sums,
                       const SelectCandidatesSizes& sizes) {
    launch_for(dtype, "select_candidates", aclrtlaunch_select_candidates_fp32,
               aclrtlaunch_select_candidates_fp16, aclrtlaunch_select_candidates_bf16,
               [&](auto* kernel) {
                   return kernel(blocks, stream(to), memory(logits), memory(largest),
                                 memory(maxima), memory(sums), sizes.rows, sizes.size,
                                 sizes.stride, sizes.lanes);
               });
}

}  // namespace replay
