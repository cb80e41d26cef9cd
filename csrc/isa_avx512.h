// Vectors of 16 float32 lanes. Included after the flags of the translation unit allow AVX-512.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>

namespace mla {
namespace {

struct Avx512 {
  using V = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kTileKeys = 12;  // 12 x 2 accumulators of scores
  static constexpr int kTileHeads = 6;  // 6 x 4 accumulators of values
  static constexpr int kTileCols = 4;

  static V zero() { return _mm512_setzero_ps(); }
  static V set1(float x) { return _mm512_set1_ps(x); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, V x) { _mm512_storeu_ps(p, x); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm512_max_ps(a, b); }  // b where one is NaN

  // F consecutive 32-bit units, repeated over all lanes.
  template <int F>
  static V broadcast(const char* p) {
    if constexpr (F == 2) {
      double both;
      __builtin_memcpy(&both, p, sizeof both);
      return _mm512_castpd_ps(_mm512_set1_pd(both));
    }
    if constexpr (F == 4) {
      return _mm512_broadcast_f32x4(_mm_loadu_ps(reinterpret_cast<const float*>(p)));
    }
    if constexpr (F == 8) {
      return _mm512_broadcast_f32x8(_mm256_loadu_ps(reinterpret_cast<const float*>(p)));
    }
    if constexpr (F == 16) return _mm512_loadu_ps(reinterpret_cast<const float*>(p));
  }

  // Sums of neighbours: those of a in the lower lanes, those of b in the upper ones.
  static V pair_sums(V a, V b) {
    const __m512i even =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return _mm512_add_ps(
        _mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b));
  }

  // Lanes of x where key < limit, -inf elsewhere.
  static V mask_from(V x, int32_t key, const int32_t* limits) {
    const __mmask16 seen =
        _mm512_cmplt_epi32_mask(_mm512_set1_epi32(key), _mm512_loadu_si512(limits));
    return _mm512_mask_blend_ps(seen, _mm512_set1_ps(-INFINITY), x);
  }
  // x, but 0 where it is -inf.
  static V finite(V x) {
    const __mmask16 inf = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-INFINITY), _CMP_EQ_OQ);
    return _mm512_maskz_mov_ps(_knot_mask16(inf), x);
  }
  static V round(V x) { return _mm512_roundscale_ps(x, 8); }
  // p * 2**n, n whole and at least -160; 0 below the normal numbers.
  static V scale_by_power(V p, V n) { return _mm512_scalef_ps(p, n); }

  static V load_bf16(const uint16_t* p) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
  static V load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static V load_i8(const int8_t* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x));
  }
  // e4m3 bytes: the exponent moves 4 bits up into float32's place, then 2**120; NaN codes stay NaN.
  static V load_e4m3(const uint8_t* p) {
    const __m512i x =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m512i magnitude = _mm512_and_si512(x, _mm512_set1_epi32(0x7F));
    const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(x, _mm512_set1_epi32(0x80)), 24);
    const __m512 value = _mm512_mul_ps(
        _mm512_castsi512_ps(_mm512_slli_epi32(magnitude, 20)), _mm512_set1_ps(0x1p120f));
    const __mmask16 nan = _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7F));
    const __m512i bits = _mm512_or_si512(_mm512_castps_si512(value), sign);
    return _mm512_castsi512_ps(
        _mm512_mask_mov_epi32(bits, nan, _mm512_set1_epi32(0x7FC00000)));
  }
  // kLanes nibbles, the low one of each byte first, each minus 8.
  static V load_i4(const uint8_t* p) {
    const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m128i low = _mm_and_si128(x, _mm_set1_epi8(15));
    const __m128i high = _mm_and_si128(_mm_srli_epi16(x, 4), _mm_set1_epi8(15));
    const __m512i both = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(both, _mm512_set1_epi32(8)));
  }
  // Nearest bfloat16, ties to even; NaN stays NaN.
  static void store_bf16(uint16_t* p, V x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    up = _mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7FC00000));
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
  }
  static void store_f16(uint16_t* p, V x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, 0));
  }
};

}  // namespace
}  // namespace mla
