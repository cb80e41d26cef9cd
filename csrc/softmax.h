// Online softmax in base 2 over one block of scores, lanes over the query rows.
#pragma once

#include <cstdint>

namespace mla {
namespace {

// 2**x for x <= 0, 0 for -inf, NaN for NaN. Least-squares polynomial on [-0.5, 0.5], relative
// error 2e-9 before rounding.
template <class Isa>
typename Isa::V exp2_lanes(typename Isa::V x) {
  using V = typename Isa::V;
  x = Isa::max(Isa::set1(-160.0f), x);  // the second where it is NaN
  const V n = Isa::round(x);
  const V f = Isa::sub(x, n);
  V p = Isa::set1(1.5337576e-4f);
  p = Isa::fma(p, f, Isa::set1(1.3399860e-3f));
  p = Isa::fma(p, f, Isa::set1(9.6185195e-3f));
  p = Isa::fma(p, f, Isa::set1(5.5503290e-2f));
  p = Isa::fma(p, f, Isa::set1(2.4022647e-1f));
  p = Isa::fma(p, f, Isa::set1(6.9314721e-1f));
  p = Isa::fma(p, f, Isa::set1(1.0f));
  return Isa::scale_by_power(p, n);
}

// The largest score so far, the sum of 2**(score - top), and what older sums are multiplied by.
struct Softmax {
  float* top;           // [rows]
  float* total;         // [rows]
  float* alpha;         // [rows]
  const int32_t* limit;  // [rows] one past the last visible key, local slots
};

// Scores [num_keys, ld] of keys from `first_key` on, in place to probabilities relative to the new
// top, for the kLanes rows from `m` on. `factor` turns dot products into base-2 scores.
template <class Isa, bool kIsMasked>
void softmax_lanes(
    float* scores, int64_t ld, int64_t num_keys, int64_t first_key, float factor, int64_t m,
    const Softmax& s) {
  using V = typename Isa::V;
  const V factors = Isa::set1(factor);
  float* column = scores + m;
  V top = Isa::load(s.top + m);
  const V before = top;
  for (int64_t k = 0; k < num_keys; ++k) {
    V x = Isa::mul(Isa::load(column + k * ld), factors);
    if (kIsMasked) x = Isa::mask_from(x, static_cast<int32_t>(first_key + k), s.limit + m);
    Isa::store(column + k * ld, x);
    top = Isa::max(top, x);
  }
  const V base = Isa::finite(top);  // no key yet: avoid inf - inf
  const V alpha = exp2_lanes<Isa>(Isa::sub(before, base));
  V sum0 = Isa::zero(), sum1 = Isa::zero();
  int64_t k = 0;
  for (; k + 1 < num_keys; k += 2) {
    const V p0 = exp2_lanes<Isa>(Isa::sub(Isa::load(column + k * ld), base));
    const V p1 = exp2_lanes<Isa>(Isa::sub(Isa::load(column + (k + 1) * ld), base));
    Isa::store(column + k * ld, p0);
    Isa::store(column + (k + 1) * ld, p1);
    sum0 = Isa::add(sum0, p0);
    sum1 = Isa::add(sum1, p1);
  }
  for (; k < num_keys; ++k) {
    const V p = exp2_lanes<Isa>(Isa::sub(Isa::load(column + k * ld), base));
    Isa::store(column + k * ld, p);
    sum0 = Isa::add(sum0, p);
  }
  Isa::store(s.top + m, top);
  Isa::store(s.alpha + m, alpha);
  Isa::store(s.total + m, Isa::fma(Isa::load(s.total + m), alpha, Isa::add(sum0, sum1)));
}

}  // namespace
}  // namespace mla
