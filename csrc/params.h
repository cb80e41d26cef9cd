// What the kernels are told about one call. Letters as in mla/view.py:
// B batch, L queries, H heads, C latent width, R rotated width, Z positions in one page.
#pragma once

#include <cstdint>

namespace mla {

enum class Dtype : int { kFloat64, kFloat32, kBFloat16, kFloat16, kUInt8 };
enum class CodecKind : int { kPlain, kFp8, kInt8, kInt4 };

inline int64_t bytes_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64: return 8;
    case Dtype::kFloat32: return 4;
    case Dtype::kUInt8: return 1;
    default: return 2;
  }
}

// How one row is stored; byte offsets as in mla.codec.
struct Codec {
  CodecKind kind = CodecKind::kPlain;
  int64_t group = 0;      // latent values of one scale
  int64_t rope_bits = 0;  // 8 or 16
  int64_t scales_at = 0;
  int64_t rope_at = 0;
};

// Slots of one layer's cache. Row b holds local slot j in column j / Z, slot j % Z of its pages.
struct Cache {
  char* rows = nullptr;     // [P, Z, W], strides below in bytes
  int64_t page_stride = 0;
  int64_t slot_stride = 0;
  int64_t row_bytes = 0;
  int64_t num_pages = 0;
  int64_t Z = 0;
  int64_t M = 0;                       // page-table width
  const int32_t* page_table = nullptr;  // [B, M] contiguous, or null: row b is page b
  const int32_t* lengths = nullptr;     // [B]
  const int32_t* starts = nullptr;      // [B] or null
  int64_t shard_index = 0;
  int64_t shard_count = 1;
  Dtype dtype = Dtype::kFloat32;
  Codec codec;

  // How many positions below `position` this shard holds.
  int64_t local_count(int64_t position) const {
    if (position <= 0) return 0;
    if (shard_count == 1 || Z == 0) return Z == 0 ? 0 : position;
    const int64_t cycle = Z * shard_count, rest = position % cycle - shard_index * Z;
    return position / cycle * Z + (rest < 0 ? 0 : rest > Z ? Z : rest);
  }

  char* row(int64_t b, int64_t slot) const {
    if (page_table == nullptr) return rows + b * page_stride + slot * slot_stride;
    const int64_t column = slot / Z;
    return rows + page_table[b * M + column] * page_stride + (slot - column * Z) * slot_stride;
  }
};

struct DecodeParams {
  const char* q_latent = nullptr;  // [B, L, H, C], last dim contiguous, strides below in bytes
  const char* q_rope = nullptr;    // [B, L, H, R]
  int64_t q_latent_strides[3] = {0, 0, 0};
  int64_t q_rope_strides[3] = {0, 0, 0};
  const int32_t* query_lengths = nullptr;  // [B] or null
  void* out = nullptr;                     // [B, L, H, C] contiguous
  float* lse = nullptr;                    // [B, L, H] contiguous
  Dtype q_dtype = Dtype::kFloat32;         // of both query parts
  Dtype out_dtype = Dtype::kFloat32;
  int64_t B = 0, L = 0, H = 0, C = 0, R = 0;
  float scale = 1.0f;
  Cache cache;
};

// One batch row: its keys are the local slots [begin, end), in splits of `split_keys`.
struct RowPlan {
  int64_t b = 0;
  int64_t begin = 0, end = 0;
  int64_t count = 0;  // queries that exist
  int64_t num_splits = 0, split_keys = 0;
  int64_t first_part = 0;  // index of split 0 among the partial results
};

// One unit of work: query rows [m0, m1) of a batch row (row m is head m % H of query m / H) over
// one of its splits.
struct Task {
  int64_t row = 0;  // index of the RowPlan
  int64_t split = 0;
  int64_t m0 = 0, m1 = 0;
};

// Partial results: sums and weights relative to the largest score, in base 2.
struct Partials {
  float* value = nullptr;  // [parts, L*H, C]
  float* top = nullptr;    // [parts, L*H]
  float* total = nullptr;  // [parts, L*H]
};

// The kernels of one instruction set.
struct DecodeKernels {
  const char* name;
  int64_t block_keys;  // splits are multiples of it
  int64_t row_step;    // tasks begin at multiples of it, so that grouping changes no bit
  int64_t (*scratch_bytes)(const DecodeParams&, int64_t max_rows);
  void (*run)(const DecodeParams&, const RowPlan&, const Task&, const Partials&, char* scratch);
  void (*merge)(const DecodeParams&, const RowPlan&, int64_t m0, int64_t m1, const Partials&);
  int64_t (*peak)(int64_t iterations, bool bf16);
};

extern const DecodeKernels kDecodePortable;
#if defined(__x86_64__)
extern const DecodeKernels kDecodeAvx2;
extern const DecodeKernels kDecodeAvx512;
extern const DecodeKernels kDecodeAvx512Bf16;
extern const DecodeKernels kDecodeAvx512Vnni;
#endif

}  // namespace mla
