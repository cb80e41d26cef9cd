// Decode for processors with AVX512-BF16 and VNNI: int8 and int4 rows are multiplied as bytes,
// everything else as in decode_avx512bf16.cpp.
#include "decode_bytes.h"
#include "peak.h"

namespace mla {
namespace {

int64_t scratch(const DecodeParams& p, int64_t max_rows) {
  if (!DecodeBytes::can_run(p)) return kDecodeAvx512Bf16.scratch_bytes(p, max_rows);
  Arena arena{nullptr};
  DecodeBytes unused(p, max_rows, arena);
  return arena.used;
}

void run(
    const DecodeParams& p, const RowPlan& row, const Task& task, const Partials& out, char* memory) {
  if (!DecodeBytes::can_run(p)) return kDecodeAvx512Bf16.run(p, row, task, out, memory);
  Arena arena{memory};
  DecodeBytes decode(p, task.m1 - task.m0, arena);
  decode.run(decode, row, task, out);
}

int64_t peak(int64_t iterations, bool bf16) { return kDecodeAvx512Bf16.peak(iterations, bf16); }

void merge(
    const DecodeParams& p, const RowPlan& row, int64_t m0, int64_t m1, const Partials& parts) {
  kDecodeAvx512Bf16.merge(p, row, m0, m1, parts);
}

}  // namespace

const DecodeKernels kDecodeAvx512Vnni = {
    "avx512vnni", kBlockKeys, Avx512::kLanes, scratch, run, merge, peak};

}  // namespace mla
