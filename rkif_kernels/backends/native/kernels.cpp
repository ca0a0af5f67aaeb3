// The operations on CPU memory: every element is read once, computed on in registers and written once.
//
// Same arithmetic, hence same bits, as every other backend: float32, in the order written, one rounding a
// store. That holds because this file is compiled with -ffp-contract=off and without -ffast-math.
//
// Work is cut into tiles that fit a core's first cache. A tile of 16-bit elements is widened into a buffer, a
// tile of float32 is used where it lies, so that the arithmetic below exists once, for float32.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <system_error>
#include <thread>
#include <vector>

// One source, compiled for several instruction sets; the loader picks what the processor has.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORISED __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define VECTORISED
#endif

// Inlined into each of those.
#if defined(__GNUC__)
#define INLINED inline __attribute__((always_inline))
#else
#define INLINED inline
#endif

namespace {

constexpr int64_t TILE = 1024;
constexpr int64_t TILES_A_THREAD = 32;  // less work than this is not worth starting a thread for

enum Dtype : int32_t { ABSENT = 0, FLOAT32 = 1, BFLOAT16 = 2, FLOAT16 = 3 };
enum Order : int32_t { FIRST = 0, SECOND = 1, MIXED = 2 };

float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float from_half(uint16_t half) {
    // The exponents' biases differ by 112. A subnormal half, a count of 2^-24, is added to 2^-14 by its bits and
    // left over exactly when 2^-14 is taken away: no operand is a subnormal float32, which might be flushed.
    const uint32_t magnitude = half & 0x7fffu;
    const uint32_t subnormal = as_bits(as_float(0x38800000u | (magnitude << 13)) - 0x1p-14f);
    const uint32_t normal = (magnitude << 13) + 0x38000000u;
    const uint32_t special = (magnitude << 13) | 0x7f800000u;
    const uint32_t bits = magnitude < 0x0400u ? subnormal : magnitude >= 0x7c00u ? special : normal;
    return as_float(bits | (static_cast<uint32_t>(half & 0x8000u) << 16));
}

// To nearest, ties to even, as are all roundings here.
inline uint16_t to_half(float value) {
    const uint32_t bits = as_bits(value), magnitude = bits & 0x7fffffffu;
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    const uint32_t normal = rounded >= 0x47800000u ? 0x7c00u : (rounded - 0x38000000u) >> 13;
    // Beside 0.5 the last bit of a float32 is worth as much as that of a subnormal half: the sum rounds.
    const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    return static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

inline uint16_t to_bfloat16(float value) {
    const uint32_t bits = as_bits(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

VECTORISED void widen_bfloat16(const uint16_t* __restrict source, float* __restrict target, int64_t size) {
    for (int64_t i = 0; i < size; ++i) target[i] = as_float(static_cast<uint32_t>(source[i]) << 16);
}

VECTORISED void widen_half(const uint16_t* __restrict source, float* __restrict target, int64_t size) {
    for (int64_t i = 0; i < size; ++i) target[i] = from_half(source[i]);
}

VECTORISED void round_bfloat16(const float* __restrict source, uint16_t* __restrict target, int64_t size) {
    for (int64_t i = 0; i < size; ++i) target[i] = to_bfloat16(source[i]);
}

VECTORISED void round_half(const float* __restrict source, uint16_t* __restrict target, int64_t size) {
    for (int64_t i = 0; i < size; ++i) target[i] = to_half(source[i]);
}

// One role (parameter, gradient, ...) of a list of tensors.
struct Role {
    const int64_t* addresses;
    const int32_t* dtypes;

    bool present(int64_t tensor) const { return dtypes[tensor] != ABSENT; }

    void* at(int64_t tensor, int64_t start) const {
        const int64_t width = dtypes[tensor] == FLOAT32 ? 4 : 2;
        return reinterpret_cast<void*>(addresses[tensor] + start * width);
    }

    // The tile in float32: where it lies, or widened into `buffer`.
    const float* read(int64_t tensor, int64_t start, int64_t size, float* buffer) const {
        const void* source = at(tensor, start);
        if (dtypes[tensor] == FLOAT32) return static_cast<const float*>(source);
        if (dtypes[tensor] == BFLOAT16) widen_bfloat16(static_cast<const uint16_t*>(source), buffer, size);
        if (dtypes[tensor] == FLOAT16) widen_half(static_cast<const uint16_t*>(source), buffer, size);
        return buffer;
    }

    // The same, to be changed and then written.
    float* edit(int64_t tensor, int64_t start, int64_t size, float* buffer) const {
        return const_cast<float*>(read(tensor, start, size, buffer));
    }

    void write(int64_t tensor, int64_t start, int64_t size, const float* values) const {
        void* target = at(tensor, start);
        if (dtypes[tensor] == FLOAT32 && target != values) std::memcpy(target, values, size * sizeof(float));
        if (dtypes[tensor] == BFLOAT16) round_bfloat16(values, static_cast<uint16_t*>(target), size);
        if (dtypes[tensor] == FLOAT16) round_half(values, static_cast<uint16_t*>(target), size);
    }
};

// Call body(thread, tensor, start, size) for every tile, on up to `threads` threads, each with its own run of
// neighbouring tiles.
template <class Body>
void for_tiles(int64_t tensors, const int64_t* numels, int threads, Body body) {
    int64_t tiles = 0;
    for (int64_t t = 0; t < tensors; ++t) tiles += (numels[t] + TILE - 1) / TILE;
    threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, tiles / TILES_A_THREAD)));
    auto run = [&](int thread) {
        int64_t first = tiles * thread / threads, last = tiles * (thread + 1) / threads;
        for (int64_t tensor = 0; tensor < tensors && last > 0; ++tensor) {
            const int64_t here = (numels[tensor] + TILE - 1) / TILE;
            for (int64_t tile = std::max<int64_t>(first, 0); tile < std::min(here, last); ++tile)
                body(thread, tensor, tile * TILE, std::min(TILE, numels[tensor] - tile * TILE));
            first -= here;
            last -= here;
        }
    };
    std::vector<std::thread> others;
    int started = 1;
    try {
        for (; started < threads; ++started) others.emplace_back(run, started);
    } catch (const std::system_error&) {  // no more threads to be had: this one does their share
    }
    run(0);
    for (int thread = started; thread < threads; ++thread) run(thread);
    for (std::thread& other : others) other.join();
}

struct Smoothing {
    float keep1, take1, keep2, take2;
};

template <int ORDER>
INLINED float importance_of(float w, float g) {
    const float product = w * g, square = product * product;
    return ORDER == FIRST ? std::fabs(product) : ORDER == SECOND ? square : std::fabs(product - square * 0.5f);
}

template <int ORDER>
INLINED int64_t count_nonfinite(const float* __restrict w, const float* __restrict g, int64_t size) {
    int32_t bad = 0;
    for (int64_t i = 0; i < size; ++i)
        bad += !(importance_of<ORDER>(w[i], g[i]) < std::numeric_limits<float>::infinity());
    return bad;
}

// Updates s, and u if there is one. CHECKED: what has a non-finite importance keeps its states.
template <int ORDER, bool WITH_UNCERTAINTY, bool CHECKED>
INLINED void update(const float* __restrict w, const float* __restrict g, float* __restrict s,
                    float* __restrict u, int64_t size, Smoothing b) {
    for (int64_t i = 0; i < size; ++i) {
        const float importance = importance_of<ORDER>(w[i], g[i]);
        const bool keep = CHECKED && !(importance < std::numeric_limits<float>::infinity());
        const float next_s = b.keep1 * s[i] + b.take1 * importance;
        s[i] = keep ? s[i] : next_s;
        if (WITH_UNCERTAINTY) {
            const float next_u = b.keep2 * u[i] + b.take2 * std::fabs(importance - next_s);
            u[i] = keep ? u[i] : next_u;
        }
    }
}

// Returns how many importances are not finite. To count them first costs less than a choice at every element:
// the second reading of w and g is from the cache, and almost never is there anything to choose.
template <int ORDER>
INLINED int64_t update_order(const float* w, const float* g, float* s, float* u, int64_t size, Smoothing b) {
    const int64_t bad = count_nonfinite<ORDER>(w, g, size);
    if (bad)
        u ? update<ORDER, true, true>(w, g, s, u, size, b) : update<ORDER, false, true>(w, g, s, u, size, b);
    else
        u ? update<ORDER, true, false>(w, g, s, u, size, b) : update<ORDER, false, false>(w, g, s, u, size, b);
    return bad;
}

VECTORISED int64_t update_tile(const float* w, const float* g, float* s, float* u, int64_t size, Smoothing b,
                               int order) {
    if (order == FIRST) return update_order<FIRST>(w, g, s, u, size, b);
    if (order == SECOND) return update_order<SECOND>(w, g, s, u, size, b);
    return update_order<MIXED>(w, g, s, u, size, b);
}

VECTORISED void multiply_tile(const float* __restrict a, const float* __restrict b, float* __restrict product,
                              int64_t size) {
    for (int64_t i = 0; i < size; ++i) product[i] = a[i] * b[i];
}

VECTORISED void distance_tile(const float* __restrict a, const float* __restrict b, float* __restrict distance,
                              int64_t size) {
    for (int64_t i = 0; i < size; ++i) distance[i] = std::fabs(a[i] - b[i]);
}

// Scores of a tile: the sensitivity where it lies, its product with the uncertainty, or their distance.
struct Scores {
    Role s, u;
    bool distance;

    const float* read(int64_t tensor, int64_t start, int64_t size, float* buffer_s, float* buffer_u,
                      float* combined) const {
        const float* sensitivity = s.read(tensor, start, size, buffer_s);
        if (!u.present(tensor)) return sensitivity;
        const float* uncertainty = u.read(tensor, start, size, buffer_u);
        (distance ? distance_tile : multiply_tile)(sensitivity, uncertainty, combined, size);
        return combined;
    }
};

struct Rule {
    float inner[4], outer[4];  // weights of: inner only, outer only, both, neither
    bool from_inner;           // where the second task vector starts
};

struct Counts {
    int64_t inner, outer, both;  // selected by the inner learner, by the outer, by both
};

VECTORISED Counts fuse_tile(const float* __restrict base, const float* __restrict inner,
                            const float* __restrict outer, const float* __restrict inner_scores,
                            const float* __restrict outer_scores, float inner_threshold,
                            float outer_threshold, const Rule& rule, float* __restrict tau_in,
                            float* __restrict tau_out, float* __restrict fused, int64_t size) {
    const Rule r = rule;
    const float* start = r.from_inner ? inner : base;
    for (int64_t i = 0; i < size; ++i) tau_out[i] = outer[i] - start[i];
    int32_t n_inner = 0, n_outer = 0, n_both = 0;
    for (int64_t i = 0; i < size; ++i) {
        // What is not a number counts as zero, here as in the selection.
        const float score_in = inner_scores[i] > 0 ? inner_scores[i] : 0.0f;
        const float score_out = outer_scores[i] > 0 ? outer_scores[i] : 0.0f;
        const bool m_in = score_in > inner_threshold, m_out = score_out > outer_threshold;
        const float in_given_in = m_out ? r.inner[2] : r.inner[0], in_else = m_out ? r.inner[1] : r.inner[3];
        const float out_given_in = m_out ? r.outer[2] : r.outer[0], out_else = m_out ? r.outer[1] : r.outer[3];
        const float w_in = m_in ? in_given_in : in_else, w_out = m_in ? out_given_in : out_else;
        tau_in[i] = inner[i] - base[i];
        fused[i] = (base[i] + w_in * tau_in[i]) + w_out * tau_out[i];
        n_inner += m_in;
        n_outer += m_out;
        n_both += m_in & m_out;
    }
    return {n_inner, n_outer, n_both};
}

constexpr int LANES = 16;  // sums side by side, so that they need not wait for each other

VECTORISED double squared_norm(const float* __restrict vector, int64_t size) {
    double lanes[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES)
        for (int lane = 0; lane < LANES; ++lane) {
            const double value = vector[i + lane];
            lanes[lane] += value * value;
        }
    double total = 0;
    for (; i < size; ++i) total += static_cast<double>(vector[i]) * vector[i];
    for (double lane : lanes) total += lane;
    return total;
}

VECTORISED double squared_distance(const float* __restrict a, const float* __restrict b, int64_t size) {
    alignas(64) float difference[TILE];
    for (int64_t i = 0; i < size; ++i) difference[i] = a[i] - b[i];
    return squared_norm(difference, size);
}

struct Sides {
    int64_t above, reached;  // scores > lower, scores >= upper (nothing reaches a NaN)
};

constexpr int64_t GROUP = 64;  // scores looked at together: few groups hold one that is looked for

// Count both sides and gather what lies between them: above - reached scores, in room for one more.
VECTORISED Sides split_tile(const float* __restrict scores, float lower, float upper,
                            float* __restrict between, int64_t size) {
    Sides total{0, 0};
    int64_t found = 0;
    for (int64_t start = 0; start < size; start += GROUP) {
        const int64_t end = std::min(start + GROUP, size);
        int32_t above = 0, reached = 0;
        if (end - start == GROUP)
            for (int64_t i = 0; i < GROUP; ++i) {
                above += scores[start + i] > lower;
                reached += scores[start + i] >= upper;
            }
        else
            for (int64_t i = start; i < end; ++i) {
                above += scores[i] > lower;
                reached += scores[i] >= upper;
            }
        total.above += above;
        total.reached += reached;
        if (above > reached)
            for (int64_t i = start; i < end; ++i) {
                between[found] = scores[i];
                found += (scores[i] > lower) & !(scores[i] >= upper);
            }
    }
    return total;
}

// The bit patterns of positive floats order like their values. What is not positive, a NaN too, counts as zero.
INLINED uint32_t key_of(float score) { return score > 0 ? as_bits(score) : 0; }

constexpr int64_t FEW = 16;  // fewer, where more of them are looked for

// Write the bins of the scores whose keys lie in the window to `inside`, in room for one more, and return how
// many they are; adds those below it to `below`, and those that are no scores to `unfit`.
VECTORISED int64_t bin_tile(const float* __restrict scores, uint32_t low, int32_t shift, uint32_t bins,
                            uint32_t* __restrict distances, uint32_t* __restrict inside, int64_t size,
                            int64_t& below, int64_t& unfit) {
    // Distances wrap: a key below the window is at least 2^31 from its beginning.
    const uint32_t width = static_cast<uint32_t>(
        std::min<uint64_t>(static_cast<uint64_t>(bins) << shift, uint64_t{1} << 31));
    int32_t under = 0, fit = 0;
    for (int64_t i = 0; i < size; ++i) {
        const uint32_t key = key_of(scores[i]);
        distances[i] = key - low;
        under += key < low;
        fit += (scores[i] >= 0) & (scores[i] < std::numeric_limits<float>::infinity());
    }
    below += under;
    unfit += size - fit;
    int64_t found = 0;
    for (int64_t start = 0; start < size; start += FEW) {
        const int64_t end = std::min(start + FEW, size);
        uint32_t nearest = ~uint32_t{0};
        if (end - start == FEW)
            for (int64_t i = 0; i < FEW; ++i) nearest = std::min(nearest, distances[start + i]);
        else
            nearest = 0;
        if (nearest < width)
            for (int64_t i = start; i < end; ++i) {
                inside[found] = distances[i] >> shift;
                found += distances[i] < width;
            }
    }
    return found;
}

// A cache line a thread.
struct alignas(64) Tally {
    int64_t counts[3] = {};
    double norms[3] = {};
};

}  // namespace

// Arrays of addresses and dtypes hold one row a role, `tensors` entries each. Lists have been validated.
extern "C" {

// What the callers of this library expect of it; to be raised with every change of a signature below.
int32_t rkif_abi() { return 3; }

// Roles: parameter, gradient, sensitivity, uncertainty. Returns the number of non-finite importances.
int64_t rkif_update_importance(int64_t tensors, const int64_t* numels, const int64_t* addresses,
                               const int32_t* dtypes, float keep1, float take1, float keep2, float take2,
                               int32_t order, int32_t threads) {
    auto role = [&](int row) { return Role{addresses + row * tensors, dtypes + row * tensors}; };
    const Role params = role(0), grads = role(1), sensitivity = role(2), uncertainty = role(3);
    const Smoothing smoothing{keep1, take1, keep2, take2};
    std::vector<Tally> tallies(std::max(threads, 1));
    for_tiles(tensors, numels, threads, [&](int thread, int64_t tensor, int64_t start, int64_t size) {
        alignas(64) float buffers[4][TILE];
        const float* w = params.read(tensor, start, size, buffers[0]);
        const float* g = buffers[1];
        if (grads.present(tensor))
            g = grads.read(tensor, start, size, buffers[1]);
        else
            std::fill_n(buffers[1], size, 0.0f);
        float* s = sensitivity.edit(tensor, start, size, buffers[2]);
        float* u = uncertainty.present(tensor) ? uncertainty.edit(tensor, start, size, buffers[3]) : nullptr;
        const int64_t bad = update_tile(w, g, s, u, size, smoothing, order);
        sensitivity.write(tensor, start, size, s);
        if (u) uncertainty.write(tensor, start, size, u);
        tallies[thread].counts[0] += bad;
    });
    int64_t bad = 0;
    for (const Tally& tally : tallies) bad += tally.counts[0];
    return bad;
}

// Roles: sensitivity, uncertainty. Writes every step-th score, counted through all tensors, to `sample`.
void rkif_sample(int64_t tensors, const int64_t* numels, const int64_t* addresses, const int32_t* dtypes,
                 int32_t distance, int64_t step, float* sample, int32_t threads) {
    const Scores scores{{addresses, dtypes}, {addresses + tensors, dtypes + tensors}, distance != 0};
    std::vector<int64_t> firsts(tensors + 1, 0);
    for (int64_t t = 0; t < tensors; ++t) firsts[t + 1] = firsts[t] + numels[t];
    for_tiles(tensors, numels, threads, [&](int, int64_t tensor, int64_t start, int64_t size) {
        const int64_t first = firsts[tensor] + start;
        for (int64_t place = (first + step - 1) / step; place * step < first + size; ++place) {
            float buffers[3];
            const int64_t at = place * step - firsts[tensor];
            sample[place] = *scores.read(tensor, at, 1, buffers, buffers + 1, buffers + 2);
        }
    });
}

// Roles: sensitivity, uncertainty. Counts the scores > lower and those >= upper into counts[0] and [1], and
// gathers those between them; counts[2] is how many, which may be more than the `capacity` of `between`.
void rkif_split(int64_t tensors, const int64_t* numels, const int64_t* addresses, const int32_t* dtypes,
                int32_t distance, float lower, float upper, float* between, int64_t capacity, int64_t* counts,
                int32_t threads) {
    const Scores source{{addresses, dtypes}, {addresses + tensors, dtypes + tensors}, distance != 0};
    std::vector<Tally> tallies(std::max(threads, 1));
    std::atomic<int64_t> found{0};
    for_tiles(tensors, numels, threads, [&](int thread, int64_t tensor, int64_t start, int64_t size) {
        alignas(64) float buffers[3][TILE], inside[TILE + 1];
        const float* scores = source.read(tensor, start, size, buffers[0], buffers[1], buffers[2]);
        const Sides sides = split_tile(scores, lower, upper, inside, size);
        tallies[thread].counts[0] += sides.above;
        tallies[thread].counts[1] += sides.reached;
        if (sides.above <= sides.reached) return;
        const int64_t n = sides.above - sides.reached;
        const int64_t first = found.fetch_add(n, std::memory_order_relaxed);
        if (first + n <= capacity) std::memcpy(between + first, inside, n * sizeof(float));
    });
    counts[0] = counts[1] = 0;
    for (const Tally& tally : tallies) {
        counts[0] += tally.counts[0];
        counts[1] += tally.counts[1];
    }
    counts[2] = found;
}

// Roles: sensitivity, uncertainty. Adds the scores to `counts`: [0] keys below the window that begins at `low`,
// then its `bins` bins of 2^shift keys each, then all the others; last, those that are no scores.
void rkif_count(int64_t tensors, const int64_t* numels, const int64_t* addresses, const int32_t* dtypes,
                int32_t distance, int64_t low, int32_t shift, int64_t bins, int64_t* counts, int32_t threads) {
    const Scores source{{addresses, dtypes}, {addresses + tensors, dtypes + tensors}, distance != 0};
    std::vector<Tally> tallies(std::max(threads, 1));
    for_tiles(tensors, numels, threads, [&](int thread, int64_t tensor, int64_t start, int64_t size) {
        alignas(64) float buffers[3][TILE];
        alignas(64) uint32_t distances[TILE], inside[TILE + 1];
        const float* scores = source.read(tensor, start, size, buffers[0], buffers[1], buffers[2]);
        Tally& tally = tallies[thread];
        const int64_t found = bin_tile(scores, static_cast<uint32_t>(low), shift, static_cast<uint32_t>(bins),
                                       distances, inside, size, tally.counts[0], tally.counts[2]);
        tally.counts[1] += size - found;
        // Equal neighbours together: ties by the million would have the threads fight for one address.
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
}

// Roles: out, base, inner, outer, inner sensitivity and uncertainty, outer sensitivity and uncertainty.
// counts: selected by the inner learner, the outer one, both. norms: squared, of the task vectors, the update.
void rkif_fuse(int64_t tensors, const int64_t* numels, const int64_t* addresses, const int32_t* dtypes,
               const float* inner_thresholds, const float* outer_thresholds, const float* inner_weights,
               const float* outer_weights, int32_t outer_from_inner, int32_t inner_distance,
               int32_t outer_distance, int64_t* counts, double* norms, int32_t threads) {
    auto role = [&](int row) { return Role{addresses + row * tensors, dtypes + row * tensors}; };
    const Role out = role(0), base = role(1), inner = role(2), outer = role(3);
    const Scores of_inner{role(4), role(5), inner_distance != 0}, of_outer{role(6), role(7), outer_distance != 0};
    Rule rule;
    std::copy_n(inner_weights, 4, rule.inner);
    std::copy_n(outer_weights, 4, rule.outer);
    rule.from_inner = outer_from_inner != 0;
    std::vector<Tally> tallies(std::max(threads, 1));
    for_tiles(tensors, numels, threads, [&](int thread, int64_t tensor, int64_t start, int64_t size) {
        alignas(64) float buffers[9][TILE], tau_in[TILE], tau_out[TILE], fused[TILE];
        const float* b = base.read(tensor, start, size, buffers[0]);
        const float* i = inner.read(tensor, start, size, buffers[1]);
        const float* o = outer.read(tensor, start, size, buffers[2]);
        const float* score_in = of_inner.read(tensor, start, size, buffers[3], buffers[4], buffers[5]);
        const float* score_out = of_outer.read(tensor, start, size, buffers[6], buffers[7], buffers[8]);
        const Counts selected =
            fuse_tile(b, i, o, score_in, score_out, inner_thresholds[tensor], outer_thresholds[tensor], rule,
                      tau_in, tau_out, fused, size);
        // The norm is that of the stored, rounded value. `b` may be the very memory that is written.
        if (b != buffers[0]) {
            std::copy_n(b, size, buffers[0]);
            b = buffers[0];
        }
        out.write(tensor, start, size, fused);
        const float* stored = out.read(tensor, start, size, buffers[1]);
        Tally& tally = tallies[thread];
        tally.counts[0] += selected.inner;
        tally.counts[1] += selected.outer;
        tally.counts[2] += selected.both;
        tally.norms[0] += squared_norm(tau_in, size);
        tally.norms[1] += squared_norm(tau_out, size);
        tally.norms[2] += squared_distance(stored, b, size);
    });
    std::fill_n(counts, 3, 0);
    std::fill_n(norms, 3, 0.0);
    for (const Tally& tally : tallies)
        for (int k = 0; k < 3; ++k) {
            counts[k] += tally.counts[k];
            norms[k] += tally.norms[k];
        }
}

}  // extern "C"

#include "adamw.h"
