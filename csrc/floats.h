// Scalar conversions of 16- and 8-bit floats, for the portable kernels and for append.
#pragma once

#include <cstdint>
#include <cstring>

namespace mla {
namespace {

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float bf16_to_float(uint16_t x) { return from_bits(static_cast<uint32_t>(x) << 16); }

inline uint16_t float_to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FC0;
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline float f16_to_float(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16;
  const uint32_t magnitude = x & 0x7FFF;
  if (magnitude >= 0x7C00) return from_bits(sign | 0x7F800000 | ((magnitude & 0x3FF) << 13));
  // The exponent's bias moves from 15 to 127 in one exact product, subnormals included.
  return from_bits(sign | bits_of(from_bits(magnitude << 13) * 0x1p112f));
}

inline uint16_t float_to_f16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
  if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // rounds to inf
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 rounds to steps of 2**-24
    const float rounded = from_bits(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_of(rounded) - bits_of(0.5f)));
  }
  const uint32_t rounded = magnitude + 0xFFF + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
}

inline float e4m3_to_float(uint8_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x80) << 24;
  const uint32_t magnitude = x & 0x7F;
  if (magnitude == 0x7F) return from_bits(sign | 0x7FC00000);
  return from_bits(sign | bits_of(from_bits(magnitude << 20) * 0x1p120f));
}

}  // namespace
}  // namespace mla
