// NumPy's random numbers, from any position of a stream: Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy
// as 1, 2, 3", SC 2011), as numpy.random.Philox and Generator.random(dtype=float32) use it.
#pragma once

#include <cstdint>

constexpr int64_t DRAWS = 8;  // float32 numbers of one counter

struct PhiloxKey {
    uint64_t low, high;
};

// The numbers in [0, 1) of a counter.
inline void philox_draws(PhiloxKey key, uint64_t counter, float* to) {
    __extension__ using Wide = unsigned __int128;
    uint64_t x[4] = {counter, 0, 0, 0};
    for (int round = 0; round < 10; ++round) {
        const Wide first = static_cast<Wide>(0xD2E7470EE14C6C93u) * x[0];
        const Wide second = static_cast<Wide>(0xCA5A826395121157u) * x[2];
        x[0] = static_cast<uint64_t>(second >> 64) ^ x[1] ^ key.low;
        x[2] = static_cast<uint64_t>(first >> 64) ^ x[3] ^ key.high;
        x[1] = static_cast<uint64_t>(second);
        x[3] = static_cast<uint64_t>(first);
        key.low += 0x9E3779B97F4A7C15u;
        key.high += 0xBB67AE8584CAA73Bu;
    }
    for (int i = 0; i < 4; ++i) {
        to[2 * i] = static_cast<float>(static_cast<uint32_t>(x[i]) >> 8) * 0x1p-24f;
        to[2 * i + 1] = static_cast<float>(x[i] >> 40) * 0x1p-24f;
    }
}

// The `size` numbers of a stream from `start` on; `to` has space for sixteen more. Returns the address of the first.
inline const float* philox_stream(PhiloxKey key, int64_t start, int64_t size, float* to) {
    const int64_t skipped = start % DRAWS;
    for (int64_t done = 0; done < skipped + size; done += DRAWS)
        // NumPy increments the counter before it uses it.
        philox_draws(key, static_cast<uint64_t>((start - skipped + done) / DRAWS + 1), to + done);
    return to + skipped;
}
