// The pairs of a position and a candidate in the orders in which the restricted head takes them.
#pragma once

#include <cstdint>
#include <vector>

struct HeadPairs {
    // As in RestrictedHead; ids ascend in each set.
    HeadPairs(const std::int32_t* ids, const std::int64_t* offsets, std::int64_t positions,
              std::int64_t rows);

    std::int64_t count() const { return offsets.back(); }
    std::int64_t positions() const { return static_cast<std::int64_t>(order.size()); }
    std::int64_t distinct() const { return static_cast<std::int64_t>(row.size()); }
    std::int64_t slices() const { return static_cast<std::int64_t>(cuts.size()) - 1; }

    // A thread takes so many pairs at a time, about, and at most so many ids.
    static constexpr std::int64_t kSlicePairs = 4096, kSliceRows = 256;

    std::vector<std::int64_t> offsets;  // [N + 1], of each position's pairs
    std::vector<std::int32_t> order;    // [N], the positions, those with like sets together
    // Sorted by id, those of one id in the order of positions.
    std::vector<std::int32_t> row;     // [U], the ids, ascending
    std::vector<std::int64_t> starts;  // [U + 1], of each id's pairs
    std::vector<std::int32_t> rank;    // [P], of the position in the order
    std::vector<std::int64_t> cuts;    // slice i has ids cuts[i] to cuts[i + 1]
    // Of each pair in the order in which sets came.
    std::vector<std::int32_t> place;  // [P], where it is, sorted
    std::vector<std::int32_t> slot;   // [P], its id is row[slot]

  private:
    void order_by_likeness(const std::int32_t* ids, std::int64_t positions);
    void sort_by_id(const std::int32_t* ids, std::int64_t rows);
};
