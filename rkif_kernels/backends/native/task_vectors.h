// Task arithmetic on CPU memory. Part of kernels.cpp, whose tiles it uses.

#pragma once

#include "philox.h"

// The random numbers of a tile of a tensor and side.
struct TileDraws {
    alignas(64) float memory[TILE + DRAWS + LANES];

    // Null without keys, of which there is one for each side and tensor. `starts` are the tensors' places in the streams.
    const float* of(const PhiloxKey* keys, const int64_t* starts, int64_t side, int64_t tensors, Tiles::Place place) {
        if (!keys) return nullptr;
        return philox_stream(keys[side * tensors + place.tensor], starts[place.tensor] + place.start, place.size, memory);
    }
};

extern "C" {

// Roles: out, base, inner, outer. `thresholds` and `scales` have a row of `tensors` for each side. Without `keys`, an
// element is kept if its magnitude exceeds the threshold; with keys, at random. For `counts` and `norms` see report().
void rkif_merge(int64_t tensors, const int64_t* numels, const int64_t* addresses, const int32_t* dtypes,
                const float* thresholds, const float* scales, const PhiloxKey* keys, const int64_t* starts,
                float density, float inner_weight, float outer_weight, float factor, int32_t consensus,
                int32_t normalize, int64_t* counts, double* norms, int32_t threads) try {
    const Lists lists{tensors, numels, addresses, dtypes};
    const TaskVectorRule rule{{inner_weight, outer_weight}, factor, density, consensus != 0, normalize != 0};
    const Tiles tiles(lists);
    std::vector<Tally> tallies(std::max(threads, 1));
    std::vector<Norms> of_tiles(tiles.size());
    tiles.for_each(threads, [&](int thread, int64_t tile, Tiles::Place place) {
        const auto [tensor, start, size] = place;
        const Row in[3] = {lists.row(1, tensor, start), lists.row(2, tensor, start), lists.row(3, tensor, start)};
        TileDraws draws[2];
        TaskVectorSide sides[2];
        for (int64_t side = 0; side < 2; ++side)
            sides[side] = {thresholds[side * tensors + tensor], scales[side * tensors + tensor],
                           draws[side].of(keys, starts, side, tensors, place)};
        FuseCounts kept{};
        isa->merge_tile(lists.row(0, tensor, start), in, size, sides, rule, kept, of_tiles[tile].squared);
        tallies[thread].counts[0] += kept.inner;
        tallies[thread].counts[1] += kept.outer;
        tallies[thread].counts[2] += kept.both;
    });
    std::fill_n(counts, 3, 0);
    std::fill_n(norms, 3, 0.0);
    for (const Tally& tally : tallies)
        for (int which = 0; which < 3; ++which) counts[which] += tally.counts[which];
    for (const Norms& tile : of_tiles)
        for (int which = 0; which < 3; ++which) norms[which] += tile.squared[which];
} catch (const std::bad_alloc&) {
    static_cast<void>(refused(0));
}

// Roles: base, inner, outer. `sums` has rows of `tensors`: the L1 norms of the inner and of the outer task vectors, then
// those of the elements that are kept at random.
void rkif_absolute_sums(int64_t tensors, const int64_t* numels, const int64_t* addresses, const int32_t* dtypes,
                        const PhiloxKey* keys, const int64_t* starts, float density, double* sums,
                        int32_t threads) try {
    const Lists lists{tensors, numels, addresses, dtypes};
    const Tiles tiles(lists);
    std::vector<double> of_tiles(4 * tiles.size());
    tiles.for_each(threads, [&](int, int64_t tile, Tiles::Place place) {
        const Row base = lists.row(0, place.tensor, place.start);
        for (int64_t side = 0; side < 2; ++side) {
            TileDraws draws;
            isa->absolute_sums_tile(base, lists.row(1 + side, place.tensor, place.start), place.size, density,
                                    draws.of(keys, starts, side, tensors, place), &of_tiles[4 * tile + 2 * side]);
        }
    });
    std::fill_n(sums, 4 * tensors, 0.0);
    for (int64_t tile = 0; tile < tiles.size(); ++tile)
        for (int64_t side = 0; side < 2; ++side)
            for (int64_t kept = 0; kept < 2; ++kept)
                sums[(2 * kept + side) * tensors + tiles[tile].tensor] += of_tiles[4 * tile + 2 * side + kept];
} catch (const std::bad_alloc&) {
    static_cast<void>(refused(0));
}

}  // extern "C"
