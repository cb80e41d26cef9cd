// What a call must fulfil before a kernel may read anything. Messages begin with the argument's
// owner, as in mla.checks; mla/kernels/cpu.py makes a ShapeError of them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "params.h"

namespace mla {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define MLA_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

inline Dtype dtype_of(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return Dtype::kFloat64;
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    case ScalarType::Byte: return Dtype::kUInt8;
    default:
      MLA_CHECK(false, op, ": ", name, " has another dtype, expected float64 to bfloat16 or uint8");
  }
  return Dtype::kUInt8;
}

inline void check_dims(const char* op, const char* name, const Tensor& tensor, int64_t dims) {
  MLA_CHECK(tensor.is_cpu(), op, ": ", name, " is on another device, expected cpu");
  MLA_CHECK(tensor.dim() == dims, op, ": ", name, " has ", tensor.dim(), " dims, expected ", dims);
}

inline void check_size(
    const char* op, const char* name, const Tensor& tensor, int64_t dim, int64_t size) {
  MLA_CHECK(
      tensor.size(dim) == size, op, ": ", name, " has size ", tensor.size(dim), " in dim ", dim,
      ", expected ", size);
}

// int32 and contiguous, or null where it is absent.
inline const int32_t* int32_data(
    const char* op, const char* name, const std::optional<Tensor>& tensor, int64_t dims,
    int64_t B) {
  if (!tensor.has_value()) return nullptr;
  check_dims(op, name, *tensor, dims);
  check_size(op, name, *tensor, 0, B);
  MLA_CHECK(
      tensor->scalar_type() == ScalarType::Int, op, ": ", name,
      " has another dtype, expected int32");
  MLA_CHECK(tensor->is_contiguous(), op, ": ", name, " is strided, expected it contiguous");
  return tensor->const_data_ptr<int32_t>();
}

// The sections of a coded row lie inside it, in order and aligned.
inline void check_codec(const char* op, const Codec& codec, int64_t C, int64_t R, int64_t width) {
  MLA_CHECK(
      codec.group >= 16 && (codec.group & (codec.group - 1)) == 0, op, ": codec has group ",
      codec.group, ", expected a power of two of at least 16");
  MLA_CHECK(
      codec.rope_bits == 8 || codec.rope_bits == 16, op, ": codec has rope_bits ",
      codec.rope_bits, ", expected 8 or 16");
  const bool is_int4 = codec.kind == CodecKind::kInt4;
  const int64_t scales = (C + codec.group - 1) / codec.group + (codec.rope_bits == 8);
  const int64_t ends[3] = {
      is_int4 ? (C + 1) / 2 : C, codec.scales_at + scales * (is_int4 ? 2 : 4),
      codec.rope_at + R * codec.rope_bits / 8};
  MLA_CHECK(
      ends[0] <= codec.scales_at && ends[1] <= codec.rope_at && ends[2] <= width &&
          codec.scales_at % 16 == 0 && codec.rope_at % 16 == 0,
      op, ": codec has sections at ", codec.scales_at, " and ", codec.rope_at, " of ", width,
      " bytes, expected values, scales and rope one after the other");
}

// Fills `cache`, and checks everything that does not depend on the values of lengths and tables.
inline void bind_cache(
    const char* op, Cache& cache, const Tensor& rows, const std::optional<Tensor>& page_table,
    const Tensor& lengths, const std::optional<Tensor>& starts, int64_t B, int64_t C, int64_t R) {
  check_dims(op, "rows", rows, 3);
  cache.dtype = dtype_of(op, "rows", rows);
  const int64_t width = rows.size(2), bytes = bytes_of(cache.dtype);
  MLA_CHECK(
      (cache.dtype == Dtype::kUInt8) == (cache.codec.kind != CodecKind::kPlain), op,
      ": rows has a dtype that is not its codec's");
  if (cache.codec.kind == CodecKind::kPlain) {
    check_size(op, "rows", rows, 2, C + R);
  } else {
    check_codec(op, cache.codec, C, R, width);
  }
  MLA_CHECK(
      width <= 1 || rows.stride(2) == 1, op, ": rows has last stride ", rows.stride(2),
      ", expected 1");
  cache.rows = static_cast<char*>(rows.data_ptr());
  cache.num_pages = rows.size(0);
  cache.Z = rows.size(1);
  cache.page_stride = cache.num_pages > 1 ? rows.stride(0) * bytes : 0;
  cache.slot_stride = cache.Z > 1 ? rows.stride(1) * bytes : 0;
  cache.row_bytes = width * bytes;
  cache.page_table = int32_data(op, "page_table", page_table, 2, B);
  cache.M = page_table.has_value() ? page_table->size(1) : 1;
  cache.lengths = int32_data(op, "lengths", lengths, 1, B);
  cache.starts = int32_data(op, "starts", starts, 1, B);
  const int64_t index = cache.shard_index, count = cache.shard_count;
  MLA_CHECK(
      0 <= index && index < count && (count == 1 || page_table.has_value()), op,
      ": shard has value (", index, ", ", count, "), expected 0 <= index < count and pages");
  if (!page_table.has_value()) check_size(op, "rows", rows, 0, B);  // an empty table has no data
  if (cache.codec.kind != CodecKind::kPlain) {
    const int64_t place = static_cast<int64_t>(reinterpret_cast<uintptr_t>(cache.rows) % 16);
    MLA_CHECK(
        place == 0 && cache.page_stride % 16 == 0 && cache.slot_stride % 16 == 0, op,
        ": rows has coded rows that do not begin at multiples of 16 bytes");
  }
}

inline void check_lengths(const char* op, const Cache& cache, int64_t B) {
  const int64_t capacity = cache.M * cache.Z * cache.shard_count;
  for (int64_t b = 0; b < B; ++b) {
    MLA_CHECK(
        cache.lengths[b] >= 0 && cache.lengths[b] <= capacity, op, ": lengths has values up to ",
        cache.lengths[b], ", expected at most ", capacity, " and at least 0");
  }
}

// Least and largest of the page ids that are about to be used.
struct PageRange {
  int64_t low = 0, high = -1;

  // Those behind local slots [begin, end) of row b.
  void include(const Cache& cache, int64_t b, int64_t begin, int64_t end) {
    if (cache.page_table == nullptr || begin >= end) return;
    const int32_t* pages = cache.page_table + b * cache.M;
    for (int64_t column = begin / cache.Z; column <= (end - 1) / cache.Z; ++column) {
      const int64_t page = pages[column];
      low = page < low ? page : low;
      high = page > high ? page : high;
    }
  }

  void check(const Cache& cache) const {
    MLA_CHECK(
        low >= 0 && high < cache.num_pages, "CacheView: page_table has pages ", low, " to ", high,
        " in use, expected 0 to ", cache.num_pages - 1);
  }
};

}  // namespace mla
