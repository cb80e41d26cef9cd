"""One-line breaks of the lower layers: codecs, views, ops, their plain PyTorch code, the cache."""

from tools.mutants import Mutant

DECODE = "tests/test_decode.py"
INSIDE = "tests/test_eager_decode.py"
PREFILL = "tests/test_prefill.py"
APPEND = "tests/test_append.py"
CODEC = "tests/test_codec.py"
MERGE = "tests/test_merge.py"
CACHE = "tests/test_cache.py"
VIEW = "tests/test_view.py"
EAGER = "mla/kernels/eager"

# (name, file, the line, the broken line, the tests that must notice)
_BREAKS = [
    (
        "decode-applies-no-mask",
        f"{EAGER}/decode.py",
        'scores = scores.masked_fill_(~seen[:, :, None], float("-inf"))',
        "pass",
        (f"{DECODE}::test_a_changed_token_leaves_earlier_queries_bit_for_bit",),
    ),
    (
        "decode-sees-one-key-too-few",
        f"{EAGER}/decode.py",
        "ends = tuple(local_count(view, length - count + i + 1) for i in range(count))",
        "ends = tuple(local_count(view, length - count + i) for i in range(count))",
        (f"{DECODE}::test_matches_the_oracle",),
    ),
    (
        "decode-forgets-the-scale",
        f"{EAGER}/decode.py",
        "scores = scores.mul_(scale).unflatten(1, (L, H))",
        "scores = scores.unflatten(1, (L, H))",
        (f"{DECODE}::test_scale_multiplies_both_halves_of_the_query",),
    ),
    (
        "decode-weighs-chunks-without-their-sums",
        f"{EAGER}/decode.py",
        "weight = torch.exp(top - highest) * total",
        "weight = torch.exp(top - highest)",
        (f"{INSIDE}::test_chunks_give_what_one_product_gives",),
    ),
    (
        "decode-drops-the-key-at-a-chunk-boundary",
        f"{EAGER}/decode.py",
        "yield partial(query, rows[:, first : first + size].to(query.dtype), C, scale)",
        "yield partial(query, rows[:, first : first + size - 1].to(query.dtype), C, scale)",
        (f"{INSIDE}::test_chunks_give_what_one_product_gives",),
    ),
    (
        "decode-ignores-left-padding",
        f"{EAGER}/decode.py",
        "yield Run(b0, b, local_count(view, start), ends)",
        "yield Run(b0, b, 0, ends)",
        (f"{DECODE}::test_left_padding_may_end_inside_a_page",),
    ),
    (
        "decode-lets-missing-queries-see-keys",
        f"{EAGER}/decode.py",
        "seen = stored[:, None] & (positions <= last[..., None]) "
        "& (token < count[:, None])[..., None]",
        "seen = stored[:, None] & (positions <= last[..., None])",
        (f"{DECODE}::test_queries_without_keys_give_zero_and_minus_inf",),
    ),
    (
        "decode-leaves-the-output-rotated",
        f"{EAGER}/decode.py",
        "out = rotate_latent(out)",
        "pass",
        (f"{DECODE}::test_coded_rows_match_the_oracle",),
    ),
    (
        "merge-weighs-nan-by-zero",
        f"{EAGER}/decode.py",
        "used = torch.where((weight == 0)[..., None], torch.zeros_like(out), out)",
        "used = out",
        (f"{MERGE}::test_empty_parts_are_inert",),
    ),
    (
        "merge-in-base-2",
        f"{EAGER}/decode.py",
        "return (share[..., None] * used).sum(0), highest + torch.log(total)",
        "return (share[..., None] * used).sum(0), highest + torch.log2(total)",
        (f"{MERGE}::test_splits_of_the_keys_merge_to_the_whole",),
    ),
    (
        "merge-gradient-forgets-the-mean",
        "mla/ops/merge.py",
        "along = (grad_out * (used - out)).sum(-1)",
        "along = (grad_out * used).sum(-1)",
        (f"{MERGE}::test_gradients",),
    ),
    (
        "masked-rows-keep-nan",
        f"{EAGER}/rows.py",
        "rows = view.codec.decode(rows, view.C, view.R, dtype)"
        ".masked_fill(~stored[..., None], 0.0)",
        "rows = view.codec.decode(rows, view.C, view.R, dtype)",
        (f"{DECODE}::test_matches_the_oracle",),
    ),
    (
        "masked-rows-forget-left-padding",
        f"{EAGER}/rows.py",
        "stored = stored & (positions >= view.starts[:, None])",
        "pass",
        (f"{INSIDE}::test_masked_rows_are_zero_where_nothing_is_stored",),
    ),
    (
        "fetch-begins-at-the-page",
        f"{EAGER}/rows.py",
        "stored = view.rows[pages].flatten(1, 2)[:, begin - first * Z : end - first * Z]",
        "stored = view.rows[pages].flatten(1, 2)[:, : end - begin]",
        (f"{DECODE}::test_left_padding_may_end_inside_a_page",),
    ),
    (
        "shard-counts-pages-of-others",
        f"{EAGER}/rows.py",
        "return cycles * Z + min(max(rest - index * Z, 0), Z)",
        "return cycles * Z + min(rest, Z)",
        (f"{INSIDE}::test_local_count_counts_the_positions_of_a_shard",),
    ),
    (
        "append-writes-positions-of-other-shards",
        f"{EAGER}/rows.py",
        "valid = (token < count[:, None]) & (column % num_shards == index)",
        "valid = token < count[:, None]",
        (f"{APPEND}::test_rows_land_in_their_places_and_nothing_else_changes",),
    ),
    (
        "append-wraps-around-to-the-last-page",
        f"{EAGER}/rows.py",
        "_check_pages(view, page[valid])",
        "pass",
        (f"{APPEND}::test_a_bad_page_is_found_before_anything_is_written",),
    ),
    (
        "fused-append-forgets-the-latent-scale",
        f"{EAGER}/rows.py",
        "latent = latent * latent_scale if latent_scale != 1.0 else latent.clone()",
        "latent = latent.clone()",
        (f"{APPEND}::test_fused_append_is_norm_rotation_and_append",),
    ),
    (
        "codec-takes-the-scale-of-another-group",
        "mla/codec.py",
        "per_value = scales[..., : at.num_groups].repeat_interleave(self.group, dim=-1)[..., :C]",
        "per_value = scales[..., :1].expand(*scales.shape[:-1], C)",
        (f"{CODEC}::test_decode_reads_the_documented_layout",),
    ),
    (
        "codec-swaps-the-nibbles",
        "mla/codec.py",
        "return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)",
        "return nibbles[..., 1::2] | (nibbles[..., 0::2] << 4)",
        (f"{CODEC}::test_int4_nibbles_even_values_low",),
    ),
    (
        "codec-forgets-the-scale-of-the-rope-part",
        "mla/codec.py",
        "rope_at = _align(scales_at + num_scales * self.scale_dtype.itemsize)",
        "rope_at = _align(scales_at + num_groups * self.scale_dtype.itemsize)",
        (f"{CODEC}::test_row_bytes_of_a_deepseek_layer",),
    ),
    (
        "codec-turns-infinity-into-a-number",
        "mla/codec.py",
        "return torch.where(scales.isinf(), scales, scales.clamp(max=largest))"
        ".to(self.scale_dtype)",
        "return scales.clamp(max=largest).to(self.scale_dtype)",
        (f"{CODEC}::test_nan_and_infinity_leave_nothing_that_looks_like_a_number",),
    ),
    (
        "codec-rounds-fp8-scales-down",
        "mla/codec.py",
        "return torch.exp2(torch.ceil(torch.log2((amax / 448).clamp(min=1e-4))))",
        "return torch.exp2(torch.floor(torch.log2((amax / 448).clamp(min=1e-4))))",
        (f"{CODEC}::test_fp8_row_is_that_of_deepseek_v3_2_byte_for_byte",),
    ),
    (
        "view-forgets-its-shard",
        "mla/view.py",
        "column = torch.arange(num_columns, device=device)[:, None] * count + index",
        "column = torch.arange(num_columns, device=device)[:, None] * count",
        (f"{VIEW}::test_positions_of_all_shards_are_all_positions",),
    ),
    (
        "prefill-lets-early-queries-see-the-first-key",
        f"{EAGER}/prefill.py",
        "q0 = max(q0, q1 - (k1 - k0))",
        "q1 = min(q1, q0 + k1 - k0)",
        (f"{PREFILL}::test_matches_the_oracle",),
    ),
    (
        "prefill-takes-keys-for-values",
        f"{EAGER}/prefill.py",
        "values[..., : sizes.V] = kv[..., sizes.N :].transpose(1, 2)",
        "values[..., : sizes.V] = kv[..., -1 - sizes.V : -1].transpose(1, 2)",
        (f"{PREFILL}::test_matches_the_oracle",),
    ),
    (
        "prefill-packs-keys-from-the-first-sequence",
        f"{EAGER}/prefill.py",
        "slice(0, 1), ends_q[i], ends_q[i + 1], ends_k[i], ends_k[i + 1], masking.causal",
        "slice(0, 1), ends_q[i], ends_q[i + 1], ends_k[0], ends_k[i + 1], masking.causal",
        (f"{PREFILL}::test_packed_sequences_are_sequences_alone",),
    ),
    (
        "prefill-gradient-of-lse-changes-sign",
        f"{EAGER}/prefill.py",
        "out[..., sizes.V] = -grad_lse.transpose(1, 2)",
        "out[..., sizes.V] = grad_lse.transpose(1, 2)",
        (f"{PREFILL}::test_gradcheck",),
    ),
    (
        "prefill-keeps-the-key-gradient-of-the-last-heads",
        f"{EAGER}/prefill.py",
        "d_k_rope[run.batch, run.keys] += dk[..., sizes.N :].sum(2, dtype=sum_dtype)",
        "d_k_rope[run.batch, run.keys] = dk[..., sizes.N :].sum(2, dtype=sum_dtype)",
        (f"{PREFILL}::test_groups_of_heads_and_blocks_of_queries_change_nothing",),
    ),
    (
        "prefill-reads-strided-queries-as-contiguous",
        f"{EAGER}/prefill.py",
        "return padded if padded.stride(-1) == 1 else padded.contiguous()",
        "return padded",
        (f"{PREFILL}::test_strides_do_not_matter",),
    ),
    (
        "blocked-attention-hides-the-own-key",
        f"{EAGER}/flash.py",
        "later = torch.arange(k.shape[2], device=q.device) > query[:, None]",
        "later = torch.arange(k.shape[2], device=q.device) >= query[:, None]",
        (f"{PREFILL}::test_matches_the_oracle",),
    ),
    (
        "blocked-gradient-forgets-the-scale",
        f"{EAGER}/flash.py",
        "d_scores = (weights * (d_weights - delta[:, :, block]) * scale).to(q.dtype)",
        "d_scores = (weights * (d_weights - delta[:, :, block])).to(q.dtype)",
        (f"{PREFILL}::test_gradcheck",),
    ),
    (
        "autocast-reaches-the-kernels",
        "mla/ops/library.py",
        "if not torch.is_autocast_enabled(device):",
        "if device:",
        (f"{DECODE}::test_autocast_does_not_reach_into_the_op",),
    ),
    (
        "append-drops-tokens-beyond-the-capacity",
        "mla/ops/append.py",
        "if low < 0 or high > view.capacity:",
        "if low < 0:",
        (f"{APPEND}::test_positions_outside_the_cache",),
    ),
    (
        "cache-counts-tokens-it-has-no-room-for",
        "mla/cache/base.py",
        "self._make_room(lengths)",
        "self._host_lengths = lengths; self._make_room(lengths)",
        (f"{CACHE}::TestCacheMachine", f"{CACHE}::test_full"),
    ),
    (
        "cache-reorders-rows-without-their-padding",
        "mla/cache/dense.py",
        "self._set_starts([self._host_starts[index] for index in indices])",
        "pass",
        (f"{CACHE}::TestCacheMachine",),
    ),
    (
        "cache-forgets-its-last-row-when-it-grows",
        "mla/cache/dense.py",
        "new[:, : self.max_length] = old[:, : self.max_length]",
        "new[:, : max(self.max_length - 1, 0)] = old[:, : max(self.max_length - 1, 0)]",
        (f"{CACHE}::test_growth_keeps_the_contents",),
    ),
]
MUTANTS = [Mutant(*entry) for entry in _BREAKS]
