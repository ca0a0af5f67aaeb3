// AdamW on CPU memory, with the importance updated in the same pass. Part of kernels.cpp, whose tiles, roles and
// importance it uses; one translation unit, so that the tiles' loops are inlined here too.

#pragma once

namespace {

struct AdamWConstants {
    float decay, take1, keep2, take2, unbias2, eps, step_size;
};

VECTORISED void adamw_tile(float* __restrict w, const float* __restrict g, float* __restrict m,
                           float* __restrict v, int64_t size, AdamWConstants c) {
    for (int64_t i = 0; i < size; ++i) {
        const float mean = m[i] + c.take1 * (g[i] - m[i]);
        const float square = c.keep2 * v[i] + c.take2 * g[i] * g[i];
        w[i] = c.decay * w[i] - c.step_size * mean / (std::sqrt(square) * c.unbias2 + c.eps);
        m[i] = mean;
        v[i] = square;
    }
}

}  // namespace

// Roles: parameter, gradient, first and second moment, sensitivity, uncertainty; the last two may be absent.
// Returns the number of non-finite importances.
extern "C" int64_t rkif_adamw(int64_t tensors, const int64_t* numels, const int64_t* addresses,
                              const int32_t* dtypes, float decay, float take1, float keep2, float take2,
                              float unbias2, float eps, float step_size, float importance_keep1,
                              float importance_take1, float importance_keep2, float importance_take2,
                              int32_t order, int32_t threads) {
    auto role = [&](int row) { return Role{addresses + row * tensors, dtypes + row * tensors}; };
    const Role params = role(0), grads = role(1), means = role(2), squares = role(3), sensitivity = role(4),
               uncertainty = role(5);
    const AdamWConstants constants{decay, take1, keep2, take2, unbias2, eps, step_size};
    const Smoothing smoothing{importance_keep1, importance_take1, importance_keep2, importance_take2};
    std::vector<Tally> tallies(std::max(threads, 1));
    for_tiles(tensors, numels, threads, [&](int thread, int64_t tensor, int64_t start, int64_t size) {
        alignas(64) float buffers[6][TILE];
        float* w = params.edit(tensor, start, size, buffers[0]);
        const float* g = grads.read(tensor, start, size, buffers[1]);
        if (sensitivity.present(tensor)) {
            float* s = sensitivity.edit(tensor, start, size, buffers[2]);
            float* u =
                uncertainty.present(tensor) ? uncertainty.edit(tensor, start, size, buffers[3]) : nullptr;
            tallies[thread].counts[0] += update_tile(w, g, s, u, size, smoothing, order);
            sensitivity.write(tensor, start, size, s);
            if (u) uncertainty.write(tensor, start, size, u);
        }
        float* m = means.edit(tensor, start, size, buffers[4]);
        float* v = squares.edit(tensor, start, size, buffers[5]);
        adamw_tile(w, g, m, v, size, constants);
        params.write(tensor, start, size, w);
        means.write(tensor, start, size, m);
        squares.write(tensor, start, size, v);
    });
    int64_t bad = 0;
    for (const Tally& tally : tallies) bad += tally.counts[0];
    return bad;
}
