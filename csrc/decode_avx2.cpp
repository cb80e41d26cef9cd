// Decode for processors with AVX2.
#include "isa_avx2.h"

#include "decode_impl.h"

namespace mla {

const DecodeKernels kDecodeAvx2 = {
    "avx2",
    kBlockKeys,
    Avx2::kLanes,
    scratch_bytes<Avx2, Float32Dot<Avx2>>,
    run_task<Avx2, Float32Dot<Avx2>>,
    merge_splits<Avx2>};

}  // namespace mla
