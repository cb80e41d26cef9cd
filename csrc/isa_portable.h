// Vectors of 8 float32 lanes in the compiler's own vector extension: any processor.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "floats.h"

namespace mla {
namespace {

struct Portable {
  typedef float V __attribute__((vector_size(32)));
  typedef int32_t I __attribute__((vector_size(32)));
  static constexpr int kLanes = 8;
  static constexpr int kTileKeys = 3;
  static constexpr int kTileHeads = 3;
  static constexpr int kTileCols = 2;

  static V zero() { return V{}; }
  static V set1(float x) { return V{} + x; }
  static V load(const float* p) {
    V x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static void store(float* p, V x) { std::memcpy(p, &x, sizeof x); }
  static V add(V a, V b) { return a + b; }
  static V sub(V a, V b) { return a - b; }
  static V mul(V a, V b) { return a * b; }
  static V fma(V a, V b, V c) { return a * b + c; }
  static V max(V a, V b) { return a > b ? a : b; }

  template <int F>
  static V broadcast(const char* p) {
    float x[F];
    std::memcpy(x, p, sizeof x);
    V out;
    for (int i = 0; i < kLanes; ++i) out[i] = x[i % F];
    return out;
  }

  static V pair_sums(V a, V b) {
    V out;
    for (int i = 0; i < kLanes / 2; ++i) {
      out[i] = a[2 * i] + a[2 * i + 1];
      out[i + kLanes / 2] = b[2 * i] + b[2 * i + 1];
    }
    return out;
  }

  static V mask_from(V x, int32_t key, const int32_t* limits) {
    I limit;
    std::memcpy(&limit, limits, sizeof limit);
    return limit > key ? x : set1(-INFINITY);
  }
  static V finite(V x) { return x == -INFINITY ? zero() : x; }
  static V round(V x) { return (x + 12582912.0f) - 12582912.0f; }  // 1.5 * 2**23: ties to even
  static V scale_by_power(V p, V n) {
    const V clamped = n > -127.0f ? n : set1(-127.0f);  // also a number where n is NaN
    const I exponent = (__builtin_convertvector(clamped, I) + 127) << 23;
    V power;
    std::memcpy(&power, &exponent, sizeof power);
    return n < -126.0f ? zero() : p * power;
  }

  template <class Convert, class T>
  static V convert(const T* p, Convert to_float) {
    V out;
    for (int i = 0; i < kLanes; ++i) out[i] = to_float(p[i]);
    return out;
  }
  static V load_bf16(const uint16_t* p) { return convert(p, bf16_to_float); }
  static V load_f16(const uint16_t* p) { return convert(p, f16_to_float); }
  static V load_i8(const int8_t* p) {
    return convert(p, [](int8_t x) { return static_cast<float>(x); });
  }
  static V load_e4m3(const uint8_t* p) { return convert(p, e4m3_to_float); }
  static V load_i4(const uint8_t* p) {
    V out;
    for (int i = 0; i < kLanes; ++i) {
      out[i] = static_cast<float>((p[i / 2] >> (i % 2 * 4)) & 15) - 8.0f;
    }
    return out;
  }
  static void store_bf16(uint16_t* p, V x) {
    for (int i = 0; i < kLanes; ++i) p[i] = float_to_bf16(x[i]);
  }
  static void store_f16(uint16_t* p, V x) {
    for (int i = 0; i < kLanes; ++i) p[i] = float_to_f16(x[i]);
  }
};

}  // namespace
}  // namespace mla
