// One vector core: its unified buffer, its pipes, and what each pipe knows of the others.
#ifndef ASCEMU_CORE_H
#define ASCEMU_CORE_H

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// Instructions of one pipe start in order, pipes run beside each other: the scalar unit, the vector
// unit, and the movers into and out of the unified buffer.
enum pipe_t { PIPE_S, PIPE_V, PIPE_MTE2, PIPE_MTE3, PIPE_ALL };
using event_t = int;

namespace AscendC {
class TPipe;
}

namespace ascemu {

constexpr std::size_t kUnifiedBuffer = 196608, kBlock = 32;
constexpr int kPipes = 4, kEvents = 8;
// A kernel of the tests needs some thousand calls on a core: more means that it does not end.
constexpr std::uint32_t kMaxCalls = 4'000'000;

struct Finding : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A vector clock: of each pipe, the number of instructions that are known to have ended.
using Clock = std::array<std::uint32_t, kPipes>;

inline void join(Clock& clock, const Clock& other) {
    for (int p = 0; p < kPipes; ++p) clock[p] = std::max(clock[p], other[p]);
}

// The last instruction of each pipe that read, and that wrote, a block of the unified buffer.
struct BlockMarks {
    Clock read{}, written{};
};

struct Core {
    const char* kernel = "";
    const char* call = "";
    int index = 0, blocks = 1;
    bool vector_only = false;
    AscendC::TPipe* pipe = nullptr;
    std::uint32_t calls = 0;
    std::array<Clock, kPipes> knows{};
    Clock issued{};
    std::map<int, Clock> flags;
    std::size_t taken = 0;
    std::string left_behind;
    std::vector<BlockMarks> marks;
    std::vector<std::uint8_t> defined;
    alignas(64) std::array<std::uint8_t, kUnifiedBuffer> buffer;

    void start(const char* name, int core, int of) {
        kernel = name;
        call = "start";
        index = core;
        blocks = of;
        vector_only = false;
        pipe = nullptr;
        calls = 0;
        knows = {};
        issued = {};
        flags.clear();
        taken = 0;
        left_behind.clear();
        marks.assign(kUnifiedBuffer / kBlock, BlockMarks{});
        defined.assign(kUnifiedBuffer, 0);
        buffer.fill(0xff);  // NaN in every float, -1 in every integer
    }
};

inline Core& core() {
    static Core the_core;
    return the_core;
}

[[noreturn]] inline void fail(const std::string& what) {
    const Core& c = core();
    const std::string where = std::to_string(c.index) + " of " + std::to_string(c.blocks);
    throw Finding(std::string("ascemu: ") + c.kernel + ", core " + where + ", " + c.call + ": " +
                  what);
}

inline void require(bool holds, const char* what) {
    if (!holds) fail(what);
}

inline void require(bool holds, const std::string& what) {
    if (!holds) fail(what);
}

// Names the call for findings. Calls that are no instruction need no more.
inline void enter(const char* call) {
    core().call = call;
    require(++core().calls < kMaxCalls, "the kernel does not end");
}

// Whether instruction `number` of pipe `of` has ended for certain when pipe `at` goes on.
inline bool ended(int at, int of, std::uint32_t number) { return core().knows[at][of] >= number; }

// One instruction of a pipe, and the bytes of the unified buffer that it reads and writes.
class Instruction {
   public:
    Instruction(const char* call, pipe_t pipe) : pipe_(pipe) {
        enter(call);
        number_ = ++core().issued[pipe];
        // The scalar unit waits for its own results. Of the others only starts are in order.
        if (pipe == PIPE_S) core().knows[pipe][pipe] = number_;
    }

    void reads(const std::uint8_t* from, std::size_t bytes) const {
        if (bytes == 0) return;
        Core& c = core();
        const std::size_t start = from - c.buffer.data();
        for (std::size_t b = start / kBlock; b <= (start + bytes - 1) / kBlock; ++b) {
            follows(c.marks[b].written, "reads", "wrote", b);
            c.marks[b].read[pipe_] = number_;
        }
        const void* hole = std::memchr(c.defined.data() + start, 0, bytes);
        if (hole != nullptr)
            fail("reads the unified buffer where nothing was written, at byte " +
                 std::to_string(static_cast<const std::uint8_t*>(hole) - c.defined.data()));
    }

    // `defines`: false for bytes of which the content is left open.
    void writes(const std::uint8_t* to, std::size_t bytes, bool defines = true) const {
        if (bytes == 0) return;
        Core& c = core();
        const std::size_t start = to - c.buffer.data();
        for (std::size_t b = start / kBlock; b <= (start + bytes - 1) / kBlock; ++b) {
            follows(c.marks[b].written, "writes", "wrote", b);
            follows(c.marks[b].read, "writes", "read", b);
            c.marks[b].written[pipe_] = number_;
        }
        std::memset(c.defined.data() + start, defines, bytes);
    }

    pipe_t pipe() const { return pipe_; }
    std::uint32_t number() const { return number_; }

   private:
    // Every earlier access in `last` must have ended before this one begins.
    void follows(const Clock& last, const char* now, const char* then, std::size_t block) const {
        static const char* const kNames[] = {"S", "V", "MTE2", "MTE3"};
        for (int p = 0; p < kPipes; ++p) {
            const bool same = p == pipe_ && last[p] == number_;
            if (!same && !ended(pipe_, p, last[p]))
                fail(std::string("missing synchronisation: pipe ") + kNames[pipe_] + " " + now +
                     " block " + std::to_string(block) + " of the unified buffer, which pipe " +
                     kNames[p] + " " + then + " and may not be done with");
        }
    }

    pipe_t pipe_;
    std::uint32_t number_;
};

// What pipe `from` has done and knows at this point.
inline Clock snapshot(int from) {
    Clock clock = core().knows[from];
    clock[from] = core().issued[from];
    return clock;
}

}  // namespace ascemu

namespace AscendC {

inline std::int64_t GetBlockIdx() { return ascemu::core().index; }
inline std::int64_t GetBlockNum() { return ascemu::core().blocks; }

}  // namespace AscendC

#endif
