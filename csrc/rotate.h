// The block Hadamard rotation of latents.
#pragma once

#include "params.h"

namespace mla {

struct RotateParams {
  const char* from = nullptr;  // [rows, C] contiguous
  char* to = nullptr;          // [rows, C] contiguous, may be `from`
  Dtype from_dtype = Dtype::kFloat32, to_dtype = Dtype::kFloat32;
  int64_t rows = 0, C = 0;
  int64_t size = 1;  // of a block: a power of two that divides C, at most 128
};

void rotate(const RotateParams& params);

}  // namespace mla
