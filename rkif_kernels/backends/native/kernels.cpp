// The operations on CPU memory: every element is read once, computed on in registers and written once.
//
// The arithmetic, and so the bits, are those of every other backend: float32, in the order written, one rounding
// per store. This requires -ffp-contract=off and forbids -ffast-math. Sums of floating-point numbers are formed
// per tile and added in the order of the tiles, so they are equal for any number of threads and instruction set.
//
// elements.h: dtypes and rows.  pool.h: threads and tiles.  tile.h: the arithmetic.  isa.h: tile.h compiled for every
// instruction set with its lanes_*.h.  adamw.h, task_vectors.h, this file: operations on whole lists of tensors.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "elements.h"
#include "isa.h"
#include "pool.h"

namespace {

// Counters of one thread, in a separate cache line.
struct alignas(64) Tally {
    int64_t counts[3] = {};
};

int64_t total(const std::vector<Tally>& tallies) {
    int64_t sum = 0;
    for (const Tally& tally : tallies) sum += tally.counts[0];
    return sum;
}

constexpr int64_t PART = 1024;  // a quarter of a tile: widened buffers stay in the L1 cache

// A part of a tile in float32: in place, or widened into a buffer; null for a role that is absent.
template <int ROLES>
struct Parts {
    alignas(64) float buffers[ROLES][PART];
    Row rows[ROLES];
    float* values[ROLES];

    void read(const Lists& lists, int64_t tensor, int64_t start, int64_t size) {
        for (int role = 0; role < ROLES; ++role) {
            const Row row = rows[role] = lists.row(role, tensor, start);
            if (row.dtype == BFLOAT16 || row.dtype == FLOAT16) isa->widen_row(row, size, buffers[role]);
            values[role] = row.dtype == FLOAT32 ? reinterpret_cast<float*>(row.at) : buffers[role];
            if (!row.present()) values[role] = nullptr;
        }
    }

    void write(int role, int64_t size) const {
        if (values[role] == buffers[role]) isa->narrow_row(rows[role], size, buffers[role]);
    }
};

// Call body(thread, parts, size) for every part of every tile.
template <int ROLES, class Body>
void for_each_part(const Lists& lists, int threads, Body body) {
    Tiles(lists).for_each(threads, [&](int thread, int64_t, Tiles::Place place) {
        Parts<ROLES> parts;
        for (int64_t start = place.start; start < place.start + place.size; start += PART) {
            const int64_t size = std::min(PART, place.start + place.size - start);
            parts.read(lists, place.tensor, start, size);
            body(thread, parts, size);
        }
    });
}

ScoreRows scores_at(const Lists& lists, int role, bool distance, int64_t tensor, int64_t start) {
    return {lists.row(role, tensor, start), lists.row(role + 1, tensor, start), distance};
}

// Reallocate memory for `room` elements; new elements are not initialised.
template <class T>
void grow(T*& memory, int64_t room) {
    void* larger = std::realloc(memory, room * sizeof(T));
    if (!larger) throw std::bad_alloc();
    memory = static_cast<T*>(larger);
}

// The undecided elements of one thread, tile by tile.
struct alignas(64) UndecidedList {
    struct Part {
        int64_t tile, first, last;
    };
    Undecided elements{};
    std::vector<Part> parts;
    FuseCounts counts{};
    int64_t room = 0;

    void make_room(int64_t size) {
        if (size <= room) return;
        room = std::max(size, 2 * room);
        grow(elements.inner_score, room);
        grow(elements.outer_score, room);
        grow(elements.base, room);
        grow(elements.inner, room);
        grow(elements.outer, room);
        grow(elements.offset, room);
    }

    ~UndecidedList() {
        for (void* memory : {elements.inner_score, elements.outer_score, elements.base, elements.inner, elements.outer})
            std::free(memory);
        std::free(elements.offset);
    }
};

struct Norms {
    double squared[3];
};

// The state of a fusion between the pass over all elements and the decision of the undecided ones.
struct Fusion {
    Lists lists;
    Rule rule;
    int threads;
    Tiles tiles;
    std::vector<UndecidedList> undecided;
    std::vector<Norms> norms;  // of every tile
    Bracket brackets[2] = {};  // of the two sides, if elements may be undecided

    Fusion(const Lists& of, const Rule& by, int most_threads)
        : lists(of), rule(by), threads(std::max(most_threads, 1)), tiles(lists), undecided(threads), norms(tiles.size()) {}
};

constexpr int64_t STREAMED = 1 << 21;  // number of elements from which stores to `out` bypass the caches

// Fuse the elements that the brackets (two per tensor, or two for all) decide. False if a thread has more than
// `most` undecided elements; `out` then holds part of a fusion.
bool fuse_pass(Fusion& fusion, const Bracket* inner, const Bracket* outer, bool bracket_per_tensor,
               bool inner_distance, bool outer_distance, int64_t most) {
    const Lists& lists = fusion.lists;
    int64_t numel = 0;
    for (int64_t t = 0; t < lists.tensors; ++t) numel += lists.numels[t];
    std::atomic<bool> too_many{false};
    fusion.tiles.for_each(fusion.threads, [&](int thread, int64_t tile, Tiles::Place place) {
        if (too_many.load(std::memory_order_relaxed)) return;
        const auto [tensor, start, size] = place;
        const Row out = lists.row(0, tensor, start);
        const Row in[3] = {lists.row(1, tensor, start), lists.row(2, tensor, start), lists.row(3, tensor, start)};
        const ScoreRows scores[2] = {scores_at(lists, 4, inner_distance, tensor, start),
                                     scores_at(lists, 6, outer_distance, tensor, start)};
        const int64_t which = bracket_per_tensor ? tensor : 0;
        const Bracket brackets[2] = {inner[which], outer[which]};
        bool streaming = numel >= STREAMED && out.dtype == FLOAT32 && reinterpret_cast<uintptr_t>(out.at) % 64 == 0;
        for (const Row& row : in) streaming &= row.at != out.at;
        UndecidedList& list = fusion.undecided[thread];
        const int64_t first = list.elements.size;
        list.make_room(first + TILE + LANES);
        isa->fuse_tile(out, in, scores, size, brackets, fusion.rule, streaming, list.counts, list.elements,
                       fusion.norms[tile].squared);
        if (list.elements.size > first) list.parts.push_back({tile, first, list.elements.size});
        if (list.elements.size > most) too_many.store(true, std::memory_order_relaxed);
    });
#ifdef RKIF_X86
    _mm_sfence();
#endif
    return !too_many;
}

void decide(Fusion& fusion, const float* thresholds) {
    Pool::of_process().run(fusion.tiles.threads(fusion.threads), [&, next = std::make_shared<std::atomic<size_t>>(0)](int) {
        for (size_t which; (which = next->fetch_add(1)) < fusion.undecided.size();) {
            UndecidedList& list = fusion.undecided[which];
            for (const auto [tile, first, last] : list.parts) {
                const auto [tensor, start, size] = fusion.tiles[tile];
                fusion.norms[tile].squared[2] +=
                    isa->decide_tile(fusion.lists.row(0, tensor, start), list.elements, first, last,
                                     fusion.brackets, thresholds, fusion.rule, list.counts);
            }
        }
    });
}

// counts: selected by the inner learner, the outer one, both. norms: squared norms of the task vectors and the update.
void report(const Fusion& fusion, int64_t* counts, double* norms) {
    std::fill_n(counts, 3, 0);
    std::fill_n(norms, 3, 0.0);
    for (const UndecidedList& list : fusion.undecided) {
        counts[0] += list.counts.inner;
        counts[1] += list.counts.outer;
        counts[2] += list.counts.both;
    }
    for (const Norms& tile : fusion.norms)
        for (int which = 0; which < 3; ++which) norms[which] += tile.squared[which];
}

Rule rule_of(const float* inner_weights, const float* outer_weights, int32_t outer_from_inner) {
    // The arguments have the order inner only, outer only, both, neither.
    Rule rule{{inner_weights[3], inner_weights[0], inner_weights[1], inner_weights[2]},
              {outer_weights[3], outer_weights[0], outer_weights[1], outer_weights[2]},
              outer_from_inner != 0};
    return rule;
}

uint32_t hashed(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

}  // namespace

// Whether a call of this thread ran out of memory. No exception may leave the library, so Python reads this flag.
thread_local bool out_of_memory = false;

template <class Result>
Result refused(Result result) {
    out_of_memory = true;
    return result;
}

// Arrays of addresses and dtypes hold one row of `tensors` entries per role. Lists have been validated.
extern "C" {

int32_t rkif_out_of_memory() {
    const bool was = out_of_memory;
    out_of_memory = false;
    return was;
}

// The version of the signatures below; increase it with every change of one.
int32_t rkif_abi() { return 6; }

// Use the which-th best instruction set of the processor; returns how many there are. For tests.
int32_t rkif_use_isa(int32_t which) {
    if (which >= 0 && which < isa_count) isa = isas[which];
    return isa_count;
}

// Roles: parameter, gradient, sensitivity, uncertainty. Returns the number of non-finite importances.
int64_t rkif_update_importance(int64_t tensors, const int64_t* numels, const int64_t* addresses,
                               const int32_t* dtypes, float keep1, float take1, float keep2, float take2,
                               int32_t order, int32_t threads) try {
    const Lists lists{tensors, numels, addresses, dtypes};
    const Smoothing smoothing{keep1, take1, keep2, take2};
    std::vector<Tally> tallies(std::max(threads, 1));
    for_each_part<4>(lists, threads, [&](int thread, Parts<4>& parts, int64_t size) {
        auto [w, g, s, u] = parts.values;
        if (!g) g = std::fill_n(parts.buffers[1], size, 0.0f) - size;
        tallies[thread].counts[0] += isa->update_tile(w, g, s, u, size, smoothing, order);
        parts.write(2, size);
        parts.write(3, size);
    });
    return total(tallies);
} catch (const std::bad_alloc&) {
    return refused(int64_t{0});
}

// Roles: sensitivity, uncertainty. With `lines` 0, writes all scores to `sample`, in order. Otherwise divides the
// elements into `lines` equal parts, and writes sixteen neighbours from a pseudo-random place in each part.
void rkif_sample(int64_t tensors, const int64_t* numels, const int64_t* addresses, const int32_t* dtypes,
                 int32_t distance, int64_t lines, float* sample, int32_t threads) try {
    const Lists lists{tensors, numels, addresses, dtypes};
    std::vector<int64_t> firsts(tensors + 1, 0);
    for (int64_t t = 0; t < tensors; ++t) firsts[t + 1] = firsts[t] + numels[t];
    if (!lines) {
        Tiles(lists).for_each(threads, [&](int, int64_t, Tiles::Place place) {
            isa->read_scores(scores_at(lists, 0, distance != 0, place.tensor, place.start), place.size,
                             sample + firsts[place.tensor] + place.start);
        });
        return;
    }
    const auto line_at = [&](int64_t line) {
        const int64_t begin = firsts[tensors] / lines * line, span = firsts[tensors] / lines;
        const int64_t at = begin + (static_cast<uint64_t>(hashed(static_cast<uint32_t>(line))) * span >> 32);
        const int64_t tensor = std::upper_bound(firsts.begin(), firsts.end(), at) - firsts.begin() - 1;
        const int64_t start = (at - firsts[tensor]) & ~int64_t{LANES - 1};
        return Tiles::Place{tensor, std::max<int64_t>(0, std::min(start, numels[tensor] - LANES)),
                            std::min<int64_t>(LANES, numels[tensor])};
    };
    constexpr int64_t BATCH = 64;
    std::atomic<int64_t> next{0};
    Pool::of_process().run(lines < 512 ? 1 : threads, [&](int) {
        Tiles::Place places[BATCH];
        for (int64_t first; (first = next.fetch_add(BATCH)) < lines;) {
            const int64_t size = std::min(BATCH, lines - first);
            for (int64_t i = 0; i < size; ++i) {
                const auto [tensor, start, _] = places[i] = line_at(first + i);
                const ScoreRows rows = scores_at(lists, 0, distance != 0, tensor, start);
                __builtin_prefetch(rows.first.at);
                if (rows.second.present()) __builtin_prefetch(rows.second.at);
            }
            for (int64_t i = 0; i < size; ++i) {
                float* to = sample + (first + i) * LANES;
                const int64_t few = places[i].size;
                isa->read_scores(scores_at(lists, 0, distance != 0, places[i].tensor, places[i].start), few, to);
                for (int64_t lane = few; lane < LANES; ++lane) to[lane] = to[lane % few];
            }
        }
    });
} catch (const std::bad_alloc&) {
    static_cast<void>(refused(0));
}

// Roles: sensitivity, uncertainty. Counts the scores > lower into counts[0], those >= upper into counts[1], and those
// between into counts[2], and gathers the latter. counts[2] may exceed the `capacity` of `between`.
void rkif_split(int64_t tensors, const int64_t* numels, const int64_t* addresses, const int32_t* dtypes,
                int32_t distance, float lower, float upper, float* between, int64_t capacity, int64_t* counts,
                int32_t threads) try {
    const Lists lists{tensors, numels, addresses, dtypes};
    std::vector<Tally> tallies(std::max(threads, 1));
    std::atomic<int64_t> found{0};
    Tiles(lists).for_each(threads, [&](int thread, int64_t, Tiles::Place place) {
        alignas(64) float inside[TILE + LANES];
        const SplitCounts tile = isa->split_tile(scores_at(lists, 0, distance != 0, place.tensor, place.start),
                                                 place.size, lower, upper, inside);
        tallies[thread].counts[0] += tile.above;
        tallies[thread].counts[1] += tile.reached;
        if (!tile.between) return;
        const int64_t first = found.fetch_add(tile.between, std::memory_order_relaxed);
        if (first + tile.between <= capacity) std::memcpy(between + first, inside, tile.between * sizeof(float));
    });
    counts[0] = counts[1] = 0;
    for (const Tally& tally : tallies) {
        counts[0] += tally.counts[0];
        counts[1] += tally.counts[1];
    }
    counts[2] = found;
} catch (const std::bad_alloc&) {
    static_cast<void>(refused(0));
}

// Roles: sensitivity, uncertainty. Adds the scores to `counts`: [0] keys below the window, which starts at `low`; then
// its `bins` bins of 2^shift keys each; then keys above the window; last, the invalid scores.
void rkif_count(int64_t tensors, const int64_t* numels, const int64_t* addresses, const int32_t* dtypes,
                int32_t distance, int64_t low, int32_t shift, int64_t bins, int64_t* counts, int32_t threads) try {
    const Lists lists{tensors, numels, addresses, dtypes};
    std::vector<Tally> tallies(std::max(threads, 1));
    Tiles(lists).for_each(threads, [&](int thread, int64_t, Tiles::Place place) {
        alignas(64) float scores[TILE];
        alignas(64) uint32_t distances[TILE], inside[TILE + 1];
        isa->read_scores(scores_at(lists, 0, distance != 0, place.tensor, place.start), place.size, scores);
        Tally& tally = tallies[thread];
        const int64_t found = isa->bin_tile(scores, static_cast<uint32_t>(low), shift, static_cast<uint32_t>(bins),
                                            distances, inside, place.size, tally.counts[0], tally.counts[2]);
        tally.counts[1] += place.size - found;
        // Equal neighbours are added together, because with many ties the threads would contend for one address.
        for (int64_t i = 0, next; i < found; i = next) {
            for (next = i + 1; next < found && inside[next] == inside[i];) ++next;
            __atomic_fetch_add(counts + 1 + inside[i], next - i, __ATOMIC_RELAXED);
        }
    });
    for (const Tally& tally : tallies) {
        counts[0] += tally.counts[0];
        counts[bins + 1] += tally.counts[1] - tally.counts[0];
        counts[bins + 2] += tally.counts[2];
    }
} catch (const std::bad_alloc&) {
    static_cast<void>(refused(0));
}

// Roles: out, base, inner, outer, inner sensitivity and uncertainty, outer sensitivity and uncertainty.
// Thresholds: one a tensor. For `counts` and `norms` see report().
void rkif_fuse(int64_t tensors, const int64_t* numels, const int64_t* addresses, const int32_t* dtypes,
               const float* inner_thresholds, const float* outer_thresholds, const float* inner_weights,
               const float* outer_weights, int32_t outer_from_inner, int32_t inner_distance,
               int32_t outer_distance, int64_t* counts, double* norms, int32_t threads) try {
    Fusion fusion({tensors, numels, addresses, dtypes}, rule_of(inner_weights, outer_weights, outer_from_inner), threads);
    std::vector<Bracket> inner(tensors), outer(tensors);  // empty brackets leave no element undecided
    for (int64_t t = 0; t < tensors; ++t) {
        inner[t] = {inner_thresholds[t], inner_thresholds[t]};
        outer[t] = {outer_thresholds[t], outer_thresholds[t]};
    }
    fuse_pass(fusion, inner.data(), outer.data(), true, inner_distance != 0, outer_distance != 0, INT64_MAX);
    report(fusion, counts, norms);
} catch (const std::bad_alloc&) {
    static_cast<void>(refused(0));
}

// The same roles. Fuses the elements that the brackets (lo, hi of the inner side; lo, hi of the outer side) decide; no
// input shares memory with `out`. Writes to `found` for each side the number of scores < lo and of scores <= lo; then
// the number of listed elements. Returns the fusion, for rkif_gather_undecided and rkif_finish; the lists must outlive
// it. Returns null if a thread has more than `most` undecided elements.
void* rkif_begin(int64_t tensors, const int64_t* numels, const int64_t* addresses, const int32_t* dtypes,
                 const float* brackets, const float* inner_weights, const float* outer_weights,
                 int32_t outer_from_inner, int32_t inner_distance, int32_t outer_distance, int64_t most,
                 int64_t* found, int32_t threads) try {
    auto fusion = std::make_unique<Fusion>(Lists{tensors, numels, addresses, dtypes},
                                           rule_of(inner_weights, outer_weights, outer_from_inner), threads);
    fusion->brackets[0] = {brackets[0], brackets[1]};
    fusion->brackets[1] = {brackets[2], brackets[3]};
    if (!fuse_pass(*fusion, fusion->brackets, fusion->brackets + 1, false, inner_distance != 0, outer_distance != 0, most)) return nullptr;
    std::fill_n(found, 5, 0);
    for (const UndecidedList& list : fusion->undecided) {
        for (int side = 0; side < 2; ++side) {
            found[2 * side] += list.counts.below[side];
            found[2 * side + 1] += list.counts.up_to[side];
        }
        found[4] += list.elements.size;
    }
    return fusion.release();
} catch (const std::bad_alloc&) {
    return refused(static_cast<void*>(nullptr));
}

// Write the listed scores of a side with lo < score <= hi to `to`, and return their number. `to` has space for all
// listed scores and fifteen more.
int64_t rkif_gather_undecided(const void* fusion, int32_t side, float lo, float hi, float* to) {
    int64_t gathered = 0;
    for (const UndecidedList& list : static_cast<const Fusion*>(fusion)->undecided) {
        const float* scores = side ? list.elements.outer_score : list.elements.inner_score;
        gathered += isa->gather(scores, list.elements.size, {lo, hi}, to + gathered);
    }
    return gathered;
}

// Decide the undecided elements, unless `thresholds` (inner, outer) is null, and free the fusion.
void rkif_finish(void* fusion, const float* thresholds, int64_t* counts, double* norms) try {
    std::unique_ptr<Fusion> owned(static_cast<Fusion*>(fusion));
    if (!thresholds) return;
    decide(*owned, thresholds);
    report(*owned, counts, norms);
} catch (const std::bad_alloc&) {
    static_cast<void>(refused(0));
}

}  // extern "C"

#include "adamw.h"
#include "task_vectors.h"
