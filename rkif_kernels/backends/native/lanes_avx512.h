// Sixteen lanes in a register of AVX-512. Included where TARGET names the instruction set.

using F = __m512;
using Mask = __mmask16;

TARGET inline F set(float value) { return _mm512_set1_ps(value); }
TARGET inline F load_float32(const void* at) { return _mm512_loadu_ps(at); }
TARGET inline F load_bfloat16(const void* at) {
    const __m256i bits = _mm256_loadu_si256(static_cast<const __m256i*>(at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
TARGET inline F load_float16(const void* at) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(at)));
}
TARGET inline void store(float* to, F x) { _mm512_storeu_ps(to, x); }
TARGET inline void stream(float* to, F x) { _mm512_stream_ps(to, x); }
TARGET inline F add(F a, F b) { return _mm512_add_ps(a, b); }
TARGET inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
TARGET inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
TARGET inline F div(F a, F b) { return _mm512_div_ps(a, b); }
TARGET inline F magnitude(F a) { return _mm512_abs_ps(a); }
// The values, but 0 for negative values and NaN: max returns its second operand if the first is NaN.
TARGET inline F not_negative(F a) { return _mm512_max_ps(a, _mm512_setzero_ps()); }
TARGET inline Mask greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
TARGET inline Mask at_least(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
TARGET inline F choose(Mask m, F otherwise, F where) { return _mm512_mask_blend_ps(m, otherwise, where); }
TARGET inline F only(Mask m, F a) { return _mm512_maskz_mov_ps(m, a); }
// Writes the values of the set lanes to the front of `to`; overwrites sixteen values.
TARGET inline void compress(float* to, Mask m, F a) { _mm512_storeu_ps(to, _mm512_maskz_compress_ps(m, a)); }
TARGET inline void compress_places(int32_t* to, Mask m, int32_t first) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i place = _mm512_add_epi32(lane, _mm512_set1_epi32(first));
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(m, place));
}

// Sums of squares in float64, one per lane. The product of two float32 is exact in float64, so a fused multiply-add
// gives the bits of a multiplication and an addition.
struct Squares {
    __m512d low, high;
};
TARGET inline Squares no_squares() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
TARGET inline void add_squares(Squares& sums, F x) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
    sums.low = _mm512_fmadd_pd(low, low, sums.low);
    sums.high = _mm512_fmadd_pd(high, high, sums.high);
}
TARGET inline void store(double* to, const Squares& sums) {
    _mm512_storeu_pd(to, sums.low);
    _mm512_storeu_pd(to + 8, sums.high);
}
TARGET inline int32_t count(Mask m) { return __builtin_popcount(m); }
