// Block maxima and masses of rows of logits; select_candidates_kernel.cpp has shapes.
#ifndef REPLAY_ASCEND_SELECT_CANDIDATES_H
#define REPLAY_ASCEND_SELECT_CANDIDATES_H

#include "host.h"

namespace replay {

struct SelectCandidatesSizes {
    std::uint32_t rows, size, stride, lanes;
};

void select_candidates(Address stream, std::uint32_t blocks, Dtype dtype, Address logits,
                       Address largest, Address maxima, Address sums,
                       const SelectCandidatesSizes& sizes);

}  // namespace replay

#endif
