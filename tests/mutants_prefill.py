"""Breaks of the prefill kernels; the tests that must notice run in the interpreter."""

from tools.mutants import Mutant

PREFILL = "tests/kernels/test_triton_prefill.py"


def _break(name: str, file: str, original: str, broken: str, *tests: str) -> Mutant:
    named = tuple(f"{PREFILL}::{test}" for test in tests)
    return Mutant(name, f"mla/kernels/{file}", original, broken, named, interpreter=True)


MUTANTS: list[Mutant] = [
    _break(
        "prefill-sees-the-next-key",
        "prefill.py",
        "is_seen_LS = (first + s)[None, :] < limit_L[:, None]",
        "is_seen_LS = (first + s)[None, :] <= limit_L[:, None]",
        "test_matches_the_oracle",
        "test_a_key_changes_nothing_before_it",
    ),
    _break(
        "prefill-forgets-base-2",
        "prefill.py",
        "log2_scale = scale * LOG2_E",
        "log2_scale = scale",
        "test_matches_the_oracle",
    ),
    _break(
        "prefill-keeps-an-old-sum",
        "prefill.py",
        "total = total * decay + tl.sum(weights_LS, axis=1)",
        "total = total + tl.sum(weights_LS, axis=1)",
        "test_matches_the_oracle",
    ),
    _break(
        "prefill-keeps-old-values",
        "prefill.py",
        "decayed += (acc[i] * decay[:, None],)",
        "decayed += (acc[i],)",
        "test_matches_the_oracle",
    ),
    _break(
        "prefill-lse-in-base-2",
        "prefill.py",
        'lse = tl.where(total == 0.0, float("-inf"), (top + tl.log2(safe_total)) * LN_2)',
        'lse = tl.where(total == 0.0, float("-inf"), top + tl.log2(safe_total))',
        "test_matches_the_oracle",
    ),
    _break(
        "prefill-values-of-the-first-head",
        "prefill.py",
        "kv_base = kv_ptr + k_begin * kv_stride + head * (N + V)",
        "kv_base = kv_ptr + k_begin * kv_stride",
        "test_matches_the_oracle",
    ),
    _break(
        "prefill-one-key-too-many",
        "prefill_tiles.py",
        "limit_L = tl.minimum(tl.maximum(past + l + 1, 0), k_count)",
        "limit_L = tl.minimum(tl.maximum(past + l + 2, 0), k_count)",
        "test_matches_the_oracle",
    ),
    _break(
        "prefill-leaves-the-mask-out-too-early",
        "prefill_tiles.py",
        "whole = tl.maximum(past + l_begin + 1, 0)",
        "whole = tl.maximum(past + l_begin + BLOCK_L, 0)",
        "test_matches_the_oracle",
    ),
    _break(
        "prefill-leaves-the-mask-out-at-the-end",
        "prefill_tiles.py",
        "whole = k_count",
        "whole = k_count + BLOCK_S - 1",
        "test_matches_the_oracle",
    ),
    _break(
        "prefill-loses-the-diagonal",
        "prefill_tiles.py",
        "end = tl.minimum(tl.maximum(past + l_begin + BLOCK_L, 0), k_count)",
        "end = tl.minimum(tl.maximum(past + l_begin, 0), k_count)",
        "test_matches_the_oracle",
    ),
    _break(
        "prefill-ends-early",
        "prefill_tiles.py",
        "end = S",
        "end = S - 1",
        "test_bounds_that_are_not_given",
    ),
    _break(
        "prefill-starts-late",
        "prefill_tiles.py",
        "start = 0",
        "start = 1",
        "test_bounds_that_are_not_given",
    ),
    _break(
        "prefill-gradient-without-scale",
        "prefill_tiles.py",
        "rope += (tiles[num_parts(N) + i] * scale,)",
        "rope += (tiles[num_parts(N) + i],)",
        "test_gradients_match_the_oracle",
    ),
    _break(
        "prefill-gradient-of-lse-with-the-wrong-sign",
        "prefill_backward.py",
        "delta_T -= tl.load(d_lse_ptr + t * H + head, mask=is_row_T, other=0.0).to(tl.float32)",
        "delta_T += tl.load(d_lse_ptr + t * H + head, mask=is_row_T, other=0.0).to(tl.float32)",
        "test_gradients_match_the_oracle",
    ),
    _break(
        "prefill-rotated-key-of-the-first-head",
        "prefill_backward.py",
        "d_k_rope += d_rope.sum(1)",
        "d_k_rope += d_rope[:, 0]",
        "test_gradients_match_the_oracle",
    ),
    _break(
        "prefill-gradient-of-the-last-heads",
        "prefill_backward.py",
        "d_latent += d_rows @ weight.flatten(0, 1)",
        "d_latent = d_rows @ weight.flatten(0, 1)",
        "test_groups_of_heads_change_no_bit_of_the_forward_pass",
    ),
    _break(
        "prefill-gradient-of-what-is-not-seen",
        "prefill_backward.py",
        "if seen is not None:  # 0 times NaN is NaN: it must not reach the gradient of the weight",
        "if seen is None:",
        "test_gradients_match_the_oracle",
    ),
    _break(
        "prefill-weights-in-base-2",
        "prefill_backward.py",
        'log2_lse_T = tl.where(is_row_T, lse_T * LOG2_E, float("inf"))',
        'log2_lse_T = tl.where(is_row_T, lse_T, float("inf"))',
        "test_gradients_match_the_oracle",
    ),
    _break(
        "prefill-keys-forget-their-own-query",
        "prefill_backward_keys.py",
        "weights_SL = tl.where(key_S[:, None] <= (past + l)[None, :], weights_SL, 0.0)",
        "weights_SL = tl.where(key_S[:, None] < (past + l)[None, :], weights_SL, 0.0)",
        "test_gradients_match_the_oracle",
    ),
    _break(
        "prefill-keys-forget-delta",
        "prefill_backward_keys.py",
        "d_scores_SL = (weights_SL * (d_weights_SL - delta[None, :])).to(dtype).to(dot_dtype)",
        "d_scores_SL = (weights_SL * d_weights_SL).to(dtype).to(dot_dtype)",
        "test_gradients_match_the_oracle",
    ),
    _break(
        "prefill-keys-leave-the-mask-out-too-early",
        "prefill_backward_keys.py",
        "whole = tl.maximum(s_begin + BLOCK_S - 1 - past, 0)",
        "whole = tl.maximum(s_begin - past, 0)",
        "test_gradients_match_the_oracle",
    ),
    _break(
        "prefill-keys-begin-late",
        "prefill_backward_keys.py",
        "begin = tl.maximum(s_begin - past, 0) // BLOCK_L * BLOCK_L",
        "begin = tl.maximum(s_begin - past + BLOCK_L, 0) // BLOCK_L * BLOCK_L",
        "test_gradients_match_the_oracle",
    ),
    _break(
        "prefill-queries-see-the-next-key",
        "prefill_backward_queries.py",
        "is_seen_LS = (first + s)[None, :] < limit_L[:, None]",
        "is_seen_LS = (first + s)[None, :] <= limit_L[:, None]",
        "test_gradients_match_the_oracle",
    ),
    _break(
        "prefill-queries-forget-delta",
        "prefill_backward_queries.py",
        "d_scores_LS = (weights_LS * (d_weights_LS - delta_L[:, None])).to(dtype).to(dot_dtype)",
        "d_scores_LS = (weights_LS * d_weights_LS).to(dtype).to(dot_dtype)",
        "test_gradients_match_the_oracle",
    ),
    _break(
        "prefill-heads-of-a-group-overlap",
        "prefill_operands.py",
        "yield slice(first, min(first + size, H))",
        "yield slice(first, min(first + size, H - 1))",
        "test_groups_of_heads_change_no_bit_of_the_forward_pass",
    ),
    _break(
        "expand-reads-behind-the-row",
        "expand.py",
        "inside = (first_c + c < C)[None, :]",
        "inside = (first_c + c <= C)[None, :]",
        "test_matches_the_oracle",
    ),
]
