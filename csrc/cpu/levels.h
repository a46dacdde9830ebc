// One portable source, compiled for several levels of x86-64 and chosen when it runs, so that a
// module built on one node works on every other. Elsewhere the compiler's baseline is used, which
// on aarch64 has NEON. (gcc's target_clones would do it in one line, but knows these levels from
// gcc 12 on only, and needs glibc.)
#pragma once

#define INLINE inline __attribute__((always_inline))

enum class Level { base, avx2, avx512 };

// The best that this processor and its operating system support.
inline Level best_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool narrow = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return narrow && wide ? Level::avx512 : narrow ? Level::avx2 : Level::base;
#else
    return Level::base;
#endif
}

// The one in use; tests lower it.
inline Level& level() {
    static Level chosen = best_level();
    return chosen;
}

// Defines RESULT NAME PARAMETERS, which calls the INLINE function BODY with ARGUMENTS.
#if defined(__x86_64__)
#define FOR_EVERY_LEVEL(RESULT, NAME, PARAMETERS, BODY, ARGUMENTS)                              \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) static RESULT        \
        NAME##_avx512 PARAMETERS {                                                              \
        return BODY ARGUMENTS;                                                                  \
    }                                                                                           \
    __attribute__((target("avx2,fma"))) static RESULT NAME##_avx2 PARAMETERS {                  \
        return BODY ARGUMENTS;                                                                  \
    }                                                                                           \
    static RESULT NAME##_base PARAMETERS { return BODY ARGUMENTS; }                             \
    static RESULT NAME PARAMETERS {                                                             \
        switch (level()) {                                                                      \
            case Level::avx512: return NAME##_avx512 ARGUMENTS;                                 \
            case Level::avx2: return NAME##_avx2 ARGUMENTS;                                     \
            default: return NAME##_base ARGUMENTS;                                              \
        }                                                                                       \
    }
#else
#define FOR_EVERY_LEVEL(RESULT, NAME, PARAMETERS, BODY, ARGUMENTS) \
    static RESULT NAME PARAMETERS { return BODY ARGUMENTS; }
#endif
