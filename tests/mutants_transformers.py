"""Breaks of coded caches and continuous batching in transformers."""

from tools.mutants import Mutant

PACKAGE = "mla/integrations/transformers"
CODECS = "tests/test_transformers_codecs.py"
BATCHING = "tests/test_transformers_batching.py"
PAGED = "tests/test_transformers_paged.py"
ALONE = f"{PAGED}::test_every_request_is_attended_to_alone"


def _break(name: str, file: str, original: str, broken: str, *tests: str) -> Mutant:
    return Mutant(f"transformers-{name}", f"{PACKAGE}/{file}", original, broken, tests)


MUTANTS: list[Mutant] = [
    _break(
        "expands-a-chunk-from-its-coded-rows",
        "attend.py",
        "latent = held.latent.index_copy(1, positions, latent)",
        "latent = held.latent",
        f"{CODECS}::test_chunked_prefill",
    ),
    _break(
        "puts-a-chunk-at-the-first-positions",
        "attend.py",
        "begin = (self.stored.lengths[:1] - L).long()  # the same in all rows",
        "begin = (self.stored.lengths[:1] * 0).long()",
        f"{CODECS}::test_chunked_prefill",
    ),
    _break(
        "decodes-padding-of-coded-rows",
        "attend.py",
        "return replace(self.stored, lengths=lengths, starts=starts, max_length=runs.num_keys)",
        "return replace(self.stored, lengths=lengths, starts=None, max_length=runs.num_keys)",
        f"{CODECS}::test_left_padded_batch",
    ),
    _break(
        "lets-gradients-end-in-coded-rows",
        "coded.py",
        "if torch.is_grad_enabled() and (latent.requires_grad or k_rope.requires_grad):",
        "if latent.dtype == k_rope.dtype == torch.uint8:",
        f"{CODECS}::test_a_gradient_through_coded_rows_is_refused",
    ),
    _break(
        "counts-static-tokens-too-late",
        "caches.py",
        "lengths, capacity = self._lengths(), self.max_cache_len",
        "lengths, capacity = self._lengths() - 1, self.max_cache_len",
        f"{CODECS}::test_static_cache",
    ),
    _break(
        "caches-plain-rows-in-spite-of-a-codec",
        "replace.py",
        "hold_latents_(cache, self.codec, self.layers)",
        "hold_latents_(cache)",
        f"{CODECS}::test_greedy_from_every_codec",
    ),
    _break(
        "batch-writes-a-slot-late",
        "paged.py",
        "(share.pages[position // Z], position % Z + 1)",
        "(share.pages[position // Z], max(position % Z, 1))",
        ALONE,
    ),
    _break(
        "batch-reads-pages-of-another-layer",
        "paged.py",
        "place = allocator.layer_indices.index(layer_idx)",
        "place = 0",
        f"{BATCHING}::test_ragged_prompts",
    ),
    _break(
        "batch-takes-cached-prefixes-for-cold",
        "paged.py",
        "if past == 0:",
        "if past == 0 or new > 4:",
        ALONE,
    ),
    _break(
        "batch-forgets-where-a-chunk-begins",
        "paged.py",
        "held = mla_gather(view, 0, group.shares[0].past, dtype=query.dtype)",
        "held = mla_gather(view, 0, 1, dtype=query.dtype)",
        ALONE,
    ),
    _break(
        "batch-goes-on-with-the-requests-before",
        "paged.py",
        "if write_index is not self._prepared:",
        "if self._prepared is None:",
        f"{BATCHING}::test_ragged_prompts",
    ),
    _break(
        "batch-copies-what-it-could-read",
        "paged.py",
        "elif should_absorb(new, past + new, config):",
        "elif config is None:",
        f"{BATCHING}::test_decoding_reads_the_pool_in_place",
    ),
    _break(
        "pool-has-a-row-for-each-head",
        "continuous.py",
        "config.num_key_value_heads, config.head_dim = 1, num_bytes // halves",
        "config.head_dim = num_bytes // halves",
        f"{BATCHING}::test_ragged_prompts",
    ),
    _break(
        "pool-cuts-odd-rows",
        "continuous.py",
        "if num_bytes % halves:",
        "if num_bytes % model.dtype.itemsize:",
        f"{BATCHING}::test_rows_of_odd_width_have_no_halves",
    ),
    _break(
        "batches-layers-with-a-window",
        "continuous.py",
        'if found != set(range(text.num_hidden_layers)) or kinds != {"full_attention"}:',
        "if found != set(range(text.num_hidden_layers)):",
        f"{BATCHING}::test_other_layers_are_refused",
    ),
]
