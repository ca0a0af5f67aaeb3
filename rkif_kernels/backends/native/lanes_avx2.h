// Sixteen lanes in two registers of AVX2. Included where TARGET names the instruction set.

struct F {
    __m256 low, high;
};
using Mask = uint32_t;

// For each mask of eight lanes: the indices of the set lanes, in order; the rest is unspecified.
struct Shuffles {
    alignas(8) uint8_t lanes[256][8] = {};
    Shuffles() {
        for (int mask = 0; mask < 256; ++mask)
            for (int lane = 0, next = 0; lane < 8; ++lane)
                if (mask >> lane & 1) lanes[mask][next++] = static_cast<uint8_t>(lane);
    }
};
const Shuffles SHUFFLES;

TARGET inline F set(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
TARGET inline F load_float32(const void* at) {
    const float* from = static_cast<const float*>(at);
    return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
}
TARGET inline __m256 widen(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
TARGET inline F load_bfloat16(const void* at) {
    const __m128i* from = static_cast<const __m128i*>(at);
    return {widen(_mm_loadu_si128(from)), widen(_mm_loadu_si128(from + 1))};
}
TARGET inline F load_float16(const void* at) {
    const __m128i* from = static_cast<const __m128i*>(at);
    return {_mm256_cvtph_ps(_mm_loadu_si128(from)), _mm256_cvtph_ps(_mm_loadu_si128(from + 1))};
}
TARGET inline void store(float* to, F x) {
    _mm256_storeu_ps(to, x.low);
    _mm256_storeu_ps(to + 8, x.high);
}
TARGET inline void stream(float* to, F x) {
    _mm256_stream_ps(to, x.low);
    _mm256_stream_ps(to + 8, x.high);
}
TARGET inline F add(F a, F b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
TARGET inline F sub(F a, F b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
TARGET inline F mul(F a, F b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
TARGET inline F div(F a, F b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
TARGET inline F magnitude(F a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
// The values, but 0 for negative values and NaN: max returns its second operand if the first is NaN.
TARGET inline F not_negative(F a) {
    return {_mm256_max_ps(a.low, _mm256_setzero_ps()), _mm256_max_ps(a.high, _mm256_setzero_ps())};
}
TARGET inline Mask bits(__m256 low, __m256 high) {
    return static_cast<Mask>(_mm256_movemask_ps(low)) | static_cast<Mask>(_mm256_movemask_ps(high)) << 8;
}
TARGET inline Mask greater(F a, F b) {
    return bits(_mm256_cmp_ps(a.low, b.low, _CMP_GT_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_GT_OQ));
}
TARGET inline Mask at_least(F a, F b) {
    return bits(_mm256_cmp_ps(a.low, b.low, _CMP_GE_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_GE_OQ));
}
TARGET inline __m256 lanes_of(Mask m) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i all = _mm256_set1_epi32(static_cast<int>(m & 255));
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, bit), bit));
}
TARGET inline F choose(Mask m, F otherwise, F where) {
    return {_mm256_blendv_ps(otherwise.low, where.low, lanes_of(m)),
            _mm256_blendv_ps(otherwise.high, where.high, lanes_of(m >> 8))};
}
TARGET inline F only(Mask m, F a) {
    return {_mm256_and_ps(lanes_of(m), a.low), _mm256_and_ps(lanes_of(m >> 8), a.high)};
}
TARGET inline __m256i shuffle_of(Mask m) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(SHUFFLES.lanes[m & 255])));
}
// Writes the values of the set lanes to the front of `to`; overwrites up to sixteen values.
TARGET inline void compress(float* to, Mask m, F a) {
    _mm256_storeu_ps(to, _mm256_permutevar8x32_ps(a.low, shuffle_of(m)));
    _mm256_storeu_ps(to + __builtin_popcount(m & 255), _mm256_permutevar8x32_ps(a.high, shuffle_of(m >> 8)));
}
TARGET inline void compress_places(int32_t* to, Mask m, int32_t first) {
    const __m256i low = _mm256_add_epi32(shuffle_of(m), _mm256_set1_epi32(first));
    const __m256i high = _mm256_add_epi32(shuffle_of(m >> 8), _mm256_set1_epi32(first + 8));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + __builtin_popcount(m & 255)), high);
}

// Sums of squares in float64, one per lane.
struct Squares {
    __m256d parts[4];
};
TARGET inline Squares no_squares() {
    return {{_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd()}};
}
TARGET inline void add_square(__m256d& sum, __m128 x) {
    const __m256d wide = _mm256_cvtps_pd(x);
    sum = _mm256_add_pd(sum, _mm256_mul_pd(wide, wide));
}
TARGET inline void add_squares(Squares& sums, F x) {
    add_square(sums.parts[0], _mm256_castps256_ps128(x.low));
    add_square(sums.parts[1], _mm256_extractf128_ps(x.low, 1));
    add_square(sums.parts[2], _mm256_castps256_ps128(x.high));
    add_square(sums.parts[3], _mm256_extractf128_ps(x.high, 1));
}
TARGET inline void store(double* to, const Squares& sums) {
    for (int part = 0; part < 4; ++part) _mm256_storeu_pd(to + 4 * part, sums.parts[part]);
}
TARGET inline int32_t count(Mask m) { return __builtin_popcount(m); }
