// Decode for processors with AVX2.
#include "isa_avx2.h"

#include "decode_impl.h"
#include "peak.h"

namespace mla {
namespace {

int64_t peak(int64_t iterations, bool) { return run_peak<Avx2, Float32Dot<Avx2>>(iterations); }

}  // namespace

const DecodeKernels kDecodeAvx2 = {
    "avx2",
    kBlockKeys,
    Avx2::kLanes,
    scratch_bytes<Avx2, Float32Dot<Avx2>>,
    run_task<Avx2, Float32Dot<Avx2>>,
    merge_splits<Avx2>,
    peak};

}  // namespace mla
