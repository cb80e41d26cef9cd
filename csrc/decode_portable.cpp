// Decode for any processor.
#include "isa_portable.h"

#include "decode_impl.h"

namespace mla {

const DecodeKernels kDecodePortable = {
    "portable",
    kBlockKeys,
    Portable::kLanes,
    scratch_bytes<Portable, Float32Dot<Portable>>,
    run_task<Portable, Float32Dot<Portable>>,
    merge_splits<Portable>};

}  // namespace mla
