// Task arithmetic on a tile: part of tile.h, written for sixteen lanes.

// Which elements a side keeps: those above the threshold, or those whose draw is below `density`, if there are draws.
struct Kept {
    F threshold, density, scale, weight;
    const float* draws;

    TARGET ALWAYS_INLINE Mask of(F vector, int64_t i) const {
        return draws ? greater(density, load_float32(draws + i)) : greater(magnitude(vector), threshold);
    }
};

// The elements of a weighted task vector whose sign is positive (or negative, where `positive` is not set).
TARGET inline Mask agreeing(Mask positive, F weighted) {
    return (greater(weighted, set(0.0f)) & positive) | (greater(set(0.0f), weighted) & ~positive);
}

// Merge two task vectors that start from `in[0]`. `draws` has space for fifteen more than `size`.
TARGET void merge_tile(const Row& out, const Row* in, int64_t size, const TaskVectorSide* sides,
                       const TaskVectorRule& rule, FuseCounts& counts, double* norms) {
    Kept kept[2];
    for (int side = 0; side < 2; ++side) {
        const TaskVectorSide& of = sides[side];
        kept[side] = {set(of.threshold), set(rule.density), set(of.scale), set(rule.weights[side]), of.draws};
    }
    const F zero = set(0.0f), one = set(1.0f), factor = set(rule.factor);
    Squares n_in = no_squares(), n_out = no_squares(), n_update = no_squares();
    for (int64_t i = 0; i < size; i += LANES) {
        const int64_t n = size - i < LANES ? size - i : LANES;
        const Mask there = static_cast<Mask>((1u << n) - 1);
        for (int role = 0; role < 3; ++role) prefetch(in[role], i);
        const F base = load(in[0], i, n);
        const F tau_in = sub(load(in[1], i, n), base), tau_out = sub(load(in[2], i, n), base);
        const Mask m_in = kept[0].of(tau_in, i) & there, m_out = kept[1].of(tau_out, i) & there;
        counts.inner += count(m_in);
        counts.outer += count(m_out);
        counts.both += count(m_in & m_out);
        const F w_in = mul(mul(only(m_in, tau_in), kept[0].scale), kept[0].weight);
        const F w_out = mul(mul(only(m_out, tau_out), kept[1].scale), kept[1].weight);
        F merged = add(w_in, w_out);
        if (rule.consensus) {
            const Mask positive = at_least(merged, zero);
            const Mask first = agreeing(positive, w_in), second = agreeing(positive, w_out);
            merged = add(only(first, w_in), only(second, w_out));
            if (rule.normalize) {
                const F divisor = add(only(first, kept[0].weight), only(second, kept[1].weight));
                const Mask not_zero = greater(divisor, zero) | greater(zero, divisor);
                merged = div(merged, choose(not_zero, one, divisor));
            }
        }
        write(out, i, n, add(base, mul(merged, factor)));
        add_squares(n_in, tau_in);
        add_squares(n_out, tau_out);
        add_squares(n_update, sub(load(out, i, n), base));  // as it is stored
    }
    norms[0] = total(n_in);
    norms[1] = total(n_out);
    norms[2] = total(n_update);
}

// Sums of the magnitudes of a task vector: of all elements, and of those whose draw is below `density`.
TARGET void absolute_sums_tile(const Row& start, const Row& end, int64_t size, float density, const float* draws,
                               double* sums) {
    double whole[LANES] = {}, kept[LANES] = {};
    const F below = set(density);
    for (int64_t i = 0; i < size; i += LANES) {
        const int64_t n = size - i < LANES ? size - i : LANES;
        const F distance = magnitude(sub(load(end, i, n), load(start, i, n)));
        alignas(64) float all[LANES], some[LANES];
        store(all, distance);
        store(some, only(greater(below, load_float32(draws + i)), distance));
        for (int lane = 0; lane < LANES; ++lane) {
            whole[lane] += static_cast<double>(all[lane]);
            kept[lane] += static_cast<double>(some[lane]);
        }
    }
    sums[0] = sums[1] = 0;
    for (int lane = 0; lane < LANES; ++lane) {
        sums[0] += whole[lane];
        sums[1] += kept[lane];
    }
}
