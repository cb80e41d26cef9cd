// Decode of a whole batch: plans, threads, merges.
#pragma once

#include "params.h"

namespace mla {

// Checks lengths and pages, then writes `out` and `lse`.
void decode(const DecodeParams& params, const DecodeKernels& kernels);

}  // namespace mla
