#include "head_pairs.h"

#include <algorithm>
#include <array>

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
                     std::int64_t positions, std::int64_t rows)
    : offsets(set_offsets, set_offsets + positions + 1) {
    order_by_likeness(ids, positions);
    sort_by_id(ids, rows);
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

// A counting sort.
void HeadPairs::sort_by_id(const std::int32_t* ids, std::int64_t rows) {
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
    slot.resize(count());
    for (std::int64_t r = 0; r < positions(); ++r)
        for (std::int64_t p = offsets[order[r]]; p < offsets[order[r] + 1]; ++p) {
            slot[p] = slot_of[ids[p]];
            place[p] = static_cast<std::int32_t>(next[slot[p]]++);
            rank[place[p]] = static_cast<std::int32_t>(r);
        }
}
