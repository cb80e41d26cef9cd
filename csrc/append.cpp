// New rows: norm and rotation of each token, and its code as mla.codec lays it out, byte for byte.
//
//   latent = latent_scale * RMS(kv_a[:C]) * weight     k_rope = RoPE(kv_a[C:])
//
// Oracle: mla.codec (bytes), mla.reference.rms_norm, mla.rope.rotate.
#include "append.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "checks.h"
#include "floats.h"

namespace mla {
namespace {

constexpr int64_t kTokensPerThread = 16;  // at least; one token takes about a microsecond
constexpr int kSums = 16;                 // independent partial sums, so that loops vectorise

inline float load_scalar(const char* p, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::kFloat64: return static_cast<float>(reinterpret_cast<const double*>(p)[i]);
    case Dtype::kFloat32: return reinterpret_cast<const float*>(p)[i];
    case Dtype::kBFloat16: return bf16_to_float(reinterpret_cast<const uint16_t*>(p)[i]);
    default: return f16_to_float(reinterpret_cast<const uint16_t*>(p)[i]);
  }
}

// One loop for each dtype, so that the compiler sees what it may vectorise.
void load(const char* p, Dtype dtype, int64_t count, float* to) {
  if (count == 0) return;  // an empty tensor has no memory
  if (dtype == Dtype::kFloat32) {
    std::memcpy(to, p, count * sizeof(float));
  } else if (dtype == Dtype::kBFloat16) {
    const uint16_t* from = reinterpret_cast<const uint16_t*>(p);
    for (int64_t i = 0; i < count; ++i) to[i] = bf16_to_float(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = load_scalar(p, dtype, i);
  }
}

void store(const float* from, Dtype dtype, int64_t count, char* p) {
  if (count == 0) return;
  switch (dtype) {
    case Dtype::kFloat64:
      for (int64_t i = 0; i < count; ++i) reinterpret_cast<double*>(p)[i] = from[i];
      break;
    case Dtype::kFloat32: std::memcpy(p, from, count * sizeof(float)); break;
    case Dtype::kBFloat16:
      for (int64_t i = 0; i < count; ++i) {
        reinterpret_cast<uint16_t*>(p)[i] = float_to_bf16(from[i]);
      }
      break;
    default:
      for (int64_t i = 0; i < count; ++i) {
        reinterpret_cast<uint16_t*>(p)[i] = float_to_f16(from[i]);
      }
  }
}

// x on the grid of `dtype`.
inline float rounded(float x, Dtype dtype) {
  if (dtype == Dtype::kBFloat16) return bf16_to_float(float_to_bf16(x));
  if (dtype == Dtype::kFloat16) return f16_to_float(float_to_f16(x));
  return x;
}

// Largest magnitude; NaN if any value is.
float largest(const float* x, int64_t count) {
  float most = 0.0f;
  bool has_nan = false;
  for (int64_t i = 0; i < count; ++i) {
    const float magnitude = std::fabs(x[i]);
    most = magnitude > most ? magnitude : most;
    has_nan |= x[i] != x[i];
  }
  return has_nan ? NAN : most;
}

// The nearest whole number, ties to even, in [-most, most]; 0 for NaN.
inline int32_t whole(float x, float most) {
  const float clamped = x < -most ? -most : x > most ? most : x;
  const float shifted = (clamped == clamped ? clamped : 0.0f) + 12582912.0f;  // 1.5 * 2**23
  return static_cast<int32_t>(shifted - 12582912.0f);
}

// The smallest power of two that is at least x, for normal positive x; inf and NaN stay.
inline float power_of_two_above(float x) {
  if (!std::isfinite(x)) return x;
  const uint32_t bits = bits_of(x);
  return from_bits(((bits >> 23) + ((bits & 0x7FFFFF) != 0)) << 23);
}

// Nearest e4m3, ties to even, of a magnitude up to 448; 0x7F for NaN.
inline uint8_t float_to_e4m3(float x) {
  const uint32_t bits = bits_of(x), sign = (bits >> 24) & 0x80, magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return static_cast<uint8_t>(sign | 0x7F);
  if (magnitude < 0x3C800000) {  // below 2**-6 the spacing is 2**-9
    return static_cast<uint8_t>(sign | whole(from_bits(magnitude) * 512.0f, 8.0f));
  }
  const uint32_t nearest = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20;
  return static_cast<uint8_t>(sign | (nearest - (120 << 3)));
}

inline void put_scale(char* row, const Codec& codec, int64_t g, float scale) {
  char* at = row + codec.scales_at;
  if (codec.kind == CodecKind::kInt4) {
    reinterpret_cast<uint16_t*>(at)[g] = float_to_f16(scale);
  } else {
    reinterpret_cast<float*>(at)[g] = scale;
  }
}

// The scale of one group, as it is stored.
float scale_of(CodecKind kind, float amax) {
  if (kind == CodecKind::kFp8) {
    const float scale = amax / 448.0f;
    return power_of_two_above(scale < 1e-4f ? 1e-4f : scale);
  }
  if (kind == CodecKind::kInt8) return amax / 127.0f;
  const float scale = amax / 7.0f;
  return f16_to_float(float_to_f16(std::isfinite(scale) && scale > 65504.0f ? 65504.0f : scale));
}

void code_group(
    const float* x, int64_t begin, int64_t end, const Codec& codec, int64_t g, char* row) {
  const float scale = scale_of(codec.kind, largest(x + begin, end - begin));
  put_scale(row, codec, g, scale);
  const float safe = scale == 0.0f ? 1.0f : scale;
  uint8_t* bytes = reinterpret_cast<uint8_t*>(row);
  if (codec.kind == CodecKind::kFp8) {
    for (int64_t c = begin; c < end; ++c) {
      const float ratio = x[c] / safe;
      bytes[c] = float_to_e4m3(ratio < -448.0f ? -448.0f : ratio > 448.0f ? 448.0f : ratio);
    }
  } else if (codec.kind == CodecKind::kInt8) {
    for (int64_t c = begin; c < end; ++c) {
      bytes[c] = static_cast<uint8_t>(whole(x[c] / safe, 127.0f));
    }
  } else {
    for (int64_t c = begin; c < end; c += 2) {  // groups begin at even places
      const int32_t low = whole(x[c] / safe, 7.0f) + 8;
      const int32_t high = c + 1 < end ? whole(x[c + 1] / safe, 7.0f) + 8 : 0;
      bytes[c / 2] = static_cast<uint8_t>(low | high << 4);
    }
  }
}

void code_row(const AppendParams& p, const float* latent, const float* k_rope, char* row) {
  const Codec& codec = p.cache.codec;
  if (codec.kind == CodecKind::kPlain) {
    store(latent, p.cache.dtype, p.C, row);
    store(k_rope, p.cache.dtype, p.R, row + p.C * bytes_of(p.cache.dtype));
    return;
  }
  std::memset(row, 0, p.cache.row_bytes);
  int64_t g = 0;
  for (; g * codec.group < p.C; ++g) {
    const int64_t end = (g + 1) * codec.group;
    code_group(latent, g * codec.group, end < p.C ? end : p.C, codec, g, row);
  }
  char* rope = row + codec.rope_at;
  if (codec.rope_bits == 16) {
    store(k_rope, Dtype::kBFloat16, p.R, rope);
    return;
  }
  float scale = largest(k_rope, p.R) / 127.0f;
  if (codec.kind == CodecKind::kInt4) scale = f16_to_float(float_to_f16(scale));
  put_scale(row, codec, g, scale);
  const float safe = scale == 0.0f ? 1.0f : scale;
  for (int64_t r = 0; r < p.R; ++r) rope[r] = static_cast<char>(whole(k_rope[r] / safe, 127.0f));
}

// The local slot of token l, or -1 where it does not exist or lies on another shard.
int64_t slot_of(const AppendParams& p, int64_t b, int64_t l) {
  const Cache& cache = p.cache;
  const int64_t count = p.new_lengths == nullptr ? p.L : p.new_lengths[b];
  if (l >= count) return -1;
  const int64_t position = cache.lengths[b] - count + l, column = position / cache.Z;
  if (column % cache.shard_count != cache.shard_index) return -1;
  return column / cache.shard_count * cache.Z + position % cache.Z;
}

void check_places(const AppendParams& p) {
  PageRange pages;
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t count = p.new_lengths == nullptr ? p.L : p.new_lengths[b];
    MLA_CHECK(
        count >= 0 && count <= p.L && count <= p.cache.lengths[b],
        "mla_append: new_lengths has value ", count, ", expected 0 to L=", p.L,
        " and at most lengths=", p.cache.lengths[b]);
    for (int64_t l = 0; l < count; ++l) {
      const int64_t slot = slot_of(p, b, l);
      if (slot >= 0) pages.include(p.cache, b, slot, slot + 1);
    }
  }
  pages.check(p.cache);
}

}  // namespace

void append(const AppendParams& p) {
  check_lengths("CacheView", p.cache, p.B);
  check_places(p);
  torch::stable::parallel_for(0, p.B * p.L, kTokensPerThread, [&](int64_t begin, int64_t end) {
    std::vector<float> values(static_cast<std::size_t>(p.C + p.R));
    for (int64_t token = begin; token < end; ++token) {
      const int64_t b = token / p.L, l = token % p.L, slot = slot_of(p, b, l);
      if (slot < 0) continue;
      load(p.latent.at(b, l), p.latent.dtype, p.C, values.data());
      load(p.k_rope.at(b, l), p.k_rope.dtype, p.R, values.data() + p.C);
      code_row(p, values.data(), values.data() + p.C, p.cache.row(b, slot));
    }
  });
}

namespace {

void normalise(const NormRopeParams& p, const float* weight, float* x) {
  const Dtype dtype = p.kv_a.dtype;
  if (weight != nullptr) {
    float sums[kSums] = {};
    int64_t c = 0;
    for (; c + kSums <= p.C; c += kSums) {
      for (int i = 0; i < kSums; ++i) sums[i] += x[c + i] * x[c + i];
    }
    for (; c < p.C; ++c) sums[0] += x[c] * x[c];
    float sum = 0.0f;
    for (float part : sums) sum += part;
    const float inverse = 1.0f / std::sqrt(sum / static_cast<float>(p.C) + p.eps);
    for (c = 0; c < p.C; ++c) x[c] = rounded(x[c] * inverse * weight[c], dtype);
  }
  if (p.latent_scale != 1.0f) {
    for (int64_t c = 0; c < p.C; ++c) x[c] = rounded(x[c] * p.latent_scale, dtype);
  }
}

// Pairs turn in the wider of both dtypes: every product is rounded where both are 16 bits wide.
void turn(const NormRopeParams& p, const char* cos, const char* sin, float* x) {
  const Dtype dtype = p.kv_a.dtype;
  const Dtype wide = p.cos.dtype == dtype ? dtype : Dtype::kFloat32;
  const bool interleaved = p.pairing == Pairing::kInterleaved;
  const int64_t half = p.R / 2;
  for (int64_t k = 0; k < half; ++k) {
    float& first = x[interleaved ? 2 * k : k];
    float& second = x[interleaved ? 2 * k + 1 : half + k];
    const float c = load_scalar(cos, p.cos.dtype, k), s = load_scalar(sin, p.sin.dtype, k);
    const float a = rounded(first * c, wide), b = rounded(second * s, wide);
    const float d = rounded(second * c, wide), e = rounded(first * s, wide);
    first = rounded(a - b, dtype);
    second = rounded(d + e, dtype);
  }
}

}  // namespace

void norm_rope(const NormRopeParams& p) {
  const Dtype dtype = p.kv_a.dtype;
  const int64_t bytes = bytes_of(dtype);
  std::vector<float> weight(p.weight == nullptr ? 0 : static_cast<std::size_t>(p.C));
  if (p.weight != nullptr) load(p.weight, dtype, p.C, weight.data());
  const float* weights = p.weight == nullptr ? nullptr : weight.data();
  torch::stable::parallel_for(0, p.B * p.L, kTokensPerThread, [&](int64_t begin, int64_t end) {
    std::vector<float> x(static_cast<std::size_t>(p.C + p.R));
    for (int64_t token = begin; token < end; ++token) {
      const int64_t b = token / p.L, l = token % p.L;
      load(p.kv_a.at(b, l), dtype, p.C + p.R, x.data());
      normalise(p, weights, x.data());
      if (p.pairing != Pairing::kNone) turn(p, p.cos.at(b, l), p.sin.at(b, l), x.data() + p.C);
      store(x.data(), dtype, p.C, static_cast<char*>(p.latent) + token * p.C * bytes);
      store(x.data() + p.C, dtype, p.R, static_cast<char*>(p.k_rope) + token * p.R * bytes);
    }
  });
}

}  // namespace mla
