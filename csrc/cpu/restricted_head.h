// The restricted head's arithmetic on one shard, position scope;
// megatron_replay/loss/backends.py has the equations and what every argument is.
//
// N positions, V rows of the weight, H channels, P pairs of a position and a candidate, U distinct
// candidates. Pointers may start anywhere. Every sum is one thread's, in an order that does not
// depend on their number: so the bits do not either.
#pragma once

#include <cstdint>
#include <vector>

#include "head_pairs.h"

// [., H], rows of fp32 or bf16, a stride (in elements) apart.
struct Operand {
    const void* data;
    std::int64_t stride;
    bool is_bf16;
};

class RestrictedHead {
  public:
    // ids: int32 [P], each in [0, V), ascending in each set. offsets: int64 [N + 1]. labels: int64
    // [N]. None is kept.
    RestrictedHead(const std::int32_t* ids, const std::int64_t* offsets,
                   const std::int64_t* labels, std::int64_t positions, std::int64_t rows,
                   int threads);

    // Fills max, sum and label_logit, [N] each.
    void forward(const Operand& hidden, const Operand& weight, std::int64_t channels, float* max,
                 float* sum, float* label_logit, int threads);

    // Fills hidden_grad [N, H], adds to weight_grad [V, H]; either may be null.
    void backward(const Operand& hidden, const Operand& weight, std::int64_t channels,
                  const float* top, const float* total, const float* grad, float* hidden_grad,
                  float* weight_grad, std::int64_t weight_grad_stride, int threads);

  private:
    HeadPairs pairs_;
    std::vector<std::int64_t> label_;  // [N], the label's pair in its set, -1 if it is none
    std::vector<float> logits_;        // [P], kept for backward
};
