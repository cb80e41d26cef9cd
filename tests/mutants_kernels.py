"""Breaks of the Triton kernels; the tests that must notice run in the interpreter."""

from mutants_prefill import MUTANTS as BREAKS_OF_PREFILL

from tools.mutants import Mutant

DECODE = "tests/kernels/test_triton_decode.py"
APPEND = "tests/kernels/test_triton_append.py"
MERGE = "tests/kernels/test_triton_merge.py"
TILES = "tests/kernels/test_triton_tiles.py"
SPLITS = "tests/kernels/test_triton_splits.py"
LAUNCH = "tests/kernels/test_launch.py"
BENCHMARKS = "tests/kernels/test_gpu_benchmarks.py"


def _break(name: str, file: str, original: str, broken: str, *tests: str) -> Mutant:
    return Mutant(name, file, original, broken, tests, interpreter=True)


MUTANTS: list[Mutant] = [
    *BREAKS_OF_PREFILL,
    _break(
        "decode-reads-behind-the-end",
        "mla/kernels/decode.py",
        "is_stored = slot < end",
        "is_stored = slot <= end",
        f"{DECODE}::test_matches_the_oracle",
    ),
    _break(
        "decode-weighs-masked-keys",
        "mla/kernels/decode.py",
        'scores = tl.where(is_seen, scores, float("-inf"))',
        "scores = tl.where(is_seen, scores, 0.0)",
        f"{DECODE}::test_matches_the_oracle",
    ),
    _break(
        "decode-forgets-the-causal-order",
        "mla/kernels/decode.py",
        "last = length - count + query + 1  # keys up to the query's own position",
        "last = length + query * 0",
        f"{DECODE}::test_later_keys_change_no_bit_of_earlier_queries",
    ),
    _break(
        "decode-counts-missing-queries",
        "mla/kernels/decode.py",
        "limit = tl.where(is_row & (query < count), limit, 0)",
        "limit = tl.where(is_row, limit, 0)",
        f"{DECODE}::test_matches_the_oracle",
    ),
    _break(
        "decode-leaves-the-scale-out",
        "mla/kernels/decode.py",
        "scores *= log2_scale",
        "scores *= LOG2_E",
        f"{DECODE}::test_matches_the_oracle",
    ),
    _break(
        "decode-scales-in-a-branch-alone",
        "mla/kernels/decode.py",
        'return scores + tl.dot(q, keys.T, input_precision="ieee") * log2_scale',
        'return scores + tl.dot(q, keys.T, input_precision="ieee")',
        f"{DECODE}::test_heads_and_tokens_fill_tiles_of_any_size",
    ),
    _break(
        "decode-32-bit-pages",
        "mla/kernels/decode.py",
        "offset = tl.cast(page, tl.int64) * page_stride + inside.to(tl.int64) * slot_stride",
        "offset = page * page_stride + inside * slot_stride",
        f"{DECODE}::test_pool_beyond_2_31_elements",
    ),
    _break(
        "decode-starts-late",
        "mla/kernels/decode.py",
        "begin = tl.maximum(begin, first // BLOCK_S * BLOCK_S)",
        "begin = tl.maximum(begin, first // BLOCK_S * BLOCK_S + BLOCK_S)",
        f"{DECODE}::test_matches_the_oracle",
    ),
    _break(
        "decode-keeps-an-old-maximum",
        "mla/kernels/decode.py",
        "total = total * alpha + tl.sum(p, axis=1)",
        "total = total + tl.sum(p, axis=1)",
        f"{DECODE}::test_matches_the_oracle",
    ),
    _break(
        "decode-lse-in-base-2",
        "mla/kernels/decode.py",
        'lse = tl.where(total == 0.0, float("-inf"), (top + tl.log2(safe)) * LN_2)',
        'lse = tl.where(total == 0.0, float("-inf"), top + tl.log2(safe))',
        f"{DECODE}::test_matches_the_oracle",
    ),
    _break(
        "decode-splits-by-capacity",
        "mla/kernels/decode.py",
        "size = split_size(local_length, SPLIT_KEYS, MAX_SPLITS, BLOCK_S)",
        "size = split_size(local_length, SPLIT_KEYS + num_splits, MAX_SPLITS, BLOCK_S)",
        f"{SPLITS}::test_splits_of_odd_sizes_match_the_oracle",
        f"{DECODE}::test_matches_the_oracle",
    ),
    _break(
        "decode-loses-the-last-keys-of-a-split",
        "mla/kernels/decode.py",
        "end = tl.minimum(begin + size, local_length)",
        "end = tl.minimum(begin + size - 1, local_length)",
        f"{DECODE}::test_matches_the_oracle",
    ),
    _break(
        "splits-overlap-no-tile",
        "mla/kernels/tiles.py",
        "return (size + BLOCK_S - 1) // BLOCK_S * BLOCK_S",
        "return size",
        f"{SPLITS}::test_splits_are_counted_alike_on_host_and_device",
        f"{SPLITS}::test_splits_of_odd_sizes_match_the_oracle",
    ),
    _break(
        "codes-have-no-sign",
        "mla/kernels/tiles.py",
        "high = (word.to(tl.int32, bitcast=True) >> 24).to(tl.float32) * scale",
        "high = (word >> 24).to(tl.float32) * scale",
        f"{TILES}::test_every_code_in_every_column",
    ),
    _break(
        "codes-of-odd-columns-lost",
        "mla/kernels/tiles.py",
        "mask = is_stored_S[:, None] & (j < (C + 3) // 4)[None, :]",
        "mask = is_stored_S[:, None] & (j < C // 4)[None, :]",
        f"{TILES}::test_every_code_in_every_column",
    ),
    _break(
        "codes-of-a-word-in-another-order",
        "mla/kernels/tiles.py",
        "n2, n3 = code_pair(word >> 8, scale_S1, KIND, dtype)",
        "n3, n2 = code_pair(word >> 8, scale_S1, KIND, dtype)",
        f"{TILES}::test_every_code_in_every_column",
    ),
    _break(
        "codes-lose-a-mantissa-bit",
        "mla/kernels/tiles.py",
        "low, high = float16_pair((word & 0x80008000) | ((word >> 1) & 0x3F803F80))",
        "low, high = float16_pair((word & 0x80008000) | ((word >> 1) & 0x3F003F00))",
        f"{TILES}::test_every_code_in_every_column",
    ),
    _break(
        "scales-of-the-other-half",
        "mla/kernels/tiles.py",
        "half = (word >> (16 * (g % 2))).to(tl.uint16)",
        "half = word.to(tl.uint16)",
        f"{DECODE}::test_matches_the_oracle_on_coded_rows",
    ),
    _break(
        "merge-weighs-parts-equally",
        "mla/kernels/merge.py",
        "weight_X = tl.exp(lse_X - top)",
        "weight_X = tl.where(lse_X > top - 1e30, 1.0, 0.0)",
        f"{MERGE}::test_matches_the_oracle",
    ),
    _break(
        "merge-reads-empty-parts",
        "mla/kernels/merge.py",
        "mask = (weight_X > 0.0)[:, None] & (c < C)[None, :]",
        "mask = (x < count)[:, None] & (c < C)[None, :]",
        f"{MERGE}::test_matches_the_oracle",
    ),
    _break(
        "merge-forgets-all-but-the-first-parts",
        "mla/kernels/merge.py",
        "for begin in range(0, count, BLOCK_X):",
        "for begin in range(0, 1, BLOCK_X):",
        f"{MERGE}::test_matches_the_oracle",
    ),
    _break(
        "append-truncates-codes",
        "mla/kernels/append.py",
        "return (x + ROUND) - ROUND",
        "return x.to(tl.int32).to(tl.float32)",
        f"{APPEND}::test_bytes_equal_those_of_plain_pytorch",
    ),
    _break(
        "append-writes-one-position-late",
        "mla/kernels/append.py",
        "position = tl.load(lengths_ptr + b) - count + token",
        "position = tl.load(lengths_ptr + b) - L + token",
        f"{APPEND}::test_bytes_equal_those_of_plain_pytorch",
    ),
    _break(
        "append-32-bit-pages",
        "mla/kernels/append.py",
        "page = tl.load(table_ptr + b * M + column // SHARDS).to(tl.int64)",
        "page = tl.load(table_ptr + b * M + column // SHARDS)",
        f"{APPEND}::test_pool_beyond_2_31_bytes",
    ),
    _break(
        "append-rounds-the-norm-away",
        "mla/kernels/append.py",
        "mean = tl.sum(x * x, axis=0) / C",
        "mean = tl.sum(x * x, axis=0) / BLOCK_C",
        f"{APPEND}::test_fused_form_normalises_and_rotates",
    ),
    _break(
        "kernels-run-on-the-current-device",
        "mla/kernels/launch.py",
        "with torch.cuda.device(device):",
        "if True:",
        f"{LAUNCH}::test_a_kernel_runs_on_the_device_of_its_tensors",
    ),
    _break(
        "baseline-forgets-a-split",
        "benchmarks/gpu_baseline.py",
        "size = tl.cdiv(tl.cdiv(length, NUM_SPLITS), BLOCK_S) * BLOCK_S",
        "size = length // NUM_SPLITS // BLOCK_S * BLOCK_S",
        f"{BENCHMARKS}::test_baseline_matches_the_oracle",
    ),
]
