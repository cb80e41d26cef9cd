// Decode for processors with AVX512-BF16: bfloat16 rows are multiplied as they are.
#include "isa_avx512bf16.h"

#include "decode_impl.h"
#include "peak.h"

namespace mla {
namespace {

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
