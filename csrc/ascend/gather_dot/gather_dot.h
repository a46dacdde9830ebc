// z[p] = <hidden[t], weight[ids[p]]> for every pair p of token t; gather_dot_kernel.cpp has shapes.
#ifndef REPLAY_ASCEND_GATHER_DOT_H
#define REPLAY_ASCEND_GATHER_DOT_H

#include "host.h"

namespace replay {

struct GatherDotSizes {
    std::uint32_t tokens, rows, pairs, channels;
};

void gather_dot(Address stream, std::uint32_t blocks, Dtype dtype, Address hidden, Address weight,
                Address ids, Address offsets, Address z, const GatherDotSizes& sizes);

}  // namespace replay

#endif
