// The operations on a tile, written for sixteen lanes. Included once per instruction set, in a separate namespace,
// after its lanes. TARGET precedes every function.

constexpr int64_t AHEAD = 512;  // distance of prefetching, in elements

TARGET inline void prefetch(Row row, int64_t i) { __builtin_prefetch(row.at + (i + AHEAD) * row.width()); }

// Sixteen elements from `i` on, in float32; the last `LANES - n` are zero.
TARGET inline F load(Row row, int64_t i, int64_t n) {
    const char* at = row.at + i * row.width();
    alignas(64) char few[LANES * 4];
    if (n < LANES) {
        std::memset(few, 0, sizeof few);
        std::memcpy(few, at, n * row.width());
        at = few;
    }
    return row.dtype == FLOAT32 ? load_float32(at) : row.dtype == BFLOAT16 ? load_bfloat16(at) : load_float16(at);
}

// Round to a dtype, as a store does.
TARGET inline F rounded(int32_t dtype, F x) {
    if (dtype == FLOAT32) return x;
    alignas(64) float wide[LANES];
    store(wide, x);
    for (int lane = 0; lane < LANES; ++lane)
        wide[lane] = dtype == BFLOAT16 ? from_bfloat16(to_bfloat16(wide[lane])) : from_half(to_half(wide[lane]));
    return load_float32(wide);
}

TARGET inline void write(Row row, int64_t i, int64_t n, const float* values) {
    char* at = row.at + i * row.width();
    if (row.dtype == FLOAT32) {
        std::memcpy(at, values, n * sizeof(float));
        return;
    }
    uint16_t narrow[LANES];
    for (int lane = 0; lane < LANES; ++lane)
        narrow[lane] = row.dtype == BFLOAT16 ? to_bfloat16(values[lane]) : to_half(values[lane]);
    std::memcpy(at, narrow, n * sizeof(uint16_t));
}

TARGET inline void write(Row row, int64_t i, int64_t n, F x) {
    if (row.dtype == FLOAT32 && n == LANES) {
        store(reinterpret_cast<float*>(row.at) + i, x);
        return;
    }
    alignas(64) float values[LANES];
    store(values, x);
    write(row, i, n, values);
}

TARGET inline F score(const ScoreRows& rows, int64_t i, int64_t n) {
    const F first = load(rows.first, i, n);
    if (!rows.second.present()) return first;
    const F second = load(rows.second, i, n);
    return rows.distance ? magnitude(sub(first, second)) : mul(first, second);
}

TARGET inline double total(const Squares& sums) {
    double lanes[LANES], sum = 0;
    store(lanes, sums);
    for (double lane : lanes) sum += lane;
    return sum;
}

struct Weights {
    F inner[4], outer[4];
};

TARGET inline Weights weights_of(const Rule& rule) {
    Weights w;
    for (int which = 0; which < 4; ++which) {
        w.inner[which] = set(rule.inner[which]);
        w.outer[which] = set(rule.outer[which]);
    }
    return w;
}

TARGET inline F weight(const F* w, Mask inner, Mask outer) {
    return choose(outer, choose(inner, w[0], w[1]), choose(inner, w[2], w[3]));
}

TARGET inline F merge(F base, F tau_in, F tau_out, const Weights& w, Mask inner, Mask outer) {
    const F half = add(base, mul(weight(w.inner, inner, outer), tau_in));
    return add(half, mul(weight(w.outer, inner, outer), tau_out));
}

// A tile's fusion. PLAIN: everything is float32, and no score is a distance.
template <bool PLAIN>
struct TileFusion {
    Row out, base, inner, outer;
    ScoreRows of_inner, of_outer;
    Weights w;
    F lo_in, hi_in, lo_out, hi_out;
    bool from_inner, streaming;
    Undecided list;
    Squares n_in, n_out, n_update;
    int64_t m_inner = 0, m_outer = 0, m_both = 0, below_in = 0, below_out = 0, over_in = 0, over_out = 0;

    TARGET ALWAYS_INLINE F read(Row row, int64_t i, int64_t n) const {
        prefetch({row.at, PLAIN ? FLOAT32 : row.dtype}, i);
        return load({row.at, PLAIN ? FLOAT32 : row.dtype}, i, n);
    }

    // A NaN counts as zero, as in the selection.
    TARGET ALWAYS_INLINE F read(const ScoreRows& rows, int64_t i, int64_t n) const {
        const F first = read(rows.first, i, n);
        if (!rows.second.present()) return not_negative(first);
        const F second = read(rows.second, i, n);
        return not_negative(!PLAIN && rows.distance ? magnitude(sub(first, second)) : mul(first, second));
    }

    // Fuse the `n` elements from `i` on, at most sixteen.
    TARGET ALWAYS_INLINE void step(int64_t i, int64_t n) {
        const Mask there = static_cast<Mask>((1u << n) - 1);
        const F b = read(base, i, n), p = read(inner, i, n), q = read(outer, i, n);
        const F s_in = read(of_inner, i, n), s_out = read(of_outer, i, n);
        const Mask m_in = greater(s_in, lo_in) & there, m_out = greater(s_out, lo_out) & there;
        const Mask open = (m_in & at_least(hi_in, s_in)) | (m_out & at_least(hi_out, s_out));
        const Mask sure = there & ~open;
        below_in += count(greater(lo_in, s_in) & there);
        below_out += count(greater(lo_out, s_out) & there);
        over_in += count(m_in);
        over_out += count(m_out);
        m_inner += count(m_in & sure);
        m_outer += count(m_out & sure);
        m_both += count(m_in & m_out & sure);
        const F tau_in = sub(p, b), tau_out = sub(q, from_inner ? p : b);
        const F fused = merge(b, tau_in, tau_out, w, m_in, m_out);
        if (PLAIN && streaming && n == LANES)
            stream(reinterpret_cast<float*>(out.at) + i, fused);
        else
            write({out.at, PLAIN ? FLOAT32 : out.dtype}, i, n, fused);
        add_squares(n_in, tau_in);
        add_squares(n_out, tau_out);
        add_squares(n_update, only(sure, sub(PLAIN ? fused : rounded(out.dtype, fused), b)));
        if (!open) return;
        compress_places(list.offset + list.size, open, static_cast<int32_t>(i));
        compress(list.inner_score + list.size, open, s_in);
        compress(list.outer_score + list.size, open, s_out);
        compress(list.base + list.size, open, b);
        compress(list.inner + list.size, open, p);
        compress(list.outer + list.size, open, q);
        list.size += count(open);
    }
};

template <bool PLAIN>
TARGET void fuse_rows(const Row& out, const Row* in, const ScoreRows* scores, int64_t size, const Bracket* brackets,
                      const Rule& rule, bool streaming, FuseCounts& counts, Undecided& list, double* norms) {
    TileFusion<PLAIN> tile;
    tile.out = out, tile.base = in[0], tile.inner = in[1], tile.outer = in[2];
    tile.of_inner = scores[0], tile.of_outer = scores[1];
    tile.w = weights_of(rule);
    tile.lo_in = set(brackets[0].lo), tile.hi_in = set(brackets[0].hi);
    tile.lo_out = set(brackets[1].lo), tile.hi_out = set(brackets[1].hi);
    tile.from_inner = rule.from_inner, tile.streaming = streaming;
    tile.list = list;
    tile.n_in = tile.n_out = tile.n_update = no_squares();
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) tile.step(i, LANES);
    if (i < size) tile.step(i, size - i);
    list.size = tile.list.size;
    counts.inner += tile.m_inner;
    counts.outer += tile.m_outer;
    counts.both += tile.m_both;
    counts.below[0] += tile.below_in;
    counts.below[1] += tile.below_out;
    counts.up_to[0] += size - tile.over_in;
    counts.up_to[1] += size - tile.over_out;
    norms[0] = total(tile.n_in);
    norms[1] = total(tile.n_out);
    norms[2] = total(tile.n_update);
}

// Fuse a tile. Undecided elements are written as if scores in a bracket were selected; they are listed and not counted.
// `norms`: squared norms of both task vectors, and of the decided part of the update. The list has space for the tile.
TARGET void fuse_tile(const Row& out, const Row* in, const ScoreRows* scores, int64_t size, const Bracket* brackets,
                      const Rule& rule, bool streaming, FuseCounts& counts, Undecided& list, double* norms) {
    bool plain = out.dtype == FLOAT32;
    for (int role = 0; role < 3; ++role) plain &= in[role].dtype == FLOAT32;
    for (int side = 0; side < 2; ++side) {
        plain &= scores[side].first.dtype == FLOAT32 && !scores[side].distance;
        plain &= scores[side].second.dtype == FLOAT32 || !scores[side].second.present();
    }
    (plain ? fuse_rows<true> : fuse_rows<false>)(out, in, scores, size, brackets, rule, streaming, counts, list, norms);
}

// Decide the listed elements of a tile, from `first` to before `last`; returns the squared norm of the update.
TARGET double decide_tile(const Row& out, const Undecided& list, int64_t first, int64_t last, const Bracket* brackets,
                          const float* thresholds, const Rule& rule, FuseCounts& counts) {
    const Weights w = weights_of(rule);
    const F limit_in = set(thresholds[0]), limit_out = set(thresholds[1]);
    const F lo_in = set(brackets[0].lo), lo_out = set(brackets[1].lo);
    Squares n_update = no_squares();
    const auto row = [](float* at) { return Row{reinterpret_cast<char*>(at), FLOAT32}; };
    for (int64_t j = first; j < last; j += LANES) {
        const int64_t n = last - j < LANES ? last - j : LANES;
        const Mask there = static_cast<Mask>((1u << n) - 1);
        const F s_in = load(row(list.inner_score), j, n), s_out = load(row(list.outer_score), j, n);
        const Mask m_in = greater(s_in, limit_in) & there, m_out = greater(s_out, limit_out) & there;
        const F b = load(row(list.base), j, n), p = load(row(list.inner), j, n), q = load(row(list.outer), j, n);
        const F fused = merge(b, sub(p, b), sub(q, rule.from_inner ? p : b), w, m_in, m_out);
        alignas(64) float values[LANES];
        store(values, fused);
        // The pass wrote elements as selected, so only elements with a different mask are written again.
        const Mask wrong = there & ((m_in ^ greater(s_in, lo_in)) | (m_out ^ greater(s_out, lo_out)));
        for (int64_t lane = 0; lane < n; ++lane) {
            if (!(wrong >> lane & 1)) continue;
            const Row place{out.at + list.offset[j + lane] * out.width(), out.dtype};
            if (out.dtype == FLOAT32)
                std::memcpy(place.at, values + lane, sizeof(float));
            else {
                const uint16_t narrow = out.dtype == BFLOAT16 ? to_bfloat16(values[lane]) : to_half(values[lane]);
                std::memcpy(place.at, &narrow, sizeof narrow);
            }
        }
        counts.inner += count(m_in);
        counts.outer += count(m_out);
        counts.both += count(m_in & m_out);
        add_squares(n_update, only(there, sub(rounded(out.dtype, fused), b)));
    }
    return total(n_update);
}

// Gather the values with lo < value <= hi, and return their number. `to` has space for fifteen more.
TARGET int64_t gather(const float* values, int64_t size, Bracket bracket, float* to) {
    const Row row{reinterpret_cast<char*>(const_cast<float*>(values)), FLOAT32};
    const F lo = set(bracket.lo), hi = set(bracket.hi);
    int64_t found = 0;
    for (int64_t i = 0; i < size; i += LANES) {
        const int64_t n = size - i < LANES ? size - i : LANES;
        const F x = load(row, i, n);
        const Mask inside = greater(x, lo) & at_least(hi, x) & static_cast<Mask>((1u << n) - 1);
        compress(to + found, inside, x);
        found += count(inside);
    }
    return found;
}

// Count the scores > lower and those >= upper (none if upper is NaN), and gather those between.
TARGET SplitCounts split_tile(const ScoreRows& rows, int64_t size, float lower, float upper, float* between) {
    const ScoreRows source = rows;
    const F lo = set(lower), hi = set(upper);
    int64_t above = 0, reached = 0, found = 0;
    for (int64_t i = 0; i < size; i += LANES) {
        const int64_t n = size - i < LANES ? size - i : LANES;
        const Mask there = static_cast<Mask>((1u << n) - 1);
        prefetch(source.first, i);
        if (source.second.present()) prefetch(source.second, i);
        const F x = score(source, i, n);
        const Mask over = greater(x, lo) & there, beyond = at_least(x, hi) & there, inside = over & ~beyond;
        above += count(over);
        reached += count(beyond);
        if (inside) {
            compress(between + found, inside, x);
            found += count(inside);
        }
    }
    return {above, reached, found};
}

TARGET void read_scores(const ScoreRows& rows, int64_t size, float* to) {
    for (int64_t i = 0; i < size; i += LANES) {
        const int64_t n = size - i < LANES ? size - i : LANES;
        alignas(64) float values[LANES];
        store(values, score(rows, i, n));
        std::memcpy(to + i, values, n * sizeof(float));
    }
}

TARGET void widen_row(const Row& row, int64_t size, float* to) {
    if (row.dtype == FLOAT32) std::memcpy(to, row.at, size * sizeof(float));
    const uint16_t* from = reinterpret_cast<const uint16_t*>(row.at);
    if (row.dtype == BFLOAT16)
        for (int64_t i = 0; i < size; ++i) to[i] = from_bfloat16(from[i]);
    if (row.dtype == FLOAT16)
        for (int64_t i = 0; i < size; ++i) to[i] = from_half(from[i]);
}

TARGET void narrow_row(const Row& row, int64_t size, const float* values) {
    uint16_t* to = reinterpret_cast<uint16_t*>(row.at);
    if (row.dtype == BFLOAT16)
        for (int64_t i = 0; i < size; ++i) to[i] = to_bfloat16(values[i]);
    if (row.dtype == FLOAT16)
        for (int64_t i = 0; i < size; ++i) to[i] = to_half(values[i]);
}

template <int ORDER>
TARGET inline float importance_of(float w, float g) {
    const float product = w * g, square = product * product;
    return ORDER == FIRST ? __builtin_fabsf(product)
                          : ORDER == SECOND ? square : __builtin_fabsf(product - square * 0.5f);
}

// Update s, and u if there is one; return the number of importances that are not finite. Their elements keep s and u.
// A first loop counts them, which costs less than a condition per element: the second loop reads w and g from the
// cache, and rarely needs the condition.
template <int ORDER>
TARGET int64_t update_order(const float* __restrict w, const float* __restrict g, float* __restrict s,
                            float* __restrict u, int64_t size, Smoothing b) {
    constexpr float infinity = __builtin_inff();
    int32_t bad = 0;
    for (int64_t i = 0; i < size; ++i) bad += !(importance_of<ORDER>(w[i], g[i]) < infinity);
    if (bad || !u) {
        for (int64_t i = 0; i < size; ++i) {
            const float importance = importance_of<ORDER>(w[i], g[i]);
            const bool keep = !(importance < infinity);
            const float next_s = b.keep1 * s[i] + b.take1 * importance;
            s[i] = keep ? s[i] : next_s;
            if (!u) continue;
            const float next_u = b.keep2 * u[i] + b.take2 * __builtin_fabsf(importance - next_s);
            u[i] = keep ? u[i] : next_u;
        }
        return bad;
    }
    for (int64_t i = 0; i < size; ++i) {
        const float importance = importance_of<ORDER>(w[i], g[i]);
        const float next_s = b.keep1 * s[i] + b.take1 * importance;
        s[i] = next_s;
        u[i] = b.keep2 * u[i] + b.take2 * __builtin_fabsf(importance - next_s);
    }
    return 0;
}

TARGET int64_t update_tile(const float* w, const float* g, float* s, float* u, int64_t size, Smoothing b,
                           int order) {
    if (order == FIRST) return update_order<FIRST>(w, g, s, u, size, b);
    if (order == SECOND) return update_order<SECOND>(w, g, s, u, size, b);
    return update_order<MIXED>(w, g, s, u, size, b);
}

TARGET void adamw_tile(float* __restrict w, const float* __restrict g, float* __restrict m, float* __restrict v,
                       int64_t size, AdamWConstants c) {
    for (int64_t i = 0; i < size; ++i) {
        const float mean = m[i] + c.take1 * (g[i] - m[i]);
        const float square = c.keep2 * v[i] + c.take2 * g[i] * g[i];
        w[i] = c.decay * w[i] - c.step_size * mean / (__builtin_sqrtf(square) * c.unbias2 + c.eps);
        m[i] = mean;
        v[i] = square;
    }
}

constexpr int64_t FEW = 16;  // elements that are skipped together if none is in the window

// Write the bins of the scores whose keys lie in the window to `inside`, which has space for one more, and return their
// number. Add the number of keys below the window to `below`, and of invalid scores to `invalid`. Positive
// floats are ordered like their bit patterns; values that are not positive, NaN included, count as zero.
TARGET int64_t bin_tile(const float* __restrict scores, uint32_t low, int32_t shift, uint32_t bins,
                        uint32_t* __restrict distances, uint32_t* __restrict inside, int64_t size,
                        int64_t& below, int64_t& invalid) {
    // Distances wrap: for a key below the window the distance is at least 2^31.
    const uint64_t span = static_cast<uint64_t>(bins) << shift;
    const uint32_t width = static_cast<uint32_t>(span < (uint64_t{1} << 31) ? span : uint64_t{1} << 31);
    int32_t under = 0, valid = 0;
    for (int64_t i = 0; i < size; ++i) {
        const uint32_t key = scores[i] > 0 ? as_bits(scores[i]) : 0;
        distances[i] = key - low;
        under += key < low;
        valid += (scores[i] >= 0) & (scores[i] < __builtin_inff());
    }
    below += under;
    invalid += size - valid;
    int64_t found = 0;
    for (int64_t start = 0; start < size; start += FEW) {
        const int64_t end = start + FEW < size ? start + FEW : size;
        uint32_t nearest = ~uint32_t{0};
        if (end - start == FEW)
            for (int64_t i = 0; i < FEW; ++i) nearest = distances[start + i] < nearest ? distances[start + i] : nearest;
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

#include "task_vectors_tile.h"

const Isa ISA = {fuse_tile, decide_tile, gather, split_tile, read_scores, widen_row, narrow_row, update_tile, adamw_tile,
                 bin_tile, merge_tile, absolute_sums_tile};
