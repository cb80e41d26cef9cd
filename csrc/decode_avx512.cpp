// Decode for processors with AVX-512.
#include "isa_avx512.h"

#include "decode_impl.h"

namespace mla {

const DecodeKernels kDecodeAvx512 = {
    "avx512",
    kBlockKeys,
    Avx512::kLanes,
    scratch_bytes<Avx512, Float32Dot<Avx512>>,
    run_task<Avx512, Float32Dot<Avx512>>,
    merge_splits<Avx512>};

}  // namespace mla
