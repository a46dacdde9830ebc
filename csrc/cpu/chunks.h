// Work over a list of tensors in chunks of a fixed size, which threads take in any order; what the
// chunks sum up to is added in the chunks' order. So a result has the same bits for any number of
// threads.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

// Elements. 128 KiB of each operand: small beside a tensor, large beside the cost of taking one.
constexpr std::int64_t kChunk = 1 << 15;
// Elements whose terms are added in fp32, by SIMD lanes; the sums of blocks are added in fp64.
constexpr std::int64_t kBlock = 1 << 10;

struct Chunk {
    std::size_t tensor;
    std::int64_t start, size;
};

inline std::vector<Chunk> split(const std::vector<std::int64_t>& sizes) {
    std::vector<Chunk> chunks;
    for (std::size_t tensor = 0; tensor < sizes.size(); ++tensor)
        for (std::int64_t start = 0; start < sizes[tensor]; start += kChunk)
            chunks.push_back({tensor, start, std::min(kChunk, sizes[tensor] - start)});
    return chunks;
}

// sums[tensor][k] = sum over the tensor's chunks of work(chunk)[k].
template <std::size_t K, class Work>
void sum_over_chunks(const std::vector<std::int64_t>& sizes, int threads, double* sums,
                     const Work& work) {
    const std::vector<Chunk> chunks = split(sizes);
    const std::int64_t count = static_cast<std::int64_t>(chunks.size());
    std::vector<std::array<double, K>> partial(chunks.size());
    const int team = static_cast<int>(std::clamp<std::int64_t>(count, 1, std::max(threads, 1)));
#pragma omp parallel for schedule(dynamic) num_threads(team)
    for (std::int64_t i = 0; i < count; ++i) partial[i] = work(chunks[i]);
    std::fill(sums, sums + sizes.size() * K, 0.0);
    for (std::size_t i = 0; i < chunks.size(); ++i)
        for (std::size_t k = 0; k < K; ++k) sums[chunks[i].tensor * K + k] += partial[i][k];
}
