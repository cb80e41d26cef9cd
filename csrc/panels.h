// Queries side by side, in the order in which the score product reads them.
//
// A panel is [units / F][2][N] units of 32 bits. Each of the two vectors holds N / F rows by F
// consecutive units: vector v, lane (row % (N / F)) * F + f.
#pragma once

#include <cstdint>
#include <cstring>

namespace mla {
namespace {

// How many units of a row lie side by side, so that few rows fill a panel too.
template <int N>
int factor_of(int64_t rows) {
  int F = 2;
  while (F < N && 2 * N / (2 * F) >= rows) F *= 2;
  return F;
}

template <int N, int F>
void pack_by(const float* from, int64_t step, float* panel, int64_t count) {
  for (int64_t unit = 0; unit < count; unit += F) {
    for (int row = 0; row < 2 * N / F; ++row) {
      std::memcpy(panel + row * F, from + row * step + unit, F * sizeof(float));
    }
    panel += 2 * N;
  }
}

// `count` units of each row; the rows are `step` units apart.
template <int N>
void pack(int64_t rows, const float* from, int64_t step, float* panel, int64_t count) {
  switch (factor_of<N>(rows)) {
    case 2: return pack_by<N, 2>(from, step, panel, count);
    case 4: return pack_by<N, 4>(from, step, panel, count);
    case 8: return pack_by<N, 8>(from, step, panel, count);
    default: return pack_by<N, N>(from, step, panel, count);
  }
}

}  // namespace
}  // namespace mla
