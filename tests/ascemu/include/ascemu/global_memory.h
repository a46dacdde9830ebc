// Global memory: the buffers that a launch may touch, and who touched what.
#ifndef ASCEMU_GLOBAL_MEMORY_H
#define ASCEMU_GLOBAL_MEMORY_H

#include "core.h"

namespace ascemu {

struct Access {
    std::size_t begin, end;  // bytes of its buffer, half-open
    bool write;
    int core;
    int pipe;
    std::uint32_t number;
    Clock known;  // to the pipe, when it began
    const char* call;
};

struct Buffer {
    const char* name;
    std::uint8_t* begin;
    std::size_t bytes;
    bool output;
    std::vector<Access> log{};
};

inline std::vector<Buffer>& buffers() {
    static std::vector<Buffer> all;
    return all;
}

// Notes an access, which must lie in one buffer. What conflicts is found at the end of the launch,
// for cores run one after the other here and all at once on a device.
inline void touch_global(const Instruction& by, const void* at, std::size_t bytes, bool write) {
    const auto* begin = static_cast<const std::uint8_t*>(at);
    for (Buffer& buffer : buffers()) {
        if (begin < buffer.begin || begin + bytes > buffer.begin + buffer.bytes) continue;
        require(!write || buffer.output,
                std::string("writes to ") + buffer.name + ", which is an input");
        const std::size_t start = begin - buffer.begin;
        const Core& c = core();
        buffer.log.push_back({start, start + bytes, write, c.index, by.pipe(), by.number(),
                              c.knows[by.pipe()], c.call});
        return;
    }
    std::string nearest = "none of the buffers";
    for (const Buffer& buffer : buffers())
        if (begin >= buffer.begin && begin < buffer.begin + buffer.bytes)
            nearest = std::string("beyond the end of ") + buffer.name;
    fail(std::string(write ? "writes" : "reads") + " global memory out of bounds: " + nearest);
}

// Two accesses of which one writes, and which nothing keeps in order.
inline bool in_conflict(const Access& earlier, const Access& later) {
    if (!earlier.write && !later.write) return false;
    if (earlier.core != later.core) return true;
    return later.known[earlier.pipe] < earlier.number;
}

inline void check_conflicts(const Buffer& buffer) {
    const std::vector<Access>& log = buffer.log;
    if (std::none_of(log.begin(), log.end(), [](const Access& a) { return a.write; })) return;
    std::vector<std::size_t> order(log.size()), open;
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return log[a].begin < log[b].begin; });
    for (const std::size_t now : order) {
        const auto over = [&](std::size_t i) { return log[i].end <= log[now].begin; };
        open.erase(std::remove_if(open.begin(), open.end(), over), open.end());
        for (const std::size_t other : open) {
            const Access& earlier = log[std::min(now, other)];
            const Access& later = log[std::max(now, other)];
            if (!in_conflict(earlier, later)) continue;
            core().index = later.core;
            core().call = later.call;
            const std::string bytes = " bytes of " + std::string(buffer.name) + " at " +
                                      std::to_string(log[now].begin);
            if (earlier.core == later.core)
                fail("missing synchronisation on" + bytes + ", which " + earlier.call +
                     " of the same core may not be done with");
            fail("touches" + bytes + ", which " + earlier.call + " of core " +
                 std::to_string(earlier.core) + (earlier.write ? " writes" : " reads") +
                 " in the same launch");
        }
        open.push_back(now);
    }
}

}  // namespace ascemu

#endif
