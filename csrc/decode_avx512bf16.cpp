// Decode for processors with AVX512-BF16: bfloat16 rows are multiplied as they are.
#include "isa_avx512.h"

#include "decode_impl.h"
#include "peak.h"

namespace mla {
namespace {

struct Avx512Bf16 : Avx512 {
  static void store_bf16(uint16_t* p, V x) {  // flushes subnormals, which is no loss here
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
  }
  // Nearest bfloat16 of two vectors, side by side in 32-bit lanes.
  static void store_pairs(uint32_t* p, V even, V odd) {
    const __m256i low = (__m256i)_mm512_cvtneps_pbh(even);
    const __m256i high = (__m256i)_mm512_cvtneps_pbh(odd);
    const __m512i both = _mm512_or_si512(
        _mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
    _mm512_storeu_si512(p, both);
  }
  // 16 values of two rows to 16 pairs.
  static void interleave(const char* even, const char* odd, char* to) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(even));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd));
    const __m512i both = _mm512_or_si512(
        _mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
    _mm512_storeu_si512(to, both);
  }
};

struct Bf16Dot {
  static constexpr bool kIsBf16 = true;
  static __m512 dot(__m512 sum, __m512 a, __m512 b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};

// Products of bfloat16 where nothing else is stored or asked for; coded rows fit it exactly.
bool multiplies_bf16(const DecodeParams& p) {
  const bool is_coded = p.cache.codec.kind != CodecKind::kPlain;
  return p.q_dtype == Dtype::kBFloat16 && (is_coded || p.cache.dtype == Dtype::kBFloat16);
}

int64_t scratch(const DecodeParams& p, int64_t max_rows) {
  return multiplies_bf16(p) ? scratch_bytes<Avx512Bf16, Bf16Dot>(p, max_rows)
                            : scratch_bytes<Avx512, Float32Dot<Avx512>>(p, max_rows);
}

void run(
    const DecodeParams& p, const RowPlan& row, const Task& task, const Partials& out, char* memory) {
  if (multiplies_bf16(p)) {
    run_task<Avx512Bf16, Bf16Dot>(p, row, task, out, memory);
  } else {
    run_task<Avx512, Float32Dot<Avx512>>(p, row, task, out, memory);
  }
}

int64_t peak(int64_t iterations, bool bf16) {
  return bf16 ? run_peak<Avx512Bf16, Bf16Dot>(iterations)
              : run_peak<Avx512, Float32Dot<Avx512>>(iterations);
}

}  // namespace

const DecodeKernels kDecodeAvx512Bf16 = {
    "avx512bf16", kBlockKeys, Avx512::kLanes, scratch, run, merge_splits<Avx512>,
    peak};

}  // namespace mla
