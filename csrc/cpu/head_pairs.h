// The pairs of a position and a candidate in the orders in which the restricted head takes them.
#pragma once

#include <cstdint>
#include <vector>

struct HeadPairs {
    // As in RestrictedHead; ids ascend in each set.
    HeadPairs(const std::int32_t* ids, const std::int64_t* offsets, std::int64_t positions,
              std::int64_t rows, int threads);

    std::int64_t count() const { return offsets.back(); }
    std::int64_t positions() const { return static_cast<std::int64_t>(order.size()); }
    std::int64_t distinct() const { return static_cast<std::int64_t>(row.size()); }
    std::int64_t fours() const { return (positions() + 3) / 4; }
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
    std::vector<std::int32_t> place;   // [P], in the above, of each pair as sets came
    // Fours of positions of the order. A four's ids, each once, by which of its positions have it:
    // a mask from 1 to 15. Its pairs in the order of these ids, those of one id by position.
    std::vector<std::int64_t> four_starts;  // [F + 1], of each four's pairs
    std::vector<std::int32_t> four_counts;  // [F, 16], ids of each mask
    std::vector<std::int32_t> four_slots;   // [P], from a four's start on: its ids are row[slot]
    std::vector<std::int32_t> seat;         // [P], where fours have each pair as sets came

  private:
    void order_by_likeness(const std::int32_t* ids, std::int64_t positions);
    std::vector<std::int32_t> sort_by_id(const std::int32_t* ids, std::int64_t rows);
    void share_in_fours(const std::vector<std::int32_t>& slot, int threads);

    // An id of a four, and its pair with each position that has it, as sets came.
    struct Shared {
        std::int32_t slot, mask, pairs[4];
    };
    std::int64_t merge_four(std::int64_t f, const std::vector<std::int32_t>& slot,
                            std::vector<Shared>& found) const;
};
