// out[rows[s], :] += sum of coefficients[p] * source[indices[p], :] over the pairs p of segment s;
// segment_axpy_kernel.cpp has shapes.
#ifndef REPLAY_ASCEND_SEGMENT_AXPY_H
#define REPLAY_ASCEND_SEGMENT_AXPY_H

#include "host.h"

namespace replay {

struct SegmentAxpySizes {
    std::uint32_t sources, outputs, segments, pairs, channels;
};

// `rows` 0: segment s adds to row s.
void segment_axpy(Address stream, std::uint32_t blocks, Dtype dtype, Address source,
                  Address indices, Address coefficients, Address offsets, Address rows, Address out,
                  const SegmentAxpySizes& sizes);

}  // namespace replay

#endif
