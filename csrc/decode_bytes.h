// The same attention over int8 and int4 rows by products of bytes (VNNI), for bfloat16 queries.
//
//   score[k, m] = sum over groups g of scale[k, g] * step[m, g] * (codes[k, g] . query8[m, g])
//                 + k_rope . q_rope in bfloat16
//   value[m, g] = sum over blocks of width[m, g] * sum over k of weight8[k, m, g] * codes[k, g]
//
// query8 is the query rounded to 8 bits, with one step for each group of the row's scales; weight8
// is probability times scale rounded to 8 bits, with one width for each block, so that an outlier
// among the keys coarsens its own block alone. Both lose less than rounding scores to bfloat16
// does. Queries with outliers take 16 bits, as two terms: those products cost what bfloat16 costs.
//
// Against plain bfloat16 rows, one thread of a Zen 5 core, S=4096, in turns: int8 in groups of 128
// 1.2x as fast at 16 heads and 1.27x at 128, with one scale a row 1.3x and 1.4x, int4 in groups of
// 64 (without its rotation) 1.05x and 1.14x; rows converted to bfloat16 instead 0.8x and 0.94x.
#pragma once

#include "byte_products.h"
#include "decode_impl.h"
#include "isa_avx512bf16.h"

namespace mla {
namespace {

struct DecodeBytes : Decode<Avx512Bf16, Bf16Dot> {
  using Base = Decode<Avx512Bf16, Bf16Dot>;
  using Isa = Avx512Bf16;
  static constexpr int kHeads = Isa::kTileHeads;
  static constexpr int64_t kQuads = kBlockKeys / 4;
  static constexpr int64_t kMostGroup = 1024;  // 16-bit queries times more codes pass 2**31

  int64_t G, group, byte_units, rope_units, key_bytes;
  int32_t *byte_panels, *biases;  // [panels][2][C / 4 / F][2][N] and [panels][G][2][N]
  float *steps, *row_scales;      // [panels][G][2][N] and [G][kBlockKeys]
  char *query_bytes, *byte_keys;  // [2][N][C] and [kBlockKeys][key_bytes]
  char* is_fine;                  // [panels]: 16 bits for these queries
  char* quads;                    // [C / kChunk][kQuads][kChunk][4]
  uint32_t* weights;              // [G][kQuads][rows] quads of weights
  float* widths;                  // [G][rows]

  static bool can_run(const DecodeParams& p) {
    const Codec& codec = p.cache.codec;
    const bool is_whole = codec.kind == CodecKind::kInt8 || codec.kind == CodecKind::kInt4;
    return is_whole && p.q_dtype == Dtype::kBFloat16 && p.C % kChunk == 0 && p.C > 0 &&
           p.R % (2 * N) == 0 && codec.group % kChunk == 0 &&
           (codec.group <= kMostGroup || p.C <= kMostGroup);
  }

  DecodeBytes(const DecodeParams& params, int64_t max_rows, Arena& arena)
      : Base(params, max_rows, arena) {
    const int64_t rows = round_up(max_rows, N), num_panels = rows / N;
    group = p.cache.codec.group < p.C ? p.cache.codec.group : p.C;
    G = (p.C + group - 1) / group;
    byte_units = p.C / 4, rope_units = p.R / 2;
    key_bytes = round_up(p.C + 2 * p.R, 64);
    byte_panels = arena.take<int32_t>(num_panels * 2 * byte_units * 2 * N);
    biases = arena.take<int32_t>(num_panels * G * 2 * N);
    steps = arena.take<float>(num_panels * G * 2 * N);
    row_scales = arena.take<float>(G * kBlockKeys);
    query_bytes = arena.take<char>(2 * N * p.C);
    is_fine = arena.take<char>(num_panels);
    byte_keys = arena.take<char>(kBlockKeys * key_bytes);
    quads = arena.take<char>(kBlockKeys * p.C);
    weights = arena.take<uint32_t>(G * kQuads * rows);
    widths = arena.take<float>(G * rows);
  }

  int64_t group_end(int64_t g) const { return (g + 1) * group < p.C ? (g + 1) * group : p.C; }

  // Queries of 8 bits, or, where that would lose more than bfloat16 rows do, of 16.
  void pack_panel(int64_t b, int64_t m, int64_t count, int64_t index) {
    gather_queries(b, m, count);
    const float* rope = reinterpret_cast<const float*>(queries) + p.C / 2;
    pack<N>(count, rope, units, panels + index * rope_units * 2 * N, rope_units);
    const int F = factor_of<N>(count), per_vector = N / F;
    bool fine = false;
    std::memset(query_bytes, 0, 2 * N * p.C);
    for (int64_t g = 0; g < G; ++g) {
      for (int64_t i = 0; i < count; ++i) fine |= has_outlier(query_at(i), g);
    }
    for (int64_t g = 0; g < G; ++g) {
      for (int64_t i = 0; i < 2 * N / F; ++i) {
        const float step = i < count ? round_query(i, g, fine) : 0.0f;
        float* to = steps + ((index * G + g) * 2 + i / per_vector) * N + i % per_vector * F;
        for (int f = 0; f < F; ++f) to[f] = step;
      }
    }
    is_fine[index] = fine;
    for (int term = 0; term < 2; ++term) {
      const float* from = reinterpret_cast<const float*>(query_bytes + term * N * p.C);
      float* to = reinterpret_cast<float*>(byte_panel(index, term));
      pack<N>(count, from, byte_units, to, byte_units);
    }
    find_biases(index, F);
  }

  const uint16_t* query_at(int64_t i) const {
    return reinterpret_cast<const uint16_t*>(queries) + i * width;
  }

  int32_t* byte_panel(int64_t index, int term) const {
    return byte_panels + (index * 2 + term) * byte_units * 2 * N;
  }

  // 8 bits err by 0.2 % of the largest value. In normal queries that is 0.7 % of their size.
  bool has_outlier(const uint16_t* query, int64_t g) const {
    V most = Isa::zero(), squares = Isa::zero();
    for (int64_t c = g * group; c < group_end(g); c += N) {
      const V x = Isa::load_bf16(query + c);
      most = Isa::max(most, _mm512_abs_ps(x));
      squares = Isa::fma(x, x, squares);
    }
    const float largest = _mm512_reduce_max_ps(most), size = _mm512_reduce_add_ps(squares);
    return largest * largest * static_cast<float>(group_end(g) - g * group) > 36.0f * size;
  }

  // Group g of query i to bytes; returns what one of their steps is worth, NaN if it has infinity.
  float round_query(int64_t i, int64_t g, bool fine) {
    const uint16_t* from = query_at(i);
    V most = Isa::zero();
    __mmask16 is_odd = 0;
    for (int64_t c = g * group; c < group_end(g); c += N) {
      const V x = Isa::load_bf16(from + c);
      is_odd |= _mm512_fpclass_ps_mask(x, 0x99);  // NaN or infinity
      most = Isa::max(most, _mm512_abs_ps(x));
    }
    if (is_odd) return NAN;
    const float largest = _mm512_reduce_max_ps(most), end = fine ? 127.0f * 256.0f : 127.0f;
    const V inverse = Isa::set1(largest > 1e-33f ? end / largest : 0.0f);
    char* to = query_bytes + i * p.C;
    for (int64_t c = g * group; c < group_end(g); c += N) {
      const I x = _mm512_cvtps_epi32(Isa::mul(Isa::load_bf16(from + c), inverse));
      const I high = fine ? _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(128)), 8) : x;
      store_bytes(to + c, high);
      if (fine) store_bytes(to + N * p.C + c, _mm512_sub_epi32(x, _mm512_slli_epi32(high, 8)));
    }
    return largest / end;
  }

  static void store_bytes(char* to, I x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(x));
  }

  // Keys are multiplied as code + 128: what that adds to the products, negative.
  void find_biases(int64_t index, int F) {
    const I offset = _mm512_set1_epi8(static_cast<char>(0x80));
    for (int64_t g = 0; g < G; ++g) {
      for (int v = 0; v < 2; ++v) {
        I sum = _mm512_setzero_si512();
        for (int term = 0; term < (is_fine[index] ? 2 : 1); ++term) {
          const int32_t* panel = byte_panel(index, term) + v * N;
          sum = _mm512_slli_epi32(sum, term * 8);
          for (int64_t at = g * group / 4; at < group_end(g) / 4; at += F) {
            dot_bytes(sum, offset, load_i(panel + at / F * 2 * N));
          }
        }
        sum = _mm512_sub_epi32(_mm512_setzero_si512(), sum);
        _mm512_storeu_si512(biases + ((index * G + g) * 2 + v) * N, sum);
      }
    }
  }

  template <bool kIsInt4>
  void load_rows(const char** block, int64_t num_keys) {
    const I order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const I offset = _mm512_set1_epi8(static_cast<char>(0x80));
    for (int64_t k = 0; k < num_keys; k += 4) {
      const int64_t n = num_keys - k < 4 ? num_keys - k : 4;
      const int64_t ahead = k + 4 < num_keys ? k + 4 : k;
      for (int64_t c = 0; c < p.C; c += kChunk) {
        I x[4];
        for (int i = 0; i < 4; ++i) {
          if (ahead + i < num_keys) fetch_line(block[ahead + i] + (kIsInt4 ? c / 2 : c));
          x[i] = i < n ? load_codes(block[k + i], c, kIsInt4) : _mm512_setzero_si512();
          _mm512_storeu_si512(byte_keys + (k + i) * key_bytes + c, _mm512_xor_si512(x[i], offset));
          x[i] = _mm512_permutexvar_epi32(order, x[i]);
        }
        const I low01 = _mm512_unpacklo_epi8(x[0], x[1]), high01 = _mm512_unpackhi_epi8(x[0], x[1]);
        const I low23 = _mm512_unpacklo_epi8(x[2], x[3]), high23 = _mm512_unpackhi_epi8(x[2], x[3]);
        char* to = quads + (c / kChunk * kQuads + k / 4) * kChunk * 4;
        _mm512_storeu_si512(to, _mm512_unpacklo_epi16(low01, low23));
        _mm512_storeu_si512(to + 64, _mm512_unpackhi_epi16(low01, low23));
        _mm512_storeu_si512(to + 128, _mm512_unpacklo_epi16(high01, high23));
        _mm512_storeu_si512(to + 192, _mm512_unpackhi_epi16(high01, high23));
      }
      for (int64_t i = 0; i < n; ++i) load_rest(block[k + i], k + i);
    }
  }

  void load_rest(const char* row, int64_t k) {
    const Codec& codec = p.cache.codec;
    for (int64_t g = 0; g < G; ++g) row_scales[g * kBlockKeys + k] = scale_at(row, codec, g);
    char* rope = byte_keys + k * key_bytes + p.C;
    if (codec.rope_bits == 16) {
      for (int64_t r = 0; r < p.R; r += 2 * N) {
        _mm512_storeu_si512(rope + 2 * r, load_i(row + codec.rope_at + 2 * r));
      }
      return;
    }
    const V scale = Isa::set1(scale_at(row, codec, G));
    for (int64_t r = 0; r < p.R; r += N) {
      const V x = Isa::load_i8(reinterpret_cast<const int8_t*>(row + codec.rope_at) + r);
      Isa::store_bf16(reinterpret_cast<uint16_t*>(rope) + r, Isa::mul(x, scale));
    }
  }

  void load_block(const char** block, int64_t num_keys) {
    if (p.cache.codec.kind == CodecKind::kInt4) {
      load_rows<true>(block, num_keys);
    } else {
      load_rows<false>(block, num_keys);
    }
    for (int64_t k = num_keys; k % kByteKeys != 0; ++k) {
      for (int64_t g = 0; g < G; ++g) row_scales[g * kBlockKeys + k] = 0.0f;
    }
  }

  template <int F>
  void score_tile_bytes(int64_t k0, int64_t panel, float* to, int64_t ld) {
    constexpr int K = kByteKeys;
    const char* key = byte_keys + k0 * key_bytes;
    const float* rope = panels + panel * rope_units * 2 * N;
    if (panel == 0) {  // the keys of the next tile
      for (int64_t at = 0; at < K * key_bytes; at += 64) fetch_line(key + K * key_bytes + at);
    }
    V first[K], second[K];
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) first[k] = second[k] = Isa::zero();
    for (int64_t at = 0; at < rope_units; at += F, rope += 2 * N) {
      const V q0 = Isa::load(rope), q1 = Isa::load(rope + N);
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) {
        const V x = Isa::template broadcast<F>(key + k * key_bytes + p.C + at * 4);
        first[k] = Bf16Dot::dot(first[k], x, q0);
        second[k] = Bf16Dot::dot(second[k], x, q1);
      }
    }
    const bool fine = is_fine[panel];
    for (int64_t g = 0; g < G; ++g) {
      const int64_t c = g * group, count = group_end(g) - c, at = c / (4 * F) * 2 * N;
      const int32_t* bias = biases + (panel * G + g) * 2 * N;
      I low[K], high[K];
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) low[k] = high[k] = _mm512_setzero_si512();
      add_products<F>(low, high, key + c, key_bytes, byte_panel(panel, 0) + at, count);
      if (fine) {
#pragma GCC unroll 16
        for (int k = 0; k < K; ++k) {
          low[k] = _mm512_slli_epi32(low[k], 8), high[k] = _mm512_slli_epi32(high[k], 8);
        }
        add_products<F>(low, high, key + c, key_bytes, byte_panel(panel, 1) + at, count);
      }
      const float* step = steps + (panel * G + g) * 2 * N;
      const V step0 = Isa::load(step), step1 = Isa::load(step + N);
      const I bias0 = load_i(bias), bias1 = load_i(bias + N);
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) {
        const V scale = Isa::set1(row_scales[g * kBlockKeys + k0 + k]);
        const V x0 = _mm512_cvtepi32_ps(_mm512_add_epi32(low[k], bias0));
        const V x1 = _mm512_cvtepi32_ps(_mm512_add_epi32(high[k], bias1));
        first[k] = Isa::fma(x0, Isa::mul(scale, step0), first[k]);
        second[k] = Isa::fma(x1, Isa::mul(scale, step1), second[k]);
      }
    }
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) {
      V sum = Isa::pair_sums(first[k], second[k]);
      for (int f = F; f > 2; f /= 2) sum = Isa::pair_sums(sum, sum);
      Isa::store(to + k * ld, sum);
    }
  }

  void score_block(
      const char* const*, int64_t num_keys, const char* const* next, int64_t num_next, int64_t rows,
      int64_t ld) {
    const int64_t num_panels = (rows + N - 1) / N;
    for (int64_t k = 0; k < num_keys; k += kByteKeys) {
      for (int64_t i = k; i < k + kByteKeys && i < num_next; ++i) {  // of the next block
        for (int64_t at = 0; at < p.cache.row_bytes; at += 64) fetch_line(next[i] + at);
      }
      for (int64_t panel = 0; panel < num_panels; ++panel) {
        float* to = scores + k * ld + panel * N;
        switch (factor_of<N>(rows - panel * N)) {
          case 2: score_tile_bytes<2>(k, panel, to, ld); break;
          case 4: score_tile_bytes<4>(k, panel, to, ld); break;
          case 8: score_tile_bytes<8>(k, panel, to, ld); break;
          default: score_tile_bytes<16>(k, panel, to, ld);
        }
      }
    }
  }

  // Probabilities times scales of group g to 8 bits.
  void weigh(int64_t g, int64_t num_keys, int64_t ld) {
    const float* scales = row_scales + g * kBlockKeys;
    bool is_finite = true;
    for (int64_t k = 0; k < num_keys; ++k) is_finite &= std::isfinite(scales[k]);
    for (int64_t m = 0; m < ld; m += N) {
      V most = Isa::zero();
      for (int64_t k = 0; k < num_keys; ++k) {
        most = Isa::max(most, Isa::mul(Isa::load(scores + k * ld + m), Isa::set1(scales[k])));
      }
      const __mmask16 some = _mm512_cmp_ps_mask(most, Isa::set1(1e-35f), _CMP_GT_OQ);
      const V inverse = _mm512_maskz_div_ps(some, Isa::set1(255.0f), most);
      const V share = Isa::mul(most, Isa::set1(1.0f / 255.0f));
      Isa::store(widths + g * ld + m, is_finite ? share : Isa::set1(NAN));
      uint32_t* to = weights + g * kQuads * ld + m;
      for (int64_t k = 0; k < num_keys; k += 4, to += ld) {
        I all = _mm512_setzero_si512();
        const int64_t n = num_keys - k < 4 ? num_keys - k : 4;
        for (int64_t i = n; i-- > 0;) {
          const V x = Isa::mul(Isa::load(scores + (k + i) * ld + m), Isa::set1(scales[k + i]));
          all = _mm512_or_si512(_mm512_slli_epi32(all, 8), _mm512_cvtps_epi32(Isa::mul(x, inverse)));
        }
        _mm512_storeu_si512(to, all);
      }
    }
  }

  void value_block(const char* const*, int64_t num_keys, int64_t rows, int64_t ld, bool first) {
    for (int64_t g = 0; g < G; ++g) weigh(g, num_keys, ld);
    const int64_t steps = (num_keys + 3) / 4;
    for (int64_t c = 0; c < p.C; c += kChunk) {
      const int64_t g = c / group;
      const char* from = quads + c / kChunk * kQuads * kChunk * 4;
      int64_t tiles = (rows + kHeads - 1) / kHeads;
      for (int64_t h = 0; h < rows; --tiles) {
        const int64_t n = (rows - h + tiles - 1) / tiles;
        const uint32_t* weight = weights + g * kQuads * ld + h;
        const float *share = widths + g * ld + h, *old = alpha + h;
        float* to = values + c * rows + h * kChunk;
        switch (n) {
          case 1: value_tile_bytes<1>(from, steps, weight, share, ld, old, to, first); break;
          case 2: value_tile_bytes<2>(from, steps, weight, share, ld, old, to, first); break;
          case 3: value_tile_bytes<3>(from, steps, weight, share, ld, old, to, first); break;
          case 4: value_tile_bytes<4>(from, steps, weight, share, ld, old, to, first); break;
          case 5: value_tile_bytes<5>(from, steps, weight, share, ld, old, to, first); break;
          default: value_tile_bytes<6>(from, steps, weight, share, ld, old, to, first);
        }
        h += n;
      }
    }
  }
};

}  // namespace
}  // namespace mla
