// The restricted head's arithmetic on one shard, position scope;
// megatron_replay/functional/shard_head.py has the equations and what every argument is.
//
// N positions, V rows of the weight, H channels, P pairs of a position and a candidate, U distinct
// candidates. Pointers may start anywhere. Every sum is one thread's, in an order that does not
// depend on their number: so the bits do not either.
#pragma once

#include <cstdint>
#include <vector>

// [., H], rows of fp32 or bf16, a stride (in elements) apart.
struct Operand {
    const void* data;
    std::int64_t stride;
    bool is_bf16;
};

class RestrictedHead {
  public:
    // ids: int32 [P], each in [0, V). offsets: int64 [N + 1]. labels: int64 [N]. None is kept.
    RestrictedHead(const std::int32_t* ids, const std::int64_t* offsets,
                   const std::int64_t* labels, std::int64_t positions, std::int64_t rows);

    std::int64_t distinct() const { return static_cast<std::int64_t>(rows_.size()); }

    // Fills max, sum and gold, [N] each.
    void forward(const Operand& hidden, const Operand& weight, std::int64_t channels, float* max,
                 float* sum, float* gold, int threads);

    // Fills hidden_grad [N, H], adds to weight_grad [V, H]; either may be null.
    void backward(const Operand& hidden, const Operand& weight, std::int64_t channels,
                  const float* top, const float* total, const float* grad, float* hidden_grad,
                  float* weight_grad, std::int64_t weight_grad_stride, int threads);

  private:
    std::int64_t positions() const { return static_cast<std::int64_t>(offsets_.size()) - 1; }
    void find_labels(const std::int32_t* ids, const std::int64_t* labels);
    void sort_by_id(const std::int32_t* ids, std::int64_t rows);

    std::vector<std::int64_t> offsets_;  // [N + 1], of each position's pairs
    std::vector<std::int64_t> label_;    // [N], the label's pair, -1 if it is not a candidate
    std::vector<float> logits_;          // [P], kept for backward
    // The pairs by id, those of one id by position.
    std::vector<std::int32_t> rows_;     // [U], the ids, ascending
    std::vector<std::int64_t> starts_;   // [U + 1], of each id's places
    std::vector<std::int32_t> position_; // [P], of the pair at each place
    std::vector<std::int32_t> place_;    // [P], of each pair
    std::vector<std::int32_t> slot_;     // [P], each pair's id, as its index in rows_
    std::vector<std::int64_t> cuts_;     // ids that threads take at a time: cuts_[i] to cuts_[i+1]
};
