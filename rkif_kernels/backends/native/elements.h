// Shared by all kernels: dtypes, conversions of 16-bit floats, and the addresses of a tensor's elements.
#pragma once

#include <cstdint>
#include <cstring>

enum Dtype : int32_t { ABSENT = 0, FLOAT32 = 1, BFLOAT16 = 2, FLOAT16 = 3 };
enum Order : int32_t { FIRST = 0, SECOND = 1, MIXED = 2 };

constexpr int64_t TILE = 4096;  // elements; the unit of work of a thread
constexpr int LANES = 16;       // elements that are computed together, on every instruction set

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float from_bfloat16(uint16_t value) { return as_float(static_cast<uint32_t>(value) << 16); }

inline float from_half(uint16_t half) {
    // The exponents' biases differ by 112. A subnormal half is a multiple of 2^-24. Its bits are placed in the
    // mantissa of 2^-14, and subtracting 2^-14 is exact. No operand is a subnormal float32, which might be flushed.
    const uint32_t magnitude = half & 0x7fffu;
    const uint32_t subnormal = as_bits(as_float(0x38800000u | (magnitude << 13)) - 0x1p-14f);
    const uint32_t normal = (magnitude << 13) + 0x38000000u;
    const uint32_t special = (magnitude << 13) | 0x7f800000u;
    const uint32_t bits = magnitude < 0x0400u ? subnormal : magnitude >= 0x7c00u ? special : normal;
    return as_float(bits | (static_cast<uint32_t>(half & 0x8000u) << 16));
}

// Rounds to nearest, ties to even, as all conversions here.
inline uint16_t to_half(float value) {
    const uint32_t bits = as_bits(value), magnitude = bits & 0x7fffffffu;
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    const uint32_t normal = rounded >= 0x47800000u ? 0x7c00u : (rounded - 0x38000000u) >> 13;
    // In a float32 near 0.5 the last bit has the value of a subnormal half's last bit, so the addition rounds.
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

// The elements of a tensor from an offset on; none if the dtype is ABSENT.
struct Row {
    char* at;
    int32_t dtype;

    int64_t width() const { return dtype == FLOAT32 ? 4 : 2; }
    bool present() const { return dtype != ABSENT; }
};

// Lists of tensors, one per role: arrays of addresses and dtypes, one row of `tensors` entries per role.
struct Lists {
    int64_t tensors;
    const int64_t* numels;
    const int64_t* addresses;
    const int32_t* dtypes;

    Row row(int role, int64_t tensor, int64_t start) const {
        Row row{reinterpret_cast<char*>(addresses[role * tensors + tensor]), dtypes[role * tensors + tensor]};
        row.at += start * row.width();
        return row;
    }
};

// Scores: the first row if the second is absent, otherwise their distance or their product.
struct ScoreRows {
    Row first, second;
    bool distance;
};

struct Smoothing {
    float keep1, take1, keep2, take2;
};

struct AdamWConstants {
    float decay, take1, keep2, take2, unbias2, eps, step_size;
};

// The merge: weights of the cases neither, inner only, outer only, both; the start of the second task vector.
struct Rule {
    float inner[4], outer[4];
    bool from_inner;
};

// The merge of task vectors. `density` is the share that is kept at random; `normalize` applies to elected signs.
struct TaskVectorRule {
    float weights[2], factor, density;
    bool consensus, normalize;
};

// A side of a tile. Without draws, magnitudes above the threshold are kept.
struct TaskVectorSide {
    float threshold, scale;
    const float* draws;
};

// Scores of a side <= lo are not selected, scores > hi are selected, and scores between are undecided.
struct Bracket {
    float lo, hi;
};

// Undecided elements of one thread, in the order of processing, with the values that a later decision needs.
struct Undecided {
    float *inner_score, *outer_score, *base, *inner, *outer;
    int32_t* offset;  // from the start of the element's tile
    int64_t size;
};

struct FuseCounts {
    int64_t inner, outer, both;  // decided elements selected by the inner learner, the outer one, both
    int64_t below[2], up_to[2];  // scores of a side < lo and <= lo
};

struct SplitCounts {
    int64_t above, reached, between;
};
