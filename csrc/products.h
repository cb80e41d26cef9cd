// The two matrix products of attention, tiled to stay in registers. Operands are 32-bit units:
// one float32, or (where the instruction set multiplies them) a pair of bfloat16.
#pragma once

#include <cstdint>

namespace mla {
namespace {

template <class Isa>
struct Float32Dot {
  static constexpr bool kIsBf16 = false;
  static typename Isa::V dot(typename Isa::V sum, typename Isa::V a, typename Isa::V b) {
    return Isa::fma(a, b, sum);
  }
};

// One line into the L1 cache. GCC 12 takes a function that only prefetches for one without effect
// and drops its calls, so the compiler must not see through this.
inline void fetch_line(const char* p) {
#if defined(__x86_64__)
  asm volatile("prefetcht0 %0" : : "m"(*p));
#else
  __builtin_prefetch(p);
#endif
}

// Rows of the next tile, fetched while the scores of this one are computed: a block lies in the L2
// cache, which answers too late. 1.1x (S=4096) and 1.4x (S=16384) at 16 heads, 1.07x at 128.
struct Prefetch {
  const char* const* rows;
  int64_t count;
  void line(int64_t offset) const {
    for (int64_t i = 0; i < count; ++i) fetch_line(rows[i] + offset);
  }
};

// Scores of kTileKeys keys against one panel of queries.
//
// Each of the two vectors holds kLanes / F rows by F consecutive units, so that a load of F units
// of a key feeds two products: with F = 1 every product would need a load of its own, and loads
// would set the pace. The F sums of a row are added at the end. Few rows fill a panel by larger F.
//
//   keys    kTileKeys pointers to rows of `units` units
//   panel   [units / F][2][kLanes] packed queries
//   scores  [kTileKeys, ld], the panel's kLanes columns; 2 * kLanes / F of them are meaningful
template <class Isa, class Dot, int F>
void score_tile(
    const char* const* keys, const float* panel, int64_t units, float* scores, int64_t ld,
    const Prefetch& next) {
  using V = typename Isa::V;
  constexpr int K = Isa::kTileKeys, N = Isa::kLanes;
  const char* key[K];
  V first[K], second[K];
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) {
    key[k] = keys[k];
    first[k] = second[k] = Isa::zero();
  }
  int64_t at = 0;
  for (int64_t line = 0; line < units * 4; line += 64) {
    next.line(line);
    const int64_t end = line + 64 < units * 4 ? line + 64 : units * 4;
    for (; at < end; at += 4 * F) {
      const V q0 = Isa::load(panel), q1 = Isa::load(panel + N);
      panel += 2 * N;
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) {
        const V x = Isa::template broadcast<F>(key[k] + at);
        first[k] = Dot::dot(first[k], x, q0);
        second[k] = Dot::dot(second[k], x, q1);
      }
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) {
    V sum = Isa::pair_sums(first[k], second[k]);
    for (int f = F; f > 2; f /= 2) sum = Isa::pair_sums(sum, sum);
    Isa::store(scores + k * ld, sum);
  }
}

// values[h, cols] = alpha[h] * values[h, cols] + sum over steps of weight[h] * row[cols], for kHeads
// rows and kTileCols vectors of columns. The first block has no older values and reads none.
//
//   rows     contiguous steps of kTileCols vectors of units (a pair of tokens in each), or, for
//            float32, pointers to rows and the byte offset of the columns in them
//   weights  [steps, ld] units, the first of the kHeads columns
template <class Isa, class Dot, int kHeads, class Rows>
void value_tile(
    const Rows& rows, int64_t steps, const float* weights, int64_t ld, const float* alpha,
    float* values, bool is_first) {
  using V = typename Isa::V;
  constexpr int J = Isa::kTileCols, N = Isa::kLanes;
  V sum[kHeads][J];
#pragma GCC unroll 8
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      sum[h][j] = is_first ? Isa::zero()
                           : Isa::mul(Isa::set1(alpha[h]), Isa::load(values + (h * J + j) * N));
    }
  }
  for (int64_t step = 0; step < steps; ++step, weights += ld) {
    const float* row = rows.at(step);
    V weight[kHeads];
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) weight[h] = Isa::set1(weights[h]);
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      const V x = Isa::load(row + j * N);
#pragma GCC unroll 8
      for (int h = 0; h < kHeads; ++h) sum[h][j] = Dot::dot(sum[h][j], weight[h], x);
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) Isa::store(values + (h * J + j) * N, sum[h][j]);
  }
}

struct PackedRows {
  const float* first;
  int64_t step;  // units
  const float* at(int64_t k) const { return first + k * step; }
};

struct PointedRows {
  const char* const* rows;
  int64_t offset;  // bytes
  const float* at(int64_t k) const { return reinterpret_cast<const float*>(rows[k] + offset); }
};

// The same for `count` rows, in tiles of nearly equal height.
template <class Isa, class Dot, class Rows>
void value_rows(
    const Rows& rows, int64_t steps, const float* weights, int64_t ld, const float* alpha,
    float* values, bool is_first, int64_t count) {
  constexpr int kMost = Isa::kTileHeads, kWidth = Isa::kTileCols * Isa::kLanes;
  int64_t tiles = (count + kMost - 1) / kMost;
  while (count > 0) {
    const int64_t n = (count + tiles - 1) / tiles;
    switch (n) {
#define MLA_TILE(HEADS)                                                                        \
  case HEADS:                                                                                  \
    if constexpr (HEADS <= kMost)                                                              \
      value_tile<Isa, Dot, HEADS>(rows, steps, weights, ld, alpha, values, is_first);          \
    break;
      MLA_TILE(1) MLA_TILE(2) MLA_TILE(3) MLA_TILE(4) MLA_TILE(5) MLA_TILE(6)
#undef MLA_TILE
    }
    weights += n;
    alpha += n;
    values += n * kWidth;
    count -= n;
    --tiles;
  }
}

}  // namespace
}  // namespace mla
