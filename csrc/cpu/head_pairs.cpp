#include "head_pairs.h"

#include <algorithm>
#include <array>
#include <limits>

#include "levels.h"

namespace {

constexpr int kHashes = 3;
using Hashes = std::array<std::uint32_t, kHashes>;

// The least of each hash over a set (min-hash): sets that share much have most likely the same.
INLINE Hashes least_body(const std::int32_t* ids, std::int64_t size) {
    std::uint32_t a = ~0u, b = ~0u, c = ~0u;
#pragma omp simd reduction(min : a, b, c)
    for (std::int64_t i = 0; i < size; ++i) {
        // Odd factors: no two ids have the same hash.
        const std::uint32_t id = static_cast<std::uint32_t>(ids[i]) * 0x9e3779b1u;
        const std::uint32_t mixed = id ^ (id >> 15);
        a = std::min(a, mixed * 0x85ebca6bu);
        b = std::min(b, mixed * 0xc2b2ae35u);
        c = std::min(c, mixed * 0x27d4eb2fu);
    }
    return {a, b, c};
}
FOR_EVERY_LEVEL(Hashes, least_hashes, (const std::int32_t* ids, std::int64_t size), least_body,
                (ids, size))

}  // namespace

HeadPairs::HeadPairs(const std::int32_t* ids, const std::int64_t* set_offsets,
                     std::int64_t positions, std::int64_t rows, int threads)
    : offsets(set_offsets, set_offsets + positions + 1) {
    order_by_likeness(ids, positions);
    share_in_fours(sort_by_id(ids, rows), threads);
}

void HeadPairs::order_by_likeness(const std::int32_t* ids, std::int64_t positions) {
    struct Key {
        Hashes hashes;
        std::int32_t position;
        bool operator<(const Key& other) const {
            return hashes != other.hashes ? hashes < other.hashes : position < other.position;
        }
    };
    std::vector<Key> keys;
    keys.reserve(positions);
    for (std::int64_t n = 0; n < positions; ++n)
        keys.push_back({least_hashes(ids + offsets[n], offsets[n + 1] - offsets[n]),
                        static_cast<std::int32_t>(n)});
    std::sort(keys.begin(), keys.end());
    order.reserve(positions);
    for (const Key& key : keys) order.push_back(key.position);
}

// A counting sort. Returns the slot of each pair as sets came: its id is row[slot].
std::vector<std::int32_t> HeadPairs::sort_by_id(const std::int32_t* ids, std::int64_t rows) {
    std::vector<std::int32_t> slot_of(rows);  // at first, how many pairs an id has
    for (std::int64_t p = 0; p < count(); ++p) ++slot_of[ids[p]];
    std::int64_t start = 0;
    for (std::int64_t id = 0; id < rows; ++id) {
        const std::int64_t pairs = slot_of[id];
        if (!pairs) continue;
        if (cuts.empty() || start - starts[cuts.back()] >= kSlicePairs ||
            distinct() - cuts.back() == kSliceRows)
            cuts.push_back(distinct());
        slot_of[id] = static_cast<std::int32_t>(distinct());
        row.push_back(static_cast<std::int32_t>(id));
        starts.push_back(start);
        start += pairs;
    }
    std::vector<std::int64_t> next = starts;
    starts.push_back(start);
    cuts.push_back(distinct());
    rank.resize(count());
    place.resize(count());
    std::vector<std::int32_t> slot(count());
    for (std::int64_t r = 0; r < positions(); ++r)
        for (std::int64_t p = offsets[order[r]]; p < offsets[order[r] + 1]; ++p) {
            slot[p] = slot_of[ids[p]];
            place[p] = static_cast<std::int32_t>(next[slot[p]]++);
            rank[place[p]] = static_cast<std::int32_t>(r);
        }
    return slot;
}

void HeadPairs::share_in_fours(const std::vector<std::int32_t>& slot, int threads) {
    four_starts.assign(1, 0);
    for (std::int64_t r = 0; r < positions(); ++r) {
        if (r % 4 == 0) four_starts.push_back(four_starts.back());
        four_starts.back() += offsets[order[r] + 1] - offsets[order[r]];
    }
    four_counts.resize(16 * fours());
    four_slots.resize(count());
    seat.resize(count());
#pragma omp parallel num_threads(threads)
    {
        std::vector<Shared> found;
        std::vector<std::int32_t> sorted;
#pragma omp for schedule(dynamic, 16)
        for (std::int64_t f = 0; f < fours(); ++f) {
            const std::int64_t ids = merge_four(f, slot, found);
            std::int32_t* const counts = four_counts.data() + 16 * f;
            std::int32_t begin[16] = {};
            for (std::int64_t i = 0; i < ids; ++i) ++counts[found[i].mask];
            for (int mask = 2; mask < 16; ++mask) begin[mask] = begin[mask - 1] + counts[mask - 1];
            sorted.resize(ids);
            for (std::int64_t i = 0; i < ids; ++i)
                sorted[begin[found[i].mask]++] = static_cast<std::int32_t>(i);
            std::int32_t* to = four_slots.data() + four_starts[f];
            std::int32_t next_seat = static_cast<std::int32_t>(four_starts[f]);
            for (const std::int32_t i : sorted) {
                *to++ = found[i].slot;
                for (int t = 0; t < 4; ++t)
                    if (found[i].mask >> t & 1) seat[found[i].pairs[t]] = next_seat++;
            }
        }
    }
}

// Finds the ids of four positions, ascending, as their sets do; returns how many.
std::int64_t HeadPairs::merge_four(std::int64_t f, const std::vector<std::int32_t>& slot,
                                   std::vector<Shared>& found) const {
    constexpr std::int32_t none = std::numeric_limits<std::int32_t>::max();
    std::int32_t at[4] = {}, stop[4] = {};
    for (std::int64_t t = 0; t < 4 && 4 * f + t < positions(); ++t) {
        at[t] = static_cast<std::int32_t>(offsets[order[4 * f + t]]);
        stop[t] = static_cast<std::int32_t>(offsets[order[4 * f + t] + 1]);
    }
    found.resize(four_starts[f + 1] - four_starts[f]);
    for (std::int64_t ids = 0;; ++ids) {
        std::int32_t next[4];
        for (int t = 0; t < 4; ++t) next[t] = at[t] < stop[t] ? slot[at[t]] : none;
        const std::int32_t least = std::min(std::min(next[0], next[1]), std::min(next[2], next[3]));
        if (least == none) return ids;
        Shared& id = found[ids];
        id = {least, 0, {at[0], at[1], at[2], at[3]}};
        for (int t = 0; t < 4; ++t) {
            const std::int32_t has = next[t] == least;
            id.mask |= has << t;
            at[t] += has;
        }
    }
}
