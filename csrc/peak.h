// The arithmetic that registers alone allow: what benchmarks hold the kernels against.
#pragma once

#include <cstdint>

namespace mla {
namespace {

// Runs `iterations` rounds of independent products and returns how many operations they were.
template <class Isa, class Dot>
int64_t run_peak(int64_t iterations) {
  using V = typename Isa::V;
  constexpr int kSums = Isa::kTileKeys * 2;  // as many as the score product keeps
  V sum[kSums];
  volatile float seed = 0.0f;  // unknown to the compiler, which would merge equal sums
  V x = Isa::set1(seed);
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) sum[i] = Isa::set1(seed);
  for (int64_t round = 0; round < iterations; ++round) {
    asm volatile("" ::: "memory");
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) sum[i] = Dot::dot(sum[i], x, x);
  }
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) x = Isa::add(x, sum[i]);
  float end[Isa::kLanes];
  Isa::store(end, x);
  seed = end[0];
  return iterations * kSums * Isa::kLanes * (Dot::kIsBf16 ? 4 : 2);
}

}  // namespace
}  // namespace mla
