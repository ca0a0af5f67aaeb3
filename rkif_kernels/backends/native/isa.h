// The functions of tile.h, compiled for every supported instruction set. The set is chosen at run time.
#pragma once

#include "elements.h"

struct Isa {
    void (*fuse_tile)(const Row& out, const Row* in, const ScoreRows* scores, int64_t size, const Bracket* brackets,
                      const Rule& rule, bool streaming, FuseCounts& counts, Undecided& list, double* norms);
    double (*decide_tile)(const Row& out, const Undecided& list, int64_t first, int64_t last,
                          const Bracket* brackets, const float* thresholds, const Rule& rule, FuseCounts& counts);
    int64_t (*gather)(const float* values, int64_t size, Bracket bracket, float* to);
    SplitCounts (*split_tile)(const ScoreRows& rows, int64_t size, float lower, float upper, float* between);
    void (*read_scores)(const ScoreRows& rows, int64_t size, float* to);
    void (*widen_row)(const Row& row, int64_t size, float* to);
    void (*narrow_row)(const Row& row, int64_t size, const float* values);
    int64_t (*update_tile)(const float* w, const float* g, float* s, float* u, int64_t size, Smoothing smoothing,
                           int order);
    void (*adamw_tile)(float* w, const float* g, float* m, float* v, int64_t size, AdamWConstants constants);
    int64_t (*bin_tile)(const float* scores, uint32_t low, int32_t shift, uint32_t bins, uint32_t* distances,
                        uint32_t* inside, int64_t size, int64_t& below, int64_t& invalid);
    void (*merge_tile)(const Row& out, const Row* in, int64_t size, const TaskVectorSide* sides,
                       const TaskVectorRule& rule, FuseCounts& counts, double* norms);
    void (*absolute_sums_tile)(const Row& start, const Row& end, int64_t size, float density, const float* draws,
                               double* sums);
};

#if defined(__GNUC__)
#define ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define ALWAYS_INLINE inline
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define RKIF_X86 1
#include <immintrin.h>
#endif

namespace {

namespace portable {
#define TARGET
#include "lanes_portable.h"
#include "tile.h"
#undef TARGET
}  // namespace portable

#ifdef RKIF_X86
namespace avx2 {
#define TARGET __attribute__((target("avx,avx2,f16c,popcnt")))
#include "lanes_avx2.h"
#include "tile.h"
#undef TARGET
}  // namespace avx2

namespace avx512 {
#define TARGET __attribute__((target("avx,avx2,fma,f16c,popcnt,avx512f,avx512dq,avx512bw,avx512vl")))
#include "lanes_avx512.h"
#include "tile.h"
#undef TARGET
}  // namespace avx512
#endif

// The available instruction sets, best first; the last one is portable and always available.
const Isa* isas[3] = {};
int isa_count = 0;

const Isa* best_isa() {
#ifdef RKIF_X86
    __builtin_cpu_init();
    const bool avx2_there = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    const bool avx512_there = avx2_there && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                              __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    if (avx512_there) isas[isa_count++] = &avx512::ISA;
    if (avx2_there) isas[isa_count++] = &avx2::ISA;
#endif
    isas[isa_count++] = &portable::ISA;
    return isas[0];
}

const Isa* isa = best_isa();

}  // namespace
