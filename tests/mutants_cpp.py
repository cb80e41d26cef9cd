"""One-line breaks of the C++ kernels; the extension is built anew for each."""

from tools.mutants import Mutant

DECODE = "tests/test_cpp_decode.py"
OP = "tests/test_decode.py"
IMPL = "csrc/decode_impl.h"

# (name, file, the line, the broken line, the tests that must notice)
_BREAKS = [
    (
        "cpp-applies-no-mask",
        IMPL,
        "softmax_block(n, at, rows, ld, at + n > least);",
        "softmax_block(n, at, rows, ld, false);",
        (f"{DECODE}::test_matches_the_oracle",),
    ),
    (
        "cpp-forgets-the-scale",
        IMPL,
        "const float factor = p.scale * kLog2E;",
        "const float factor = kLog2E;",
        (f"{DECODE}::test_matches_the_oracle",),
    ),
    (
        "cpp-splits-share-a-key",
        IMPL,
        "end = end < row.end ? end : row.end;",
        "end = end < row.end ? end + 1 : row.end;",
        (f"{DECODE}::test_rows_read_in_place_match_the_oracle",),
    ),
    (
        "cpp-reverses-the-causal-order",
        IMPL,
        "const int64_t position = p.cache.lengths[row.b] - row.count + l + 1;",
        "const int64_t position = p.cache.lengths[row.b] - l;",
        (f"{DECODE}::test_matches_the_oracle",),
    ),
    (
        "cpp-offsets-of-32-bits",
        "csrc/params.h",
        "return rows + page_table[b * M + column] * page_stride + "
        "(slot - column * Z) * slot_stride;",
        "return rows + static_cast<int32_t>(page_table[b * M + column] * page_stride) + "
        "(slot - column * Z) * slot_stride;",
        (f"{OP}::test_offsets_beyond_2_to_the_31",),
    ),
    (
        "cpp-scales-every-group-by-the-first",
        "csrc/load_rows.h",
        "const float scale = scale_at(row, codec, g);",
        "const float scale = scale_at(row, codec, 0);",
        (f"{DECODE}::test_coded_rows_match_the_oracle",),
    ),
]
MUTANTS = [Mutant(*entry) for entry in _BREAKS]
