// What the kernels share: dtypes, the conversions of 16-bit numbers, and how a tensor's elements are addressed.
#pragma once

#include <cstdint>
#include <cstring>

enum Dtype : int32_t { ABSENT = 0, FLOAT32 = 1, BFLOAT16 = 2, FLOAT16 = 3 };
enum Order : int32_t { FIRST = 0, SECOND = 1, MIXED = 2 };

constexpr int64_t TILE = 4096;  // elements; what a thread works on between two looks at its surroundings
constexpr int LANES = 16;       // elements that are computed on together, on every instruction set

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

// Elements of one tensor from some place on, of any dtype; none where it is ABSENT.
struct Row {
    char* at;
    int32_t dtype;

    int64_t width() const { return dtype == FLOAT32 ? 4 : 2; }
    bool present() const { return dtype != ABSENT; }
};

// Lists of tensors, one a role: arrays of addresses and dtypes, one row a role, `tensors` entries each.
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

// Scores: the first row where the second is absent, their distance, or their product.
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

// The merge: weights of the cases neither, inner only, outer only, both; where the second task vector starts.
struct Rule {
    float inner[4], outer[4];
    bool from_inner;
};

// A side's scores <= lo are not selected, those > hi are, and those between are undecided.
struct Bracket {
    float lo, hi;
};

// Elements that no bracket decides, in the order in which one thread came by them, with all that decides them.
struct Undecided {
    float *inner_score, *outer_score, *base, *inner, *outer;
    int32_t* offset;  // from the start of the element's tile
    int64_t size;
};

struct FuseCounts {
    int64_t inner, outer, both;  // selected by the inner learner, the outer one, both; of what is decided
    int64_t below[2], up_to[2];  // scores of a side < lo and <= lo
};

struct SplitCounts {
    int64_t above, reached, between;
};
