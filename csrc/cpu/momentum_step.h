// The optimizer's two passes over memory; megatron_replay/optim/momentum_step.py has the
// equations. Pointers may start anywhere; tensors of one call must not overlap.
#pragma once

#include <cstdint>
#include <vector>

// As optim.momentum_step.Coefficients packs them.
struct Coefficients {
    float proceed, keep_m, take_g, clip, keep_v, take_v, scale_v, eps, decay, move;
};
static_assert(sizeof(Coefficients) == 10 * sizeof(float));

struct Step {
    std::vector<float*> params;
    std::vector<const float*> grads;
    std::vector<float*> exp_avgs, exp_avg_sqs;
    std::vector<std::uint16_t*> copies;  // bf16; none, or one for each tensor
    std::vector<std::int64_t> sizes;
};

// sums[tensor] = (<m, g>, |m|^2, |g|^2)
void dot_products(const std::vector<const float*>& exp_avgs, const std::vector<const float*>& grads,
                  const std::vector<std::int64_t>& sizes, double* sums, int threads);

// sums[tensor] = |g|^2
void square_sums(const std::vector<const float*>& grads, const std::vector<std::int64_t>& sizes,
                 double* sums, int threads);

// sums[tensor] = sum of u^2. Coefficients of tensor i: coefficients[i * stride], stride 0 or 1.
void momentum_step(const Step& step, const Coefficients* coefficients, std::int64_t stride,
                   bool bounded, double* sums, int threads);

// out = atan2(y, x) for x >= 0, for the tests.
void arctangent(const float* y, const float* x, float* out, std::int64_t size);
