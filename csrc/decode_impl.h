// Attention of absorbed queries over one split of a row's keys, and the merge of splits.
//
//   score[k, m] = scale * query[m] . row[k]     top, total, value = online softmax over k
//   value[m]    = sum over k of 2**(score[k, m] - top[m]) * row[k][:C]
//
// Included once by the translation unit of each instruction set. A block of keys is brought into
// the caches (converted if it must be) once for all rows of queries. The value product takes the
// rows as they are for float32; bfloat16 rows are interleaved to pairs of tokens first.
// Oracle: mla.reference.absorbed_attention. Source: arXiv:2405.04434 section 2.1, arXiv:1805.02867.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "load_rows.h"
#include "panels.h"
#include "params.h"
#include "products.h"
#include "softmax.h"

namespace mla {
namespace {

constexpr int64_t kBlockKeys = 96;
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.693147180559945309417f;

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Cuts one piece of scratch memory into 64-byte aligned arrays; with no memory it only counts.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    char* p = base == nullptr ? nullptr : base + used;
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(p);
  }
};

template <class Isa, class Dot>
struct Decode {
  using V = typename Isa::V;
  static constexpr bool kBf16 = Dot::kIsBf16;
  static constexpr int N = Isa::kLanes;
  static constexpr int K = Isa::kTileKeys;
  static constexpr int64_t kChunk = Isa::kTileCols * N;  // columns of one value tile
  static constexpr int64_t kUnit = kBf16 ? 2 : 1;        // values in a unit
  static_assert(kBlockKeys % K == 0 && kBlockKeys % 2 == 0, "");

  const DecodeParams& p;
  int64_t C_padded, width, units;  // columns of the values; values and units of a padded row
  bool is_direct;                  // rows are multiplied where they lie
  char* queries;                   // [rows, width] values
  float* panels;                   // packed queries, `units * 2 * N` each
  float *scores, *top, *total, *alpha, *values;
  int32_t* limit;
  char *converted, *pairs, *probabilities;
  const char** keys;  // [2, kBlockKeys] of this block and the next

  static bool has_direct_rows(const DecodeParams& p) {
    const Dtype dtype = kBf16 ? Dtype::kBFloat16 : Dtype::kFloat32;
    return p.cache.codec.kind == CodecKind::kPlain && p.cache.dtype == dtype &&
           p.C % kChunk == 0 && (p.C + p.R) % (N * kUnit) == 0;
  }

  Decode(const DecodeParams& params, int64_t max_rows, Arena& arena) : p(params) {
    const int64_t rows = round_up(max_rows, N);
    is_direct = has_direct_rows(p);
    C_padded = round_up(p.C, kChunk);
    width = round_up(p.C + p.R, N * kUnit);
    if (width < C_padded) width = round_up(C_padded, N * kUnit);
    units = width / kUnit;
    queries = arena.take<char>(N * width * kUnitBytes());
    panels = arena.take<float>(rows / N * units * 2 * N);
    scores = arena.take<float>(kBlockKeys * rows);
    top = arena.take<float>(rows);
    total = arena.take<float>(rows);
    alpha = arena.take<float>(rows);
    limit = arena.take<int32_t>(rows);
    values = arena.take<float>(rows * C_padded);
    converted = arena.take<char>(is_direct ? 0 : kBlockKeys * width * kUnitBytes());
    pairs = arena.take<char>(kBf16 ? kBlockKeys * C_padded * 2 : 0);
    probabilities = arena.take<char>(kBf16 ? kBlockKeys / 2 * rows * 4 : 0);
    keys = arena.take<const char*>(2 * kBlockKeys);
  }

  static constexpr int64_t kUnitBytes() { return 4 / kUnit; }

  // The panel of rows [m, m + count): [units / F][2][N], vector v lane (row % (N/F)) * F + f.
  void pack_panel(int64_t b, int64_t m, int64_t count, int64_t index) {
    gather_queries(b, m, count);
    float* panel = panels + index * units * 2 * N;
    pack<N>(count, reinterpret_cast<const float*>(queries), units, panel, units);
  }

  void gather_queries(int64_t b, int64_t m, int64_t count) {
    const Dtype dtype = p.q_dtype;
    std::memset(queries, 0, N * width * kUnitBytes());
    for (int64_t i = 0; i < count; ++i) {
      const int64_t l = (m + i) / p.H, h = (m + i) % p.H;
      const int64_t *sl = p.q_latent_strides, *sr = p.q_rope_strides;
      const Sink<Isa, kBf16> sink{queries + i * width * kUnitBytes()};
      convert_values(p.q_latent + b * sl[0] + l * sl[1] + h * sl[2], dtype, p.C, sink, 0);
      if (p.R == 0) continue;  // an empty tensor has no memory to point into
      convert_values(p.q_rope + b * sr[0] + l * sr[1] + h * sr[2], dtype, p.R, sink, p.C);
    }
  }

  // Pointers to the rows of `n` slots from `slot` on.
  void point(int64_t b, int64_t slot, int64_t n, const char** to) const {
    const Cache& cache = p.cache;
    while (n > 0) {
      const char* row = cache.row(b, slot);
      const int64_t left = cache.page_table == nullptr ? n : cache.Z - slot % cache.Z;
      const int64_t run = left < n ? left : n;
      for (int64_t i = 0; i < run; ++i) *to++ = row + i * cache.slot_stride;
      slot += run;
      n -= run;
    }
  }

  template <int F>
  void panel_scores(
      const char* const* block, int64_t k, const float* panel, float* at, int64_t ld,
      const Prefetch& next) const {
    score_tile<Isa, Dot, F>(block + k, panel, units, at + k * ld, ld, next);
  }

  void score_block(
      const char* const* block, int64_t num_keys, const char* const* next, int64_t num_next,
      int64_t rows, int64_t ld) const {
    const int64_t num_panels = (rows + N - 1) / N;
    for (int64_t k = 0; k < num_keys; k += K) {
      const bool is_last = k + K >= num_keys;
      const Prefetch soon{is_last ? next : block + k + K, !is_last || num_next > K ? K : num_next};
      for (int64_t panel = 0; panel < num_panels; ++panel) {
        const Prefetch fetch{soon.rows, panel == 0 ? soon.count : 0};
        const float* packed = panels + panel * units * 2 * N;
        float* at = scores + panel * N;
        switch (factor_of<N>(rows - panel * N)) {
          case 2: panel_scores<2>(block, k, packed, at, ld, fetch); break;
          case 4: panel_scores<4>(block, k, packed, at, ld, fetch); break;
          case 8: panel_scores<8>(block, k, packed, at, ld, fetch); break;
          default:
            if constexpr (N == 16) panel_scores<16>(block, k, packed, at, ld, fetch);
        }
      }
    }
  }

  void softmax_block(int64_t num_keys, int64_t first_key, int64_t rows, int64_t ld, bool masked) {
    const float factor = p.scale * kLog2E;
    const Softmax state{top, total, alpha, limit};
    for (int64_t m = 0; m < rows; m += N) {
      if (masked) {
        softmax_lanes<Isa, true>(scores, ld, num_keys, first_key, factor, m, state);
      } else {
        softmax_lanes<Isa, false>(scores, ld, num_keys, first_key, factor, m, state);
      }
    }
  }

  void value_block(const char* const* block, int64_t num_keys, int64_t rows, int64_t ld, bool first) {
    if constexpr (kBf16) {
      // Pairs of probabilities and of rows; an odd last key is paired with itself at weight 0.
      const int64_t steps = (num_keys + 1) / 2;
      for (int64_t s = 0; s < steps; ++s) {
        const float* p0 = scores + 2 * s * ld;
        char* to = probabilities + s * ld * 4;
        const bool is_pair = 2 * s + 1 < num_keys;
        for (int64_t m = 0; m < ld; m += N) {
          const V odd = is_pair ? Isa::load(p0 + ld + m) : Isa::zero();
          Isa::store_pairs(reinterpret_cast<uint32_t*>(to) + m, Isa::load(p0 + m), odd);
        }
        const char *even = block[2 * s], *odd = block[is_pair ? 2 * s + 1 : 2 * s];
        for (int64_t c = 0; c < C_padded; c += Isa::kInterleaved) {
          char* pair = pairs + (c / kChunk * (kBlockKeys / 2) + s) * kChunk * 4 + c % kChunk * 4;
          Isa::interleave(even + c * 2, odd + c * 2, pair);
        }
      }
      for (int64_t c = 0; c < C_padded; c += kChunk) {
        const float* packed =
            reinterpret_cast<const float*>(pairs + c / kChunk * (kBlockKeys / 2) * kChunk * 4);
        value_rows<Isa, Dot>(
            PackedRows{packed, kChunk}, steps, reinterpret_cast<const float*>(probabilities), ld,
            alpha, values + c * rows, first, rows);
      }
    } else {
      for (int64_t c = 0; c < C_padded; c += kChunk) {
        value_rows<Isa, Dot>(
            PointedRows{block, c * 4}, num_keys, scores, ld, alpha, values + c * rows, first, rows);
      }
    }
  }

  // Brings a block into the form in which it is multiplied.
  void load_block(const char** block, int64_t num_keys) {
    if (!is_direct) {
      for (int64_t k = 0; k < num_keys; ++k) {
        char* to = converted + k * width * kUnitBytes();
        convert_row<Isa, kBf16>(block[k], p.cache, p.C, p.R, width, to);
        block[k] = to;
      }
    }
    for (int64_t k = num_keys; k % K != 0; ++k) block[k] = block[num_keys - 1];
  }

  // `steps` is this object, or one of a class that has other products.
  template <class Steps>
  void run(Steps& steps, const RowPlan& row, const Task& task, const Partials& out) {
    const int64_t rows = task.m1 - task.m0, ld = round_up(rows, N);
    for (int64_t m = 0; m < rows; m += N) {
      steps.pack_panel(row.b, task.m0 + m, rows - m < N ? rows - m : N, m / N);
    }
    int64_t least = INT64_MAX, most = row.begin;
    for (int64_t m = 0; m < ld; ++m) {
      top[m] = -INFINITY;
      total[m] = 0.0f;
      const int64_t l = (task.m0 + (m < rows ? m : rows - 1)) / p.H;
      const int64_t position = p.cache.lengths[row.b] - row.count + l + 1;
      const int64_t end = p.cache.local_count(position);
      limit[m] = static_cast<int32_t>(end);
      least = end < least ? end : least;
      most = end > most ? end : most;
    }
    const int64_t begin = row.begin + task.split * row.split_keys;
    int64_t end = begin + row.split_keys;
    end = end < row.end ? end : row.end;
    end = end < most ? end : most;  // keys that only later queries see
    bool is_first = true;
    int64_t current = 0;
    int64_t n = end - begin < kBlockKeys ? end - begin : kBlockKeys;
    if (n > 0) point(row.b, begin, n, keys);
    for (int64_t at = begin; at < end; at += kBlockKeys) {
      const char** block = keys + current * kBlockKeys;
      const char** next = keys + (1 - current) * kBlockKeys;
      int64_t num_next = end - at - n < kBlockKeys ? end - at - n : kBlockKeys;
      point(row.b, at + n, num_next, next);
      steps.load_block(block, n);
      steps.score_block(block, n, next, num_next, rows, ld);
      softmax_block(n, at, rows, ld, at + n > least);
      steps.value_block(block, n, rows, ld, is_first);
      is_first = false;
      n = num_next;
      current = 1 - current;
    }
    finish(row, task, out, rows, is_first);
  }

  // To the partial results, or, where there is one split only, to the result.
  void finish(const RowPlan& row, const Task& task, const Partials& out, int64_t rows, bool empty) {
    const int64_t M = p.L * p.H;
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t at = (row.first_part + task.split) * M + task.m0 + m;
      const bool is_single = row.num_splits == 1;
      if (!is_single) {
        out.top[at] = top[m];
        out.total[at] = total[m];
        if (empty || total[m] == 0.0f) continue;  // the merge does not read the values
      }
      const float share = empty || total[m] == 0.0f ? 0.0f : 1.0f / total[m];
      const int64_t place = row.b * M + task.m0 + m;
      for (int64_t c = 0; c < p.C; c += kChunk) {
        const int64_t left = p.C - c < kChunk ? p.C - c : kChunk;
        const float* from = values + c * rows + m * kChunk;
        if (is_single) {
          store_out(from, left, share, place * p.C + c);
        } else {
          std::memcpy(out.value + at * p.C + c, from, left * sizeof(float));
        }
      }
      if (is_single) p.lse[place] = log_sum(top[m], total[m]);
    }
  }

  static float log_sum(float top, float total) {
    return total == 0.0f ? -INFINITY : (top + std::log2(total)) * kLn2;
  }

  // `count` values times `share` to the output at element `at`; zeros where share is 0.
  void store_out(const float* from, int64_t count, float share, int64_t at) const {
    const V shares = Isa::set1(share);
    char* to = static_cast<char*>(p.out) + at * bytes_of(p.out_dtype);
    float buffer[N];
    for (int64_t i = 0; i < count; i += N) {
      const bool is_whole = i + N <= count;
      V x = Isa::zero();
      if (share != 0.0f) {
        if (!is_whole) std::memcpy(buffer, from + i, (count - i) * sizeof(float));
        x = Isa::mul(Isa::load(is_whole ? from + i : buffer), shares);
      }
      if (is_whole && p.out_dtype == Dtype::kFloat32) {
        Isa::store(reinterpret_cast<float*>(to) + i, x);
      } else if (is_whole && p.out_dtype == Dtype::kBFloat16) {
        Isa::store_bf16(reinterpret_cast<uint16_t*>(to) + i, x);
      } else if (is_whole && p.out_dtype == Dtype::kFloat16) {
        Isa::store_f16(reinterpret_cast<uint16_t*>(to) + i, x);
      } else {
        Isa::store(buffer, x);
        for (int64_t j = i; j < count && j < i + N; ++j) store_scalar(to, j, buffer[j - i]);
      }
    }
  }

  void store_scalar(char* to, int64_t j, float x) const {
    switch (p.out_dtype) {
      case Dtype::kFloat64: reinterpret_cast<double*>(to)[j] = x; break;
      case Dtype::kFloat32: reinterpret_cast<float*>(to)[j] = x; break;
      case Dtype::kBFloat16: reinterpret_cast<uint16_t*>(to)[j] = float_to_bf16(x); break;
      default: reinterpret_cast<uint16_t*>(to)[j] = float_to_f16(x);
    }
  }
};

template <class Isa, class Dot>
int64_t scratch_bytes(const DecodeParams& p, int64_t max_rows) {
  Arena arena{nullptr};
  Decode<Isa, Dot> unused(p, max_rows, arena);
  return arena.used;
}

template <class Isa, class Dot>
void run_task(
    const DecodeParams& p, const RowPlan& row, const Task& task, const Partials& out, char* scratch) {
  Arena arena{scratch};
  Decode<Isa, Dot> decode(p, task.m1 - task.m0, arena);
  decode.run(decode, row, task, out);
}

// Query rows [m0, m1) of one batch row from its splits, always in the order of the splits.
template <class Isa>
void merge_splits(
    const DecodeParams& p, const RowPlan& row, int64_t m0, int64_t m1, const Partials& parts) {
  using Merge = Decode<Isa, Float32Dot<Isa>>;
  const int64_t M = p.L * p.H, N = Isa::kLanes;
  Arena arena{nullptr};
  const Merge writer(p, 1, arena);
  float sum[256];
  for (int64_t m = m0; m < m1; ++m) {
    const int64_t first = row.first_part * M + m, place = row.b * M + m;
    float top = -INFINITY, total = 0.0f;
    for (int64_t x = 0; x < row.num_splits; ++x) {
      const float other = parts.top[first + x * M];
      top = other > top ? other : top;
    }
    for (int64_t x = 0; x < row.num_splits; ++x) {
      const int64_t at = first + x * M;
      if (parts.total[at] != 0.0f) total += std::exp2(parts.top[at] - top) * parts.total[at];
    }
    p.lse[place] = Merge::log_sum(top, total);
    const float share = total == 0.0f ? 0.0f : 1.0f / total;
    for (int64_t c = 0; c < p.C; c += 256) {
      const int64_t count = p.C - c < 256 ? p.C - c : 256;
      std::memset(sum, 0, sizeof sum);
      for (int64_t x = 0; x < row.num_splits; ++x) {
        const int64_t at = first + x * M;
        if (parts.total[at] == 0.0f) continue;
        const float weight = std::exp2(parts.top[at] - top);
        const float* value = parts.value + at * p.C + c;
        int64_t i = 0;
        for (; i + N <= count; i += N) {
          const auto old = Isa::load(sum + i);
          Isa::store(sum + i, Isa::fma(Isa::set1(weight), Isa::load(value + i), old));
        }
        for (; i < count; ++i) sum[i] += weight * value[i];
      }
      writer.store_out(sum, count, share, place * p.C + c);
    }
  }
}

}  // namespace
}  // namespace mla
