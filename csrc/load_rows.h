// Stored values to float32 or bfloat16: queries, and rows that cannot be multiplied as they lie.
#pragma once

#include <cstdint>
#include <cstring>

#include "floats.h"
#include "params.h"

namespace mla {
namespace {

inline float scalar_at(const char* p, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::kFloat64: return static_cast<float>(reinterpret_cast<const double*>(p)[i]);
    case Dtype::kFloat32: return reinterpret_cast<const float*>(p)[i];
    case Dtype::kBFloat16: return bf16_to_float(reinterpret_cast<const uint16_t*>(p)[i]);
    default: return f16_to_float(reinterpret_cast<const uint16_t*>(p)[i]);
  }
}

template <class Isa>
typename Isa::V vector_at(const char* p, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::kFloat64: {
      float x[Isa::kLanes];
      for (int lane = 0; lane < Isa::kLanes; ++lane) x[lane] = scalar_at(p, dtype, i + lane);
      return Isa::load(x);
    }
    case Dtype::kFloat32: return Isa::load(reinterpret_cast<const float*>(p) + i);
    case Dtype::kBFloat16: return Isa::load_bf16(reinterpret_cast<const uint16_t*>(p) + i);
    default: return Isa::load_f16(reinterpret_cast<const uint16_t*>(p) + i);
  }
}

// Places of converted values: float32 or bfloat16.
template <class Isa, bool kBf16>
struct Sink {
  char* p;
  void put(int64_t i, typename Isa::V x) const {
    if constexpr (kBf16) {
      Isa::store_bf16(reinterpret_cast<uint16_t*>(p) + i, x);
    } else {
      Isa::store(reinterpret_cast<float*>(p) + i, x);
    }
  }
  void put(int64_t i, float x) const {
    if constexpr (kBf16) {
      reinterpret_cast<uint16_t*>(p)[i] = float_to_bf16(x);
    } else {
      reinterpret_cast<float*>(p)[i] = x;
    }
  }
};

// `count` values of `dtype` to places [at, at + count).
template <class Isa, bool kBf16>
void convert_values(const char* p, Dtype dtype, int64_t count, Sink<Isa, kBf16> sink, int64_t at) {
  if (count == 0) return;  // p may be null
  if (dtype == (kBf16 ? Dtype::kBFloat16 : Dtype::kFloat32)) {
    std::memcpy(sink.p + at * (kBf16 ? 2 : 4), p, count * (kBf16 ? 2 : 4));
    return;
  }
  int64_t i = 0;
  for (; i + Isa::kLanes <= count; i += Isa::kLanes) {
    sink.put(at + i, vector_at<Isa>(p, dtype, i));
  }
  for (; i < count; ++i) sink.put(at + i, scalar_at(p, dtype, i));
}

inline float scale_at(const char* row, const Codec& codec, int64_t g) {
  const bool is_half = codec.kind == CodecKind::kInt4;
  return scalar_at(row + codec.scales_at, is_half ? Dtype::kFloat16 : Dtype::kFloat32, g);
}

inline float code_at(const char* row, CodecKind kind, int64_t c) {
  if (kind == CodecKind::kFp8) return e4m3_to_float(static_cast<uint8_t>(row[c]));
  if (kind == CodecKind::kInt8) return static_cast<float>(static_cast<int8_t>(row[c]));
  return static_cast<float>((static_cast<uint8_t>(row[c / 2]) >> (c % 2 * 4)) & 15) - 8.0f;
}

// The latent of one coded row: every value times the scale of its group. Groups are powers of two
// of at least 16, so that a vector never crosses one.
template <class Isa, bool kBf16, CodecKind kKind>
void convert_latent(const char* row, const Codec& codec, int64_t C, Sink<Isa, kBf16> sink) {
  for (int64_t g = 0; g * codec.group < C; ++g) {
    const float scale = scale_at(row, codec, g);
    const typename Isa::V scales = Isa::set1(scale);
    int64_t c = g * codec.group;
    const int64_t end = c + codec.group < C ? c + codec.group : C;
    for (; c + Isa::kLanes <= end; c += Isa::kLanes) {
      typename Isa::V x;
      if constexpr (kKind == CodecKind::kFp8) {
        x = Isa::load_e4m3(reinterpret_cast<const uint8_t*>(row) + c);
      } else if constexpr (kKind == CodecKind::kInt8) {
        x = Isa::load_i8(reinterpret_cast<const int8_t*>(row) + c);
      } else {
        x = Isa::load_i4(reinterpret_cast<const uint8_t*>(row) + c / 2);
      }
      sink.put(c, Isa::mul(x, scales));
    }
    for (; c < end; ++c) sink.put(c, code_at(row, kKind, c) * scale);
  }
}

// One stored row to `C + R` values, then zeros up to `width`.
template <class Isa, bool kBf16>
void convert_row(
    const char* row, const Cache& cache, int64_t C, int64_t R, int64_t width, char* to) {
  const Sink<Isa, kBf16> sink{to};
  const Codec& codec = cache.codec;
  switch (codec.kind) {
    case CodecKind::kPlain: convert_values(row, cache.dtype, C + R, sink, 0); break;
    case CodecKind::kFp8: convert_latent<Isa, kBf16, CodecKind::kFp8>(row, codec, C, sink); break;
    case CodecKind::kInt8: convert_latent<Isa, kBf16, CodecKind::kInt8>(row, codec, C, sink); break;
    case CodecKind::kInt4: convert_latent<Isa, kBf16, CodecKind::kInt4>(row, codec, C, sink); break;
  }
  if (codec.kind != CodecKind::kPlain) {
    const char* rope = row + codec.rope_at;
    if (codec.rope_bits == 16) {
      convert_values(rope, Dtype::kBFloat16, R, sink, C);
    } else {
      const float scale = scale_at(row, codec, (C + codec.group - 1) / codec.group);
      for (int64_t r = 0; r < R; ++r) {
        sink.put(C + r, static_cast<float>(static_cast<int8_t>(rope[r])) * scale);
      }
    }
  }
  const int64_t bytes = kBf16 ? 2 : 4;
  std::memset(to + (C + R) * bytes, 0, (width - C - R) * bytes);
}

}  // namespace
}  // namespace mla
