// AdamW on CPU memory, with the importance updated in the same pass. Part of kernels.cpp, whose tiles and parts
// it uses.

#pragma once

// Roles: parameter, gradient, first and second moment, sensitivity, uncertainty; the last two may be absent.
// Returns the number of non-finite importances.
extern "C" int64_t rkif_adamw(int64_t tensors, const int64_t* numels, const int64_t* addresses,
                              const int32_t* dtypes, float decay, float take1, float keep2, float take2,
                              float unbias2, float eps, float step_size, float importance_keep1,
                              float importance_take1, float importance_keep2, float importance_take2,
                              int32_t order, int32_t threads) try {
    const Lists lists{tensors, numels, addresses, dtypes};
    const AdamWConstants constants{decay, take1, keep2, take2, unbias2, eps, step_size};
    const Smoothing smoothing{importance_keep1, importance_take1, importance_keep2, importance_take2};
    std::vector<Tally> tallies(std::max(threads, 1));
    for_each_part<6>(lists, threads, [&](int thread, Parts<6>& parts, int64_t size) {
        auto [w, g, m, v, s, u] = parts.values;
        if (s) tallies[thread].counts[0] += isa->update_tile(w, g, s, u, size, smoothing, order);
        isa->adamw_tile(w, g, m, v, size, constants);
        for (int role : {0, 2, 3, 4, 5}) parts.write(role, size);
    });
    return total(tallies);
} catch (const std::bad_alloc&) {
    return refused(int64_t{0});
}
