// Decode for any processor.
#include "isa_portable.h"

#include "decode_impl.h"
#include "peak.h"

namespace mla {
namespace {

int64_t peak(int64_t iterations, bool) { return run_peak<Portable, Float32Dot<Portable>>(iterations); }

}  // namespace

const DecodeKernels kDecodePortable = {
    "portable",
    kBlockKeys,
    Portable::kLanes,
    scratch_bytes<Portable, Float32Dot<Portable>>,
    run_task<Portable, Float32Dot<Portable>>,
    merge_splits<Portable>,
    peak};

}  // namespace mla
