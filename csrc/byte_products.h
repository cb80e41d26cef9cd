// Products of bytes (VNNI) for coded rows: of rows and queries, of weights and rows.
#pragma once

#include <cstdint>

#include "isa_avx512.h"

namespace mla {
namespace {

using I = __m512i;
constexpr int kLanes = Avx512::kLanes, J = Avx512::kTileCols;
constexpr int kByteKeys = 6;  // 6 x 2 sums of bytes and as many of floats

// As the intrinsic; GCC 12 moves the sums of that one through memory.
inline void dot_bytes(I& sum, I a, I b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "vm"(b));
}

inline I load_i(const void* p) { return _mm512_loadu_si512(p); }

// 64 signed codes.
inline I load_codes(const char* row, int64_t c, bool is_int4) {
  if (!is_int4) return load_i(row + c);
  const I x = _mm512_cvtepu8_epi16(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + c / 2)));
  const I both = _mm512_and_si512(
      _mm512_or_si512(x, _mm512_slli_epi16(x, 4)), _mm512_set1_epi16(0x0F0F));
  return _mm512_sub_epi8(both, _mm512_set1_epi8(8));
}

// sums += codes of kByteKeys keys, each plus 128, times `count` bytes of a panel.
template <int F>
void add_products(
    I (&first)[kByteKeys], I (&second)[kByteKeys], const char* key, int64_t key_bytes,
    const int32_t* packed, int64_t count) {
  for (int64_t at = 0; at < count; at += 4 * F, packed += 2 * kLanes) {
    const I q0 = load_i(packed), q1 = load_i(packed + kLanes);
#pragma GCC unroll 16
    for (int k = 0; k < kByteKeys; ++k) {
      const I x = (I)Avx512::broadcast<F>(key + k * key_bytes + at);
      dot_bytes(first[k], x, q0);
      dot_bytes(second[k], x, q1);
    }
  }
}

// values[h] = alpha[h] * values[h] + share[h] * sum over steps of weight[h] * codes, for kCount rows
// and J vectors of columns.
//
//   from    steps of J vectors of quads: 4 tokens of a column in each lane
//   weight  [steps, ld] quads of unsigned bytes
template <int kCount>
void value_tile_bytes(
    const char* from, int64_t steps, const uint32_t* weight, const float* share, int64_t ld,
    const float* alphas, float* to, bool is_first) {
  I sum[kCount][J];
#pragma GCC unroll 8
  for (int h = 0; h < kCount; ++h) {
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) sum[h][j] = _mm512_setzero_si512();
  }
  for (int64_t step = 0; step < steps; ++step, weight += ld, from += J * kLanes * 4) {
    I w[kCount];
#pragma GCC unroll 8
    for (int h = 0; h < kCount; ++h) w[h] = _mm512_set1_epi32(weight[h]);
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      const I x = load_i(from + j * 64);
#pragma GCC unroll 8
      for (int h = 0; h < kCount; ++h) dot_bytes(sum[h][j], w[h], x);
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < kCount; ++h) {
    const Avx512::V shares = Avx512::set1(share[h]), old = Avx512::set1(alphas[h]);
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      float* at = to + (h * J + j) * kLanes;
      Avx512::V x = Avx512::mul(_mm512_cvtepi32_ps(sum[h][j]), shares);
      if (!is_first) x = Avx512::fma(Avx512::load(at), old, x);
      Avx512::store(at, x);
    }
  }
}

}  // namespace
}  // namespace mla
