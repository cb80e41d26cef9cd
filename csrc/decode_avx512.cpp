// Decode for processors with AVX-512.
#include "isa_avx512.h"

#include "decode_impl.h"
#include "peak.h"

namespace mla {
namespace {

int64_t peak(int64_t iterations, bool) { return run_peak<Avx512, Float32Dot<Avx512>>(iterations); }

}  // namespace

const DecodeKernels kDecodeAvx512 = {
    "avx512",
    kBlockKeys,
    Avx512::kLanes,
    scratch_bytes<Avx512, Float32Dot<Avx512>>,
    run_task<Avx512, Float32Dot<Avx512>>,
    merge_splits<Avx512>,
    peak};

}  // namespace mla
