// Vectors of 16 float32 lanes with products of bfloat16 pairs. Included after the flags of the
// translation unit allow AVX512-BF16.
#pragma once

#include "isa_avx512.h"

namespace mla {
namespace {

struct Avx512Bf16 : Avx512 {
  static void store_bf16(uint16_t* p, V x) {  // flushes subnormals, which is no loss here
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
  }
  // Nearest bfloat16 of two vectors, side by side in 32-bit lanes.
  static void store_pairs(uint32_t* p, V even, V odd) {
    const __m256i low = (__m256i)_mm512_cvtneps_pbh(even);
    const __m256i high = (__m256i)_mm512_cvtneps_pbh(odd);
    const __m512i both = _mm512_or_si512(
        _mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
    _mm512_storeu_si512(p, both);
  }
  // kInterleaved values of two rows to as many pairs.
  static constexpr int kInterleaved = 32;
  static void interleave(const char* even, const char* odd, char* to) {
    const __m512i x = _mm512_loadu_si512(even), y = _mm512_loadu_si512(odd);
    const __m512i step = _mm512_set1_epi32(0x00010001), first = _mm512_setr_epi32(
        0x200000, 0x210001, 0x220002, 0x230003, 0x240004, 0x250005, 0x260006, 0x270007, 0x280008,
        0x290009, 0x2A000A, 0x2B000B, 0x2C000C, 0x2D000D, 0x2E000E, 0x2F000F);
    const __m512i second = _mm512_add_epi16(first, _mm512_slli_epi16(step, 4));
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(x, first, y));
    _mm512_storeu_si512(to + 64, _mm512_permutex2var_epi16(x, second, y));
  }
};

struct Bf16Dot {
  static constexpr bool kIsBf16 = true;
  static __m512 dot(__m512 sum, __m512 a, __m512 b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};

}  // namespace
}  // namespace mla
