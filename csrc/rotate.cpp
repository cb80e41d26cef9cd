// to[row, block] = from[row, block] H / sqrt(size),  H[i, j] = (-1)^popcount(i & j)
//
// by log2(size) rounds of sums and differences in float32, each element a fixed tree of them.
// Oracle: mla.codec.rotate_latent. Source: fast Walsh-Hadamard transform.
#include "rotate.h"

#include <cmath>

#include "floats.h"

namespace mla {
namespace {

constexpr int64_t kMostSize = 128;

void load(const char* p, Dtype dtype, int64_t count, float* to) {
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(p);
  switch (dtype) {
    case Dtype::kFloat32: std::memcpy(to, p, count * 4); break;
    case Dtype::kBFloat16:
      for (int64_t i = 0; i < count; ++i) to[i] = bf16_to_float(halves[i]);
      break;
    case Dtype::kFloat16:
      for (int64_t i = 0; i < count; ++i) to[i] = f16_to_float(halves[i]);
      break;
    default:
      for (int64_t i = 0; i < count; ++i) {
        to[i] = static_cast<float>(reinterpret_cast<const double*>(p)[i]);
      }
  }
}

void store(char* p, Dtype dtype, int64_t count, float factor, const float* from) {
  uint16_t* halves = reinterpret_cast<uint16_t*>(p);
  switch (dtype) {
    case Dtype::kFloat32:
      for (int64_t i = 0; i < count; ++i) reinterpret_cast<float*>(p)[i] = from[i] * factor;
      break;
    case Dtype::kBFloat16:
      for (int64_t i = 0; i < count; ++i) halves[i] = float_to_bf16(from[i] * factor);
      break;
    case Dtype::kFloat16:
      for (int64_t i = 0; i < count; ++i) halves[i] = float_to_f16(from[i] * factor);
      break;
    default:
      for (int64_t i = 0; i < count; ++i) reinterpret_cast<double*>(p)[i] = from[i] * factor;
  }
}

// Known steps, so that the compiler makes vectors of the short ones too.
template <int64_t kStep>
void add_and_subtract(float* x, int64_t size) {
  for (int64_t i = 0; i < size; i += 2 * kStep) {
#pragma GCC unroll 4
    for (int64_t j = i; j < i + kStep; ++j) {
      const float low = x[j], high = x[j + kStep];
      x[j] = low + high;
      x[j + kStep] = low - high;
    }
  }
}

void transform(float* x, int64_t size) {
  if (size > 1) add_and_subtract<1>(x, size);
  if (size > 2) add_and_subtract<2>(x, size);
  if (size > 4) add_and_subtract<4>(x, size);
  if (size > 8) add_and_subtract<8>(x, size);
  if (size > 16) add_and_subtract<16>(x, size);
  if (size > 32) add_and_subtract<32>(x, size);
  if (size > 64) add_and_subtract<64>(x, size);
}

}  // namespace

void rotate(const RotateParams& p) {
  float block[kMostSize];
  const float factor = 1.0f / std::sqrt(static_cast<float>(p.size));
  const int64_t from_bytes = bytes_of(p.from_dtype), to_bytes = bytes_of(p.to_dtype);
  for (int64_t at = 0; at < p.rows * p.C; at += p.size) {
    load(p.from + at * from_bytes, p.from_dtype, p.size, block);
    transform(block, p.size);
    store(p.to + at * to_bytes, p.to_dtype, p.size, factor, block);
  }
}

}  // namespace mla
