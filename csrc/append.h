// New rows: norm and rotation, coding, storing.
#pragma once

#include "params.h"

namespace mla {

// A [B, L, width] input whose last dim is contiguous; strides in bytes.
struct TokenRows {
  const char* data = nullptr;
  int64_t strides[2] = {0, 0};
  Dtype dtype = Dtype::kFloat32;
  const char* at(int64_t b, int64_t l) const {
    return data == nullptr ? nullptr : data + b * strides[0] + l * strides[1];
  }
};

struct AppendParams {
  TokenRows latent, k_rope;
  const int32_t* new_lengths = nullptr;  // [B] or null
  int64_t B = 0, L = 0, C = 0, R = 0;
  Cache cache;
};

enum class Pairing : int { kNone, kInterleaved, kHalf };

struct NormRopeParams {
  TokenRows kv_a;  // [B, L, C + R]
  TokenRows cos, sin;  // [B, L, R / 2], unused without pairing
  const char* weight = nullptr;  // [C] of the dtype of kv_a, or null for no norm
  void* latent = nullptr;        // [B, L, C] contiguous, dtype of kv_a
  void* k_rope = nullptr;        // [B, L, R]
  float eps = 0.0f, latent_scale = 1.0f;
  Pairing pairing = Pairing::kNone;
  int64_t B = 0, L = 0, C = 0, R = 0;
};

// Checks lengths and pages, then writes token l of row b at position lengths - new_lengths + l.
void append(const AppendParams& params);

void norm_rope(const NormRopeParams& params);

}  // namespace mla
