// Sixteen lanes as an array: for any processor.

struct F {
    float lane[LANES];
};
using Mask = uint32_t;

template <class Function>
inline F each(Function function) {
    F result;
    for (int i = 0; i < LANES; ++i) result.lane[i] = function(i);
    return result;
}
template <class Function>
inline Mask where(Function function) {
    Mask mask = 0;
    for (int i = 0; i < LANES; ++i) mask |= static_cast<Mask>(function(i)) << i;
    return mask;
}
template <class Number, class Function>
inline void compress_each(Number* to, Mask m, Function function) {
    for (int i = 0, next = 0; i < LANES; ++i) {
        to[next] = function(i);
        next += m >> i & 1;
    }
}

inline F set(float value) {
    return each([&](int) { return value; });
}
inline F load_float32(const void* at) {
    F x;
    std::memcpy(x.lane, at, sizeof x.lane);
    return x;
}
inline F load_bfloat16(const void* at) {
    return each([&](int i) { return from_bfloat16(static_cast<const uint16_t*>(at)[i]); });
}
inline F load_float16(const void* at) {
    return each([&](int i) { return from_half(static_cast<const uint16_t*>(at)[i]); });
}
inline void store(float* to, F x) { std::memcpy(to, x.lane, sizeof x.lane); }
inline void stream(float* to, F x) { store(to, x); }
inline F add(F a, F b) {
    return each([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline F sub(F a, F b) {
    return each([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline F mul(F a, F b) {
    return each([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline F div(F a, F b) {
    return each([&](int i) { return a.lane[i] / b.lane[i]; });
}
inline F magnitude(F a) {
    return each([&](int i) { return as_float(as_bits(a.lane[i]) & 0x7fffffffu); });
}
inline F not_negative(F a) {
    return each([&](int i) { return a.lane[i] > 0 ? a.lane[i] : 0.0f; });
}
inline Mask greater(F a, F b) {
    return where([&](int i) { return a.lane[i] > b.lane[i]; });
}
inline Mask at_least(F a, F b) {
    return where([&](int i) { return a.lane[i] >= b.lane[i]; });
}
inline F choose(Mask m, F otherwise, F where) {
    return each([&](int i) { return m >> i & 1 ? where.lane[i] : otherwise.lane[i]; });
}
inline F only(Mask m, F a) {
    return each([&](int i) { return m >> i & 1 ? a.lane[i] : 0.0f; });
}
// Writes the values of the set lanes to the front of `to`; overwrites up to sixteen values.
inline void compress(float* to, Mask m, F a) {
    compress_each(to, m, [&](int i) { return a.lane[i]; });
}
inline void compress_places(int32_t* to, Mask m, int32_t first) {
    compress_each(to, m, [&](int i) { return first + i; });
}

// Sums of squares in float64, one per lane.
struct Squares {
    double lane[LANES];
};
inline Squares no_squares() { return {}; }
inline void add_squares(Squares& sums, F x) {
    for (int i = 0; i < LANES; ++i) sums.lane[i] += static_cast<double>(x.lane[i]) * x.lane[i];
}
inline void store(double* to, const Squares& sums) { std::memcpy(to, sums.lane, sizeof sums.lane); }
inline int32_t count(Mask m) {
    int32_t set = 0;
    for (; m; m &= m - 1) ++set;
    return set;
}
