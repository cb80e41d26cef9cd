"""Breaks of context parallelism: ranks that attend to too much, too little, or out of order."""

from tools.mutants import Mutant

CONTEXT, LAYER = "mla/parallel/context.py", "mla/parallel/context_layer.py"
SEQUENCE, TRAFFIC = "mla/parallel/sequence.py", "mla/parallel/traffic.py"
PAGED, BATCH = "mla/cache/paged.py", "mla/cache/batch.py"
DECODES = "tests/parallel/test_context.py::test_decode_matches_the_oracle"
PREFILLS = "tests/parallel/test_context.py::test_prefill_and_gradients_match_the_oracle"
LAYERS = "tests/parallel/test_context_layer.py::test_the_layer_is_that_of_one_process"
BYTES = "tests/parallel/test_context_layer.py::test_bytes_of_a_layer_are_those_of_the_formulas"
CACHE = "tests/parallel/test_context_cache.py"
ORDER = "tests/parallel/test_sequence.py"
COUNTED = "tests/parallel/test_traffic.py::test_bytes_are_those_of_the_formulas"

# (name, file, the line, the broken line, the tests that must notice)
_BREAKS = [
    (
        "context-merges-without-weights",
        CONTEXT,
        "packed = torch.cat([out, lse[..., None]], dim=-1)",
        "packed = torch.cat([out, 0 * lse[..., None].nan_to_num(0, 0, 0)], dim=-1)",
        (DECODES,),
    ),
    (
        "context-takes-the-pages-of-the-first-rank",
        CONTEXT,
        "view, rows=rows, page_table=padded[:, index::count].contiguous(), shard=shard",
        "view, rows=rows, page_table=padded[:, ::count].contiguous(), shard=shard",
        (f"{CACHE}::test_pages_are_cut_out_of_a_dense_cache",),
    ),
    (
        "context-late-chunk-sees-one-chunk-too-few",
        CONTEXT,
        "((index + 1) * size, (2 * count - index) * size),",
        "((index + 1) * size, (2 * count - index - 1) * size),",
        (PREFILLS,),
    ),
    (
        "context-sums-no-gradients",
        CONTEXT,
        "dist.all_reduce(flat, group=members)",
        "pass",
        (LAYERS,),
    ),
    (
        "context-layer-counts-positions-from-zero",
        LAYER,
        "positions = zigzag_positions(length, shard, device=hidden_states.device)",
        "positions = zigzag_positions(length, (0, 1), device=hidden_states.device)[: length // "
        "shard[1]]",
        (LAYERS,),
    ),
    (
        "context-layer-caches-its-own-tokens-only",
        LAYER,
        "count = shard_of(self._context_group)[1] if is_empty else 1",
        "count = 1",
        (BYTES,),
    ),
    (
        "sequence-second-halves-in-the-order-of-ranks",
        SEQUENCE,
        "whole = torch.cat([chunks[:, 0], chunks[:, 1].flip(0)]).flatten(0, 1)",
        "whole = torch.cat([chunks[:, 0], chunks[:, 1]]).flatten(0, 1)",
        (f"{ORDER}::test_ranks_gather_the_whole_and_add_up_its_gradients", PREFILLS),
    ),
    (
        "sequence-keeps-its-own-gradient-only",
        SEQUENCE,
        'scattered = ops.reduce_scatter_tensor(grad.contiguous(), "sum", size, name)',
        "scattered = grad.chunk(size)[ctx.members.rank()].clone()",
        (f"{ORDER}::test_ranks_gather_the_whole_and_add_up_its_gradients",),
    ),
    (
        "sequence-leaves-padding-filled",
        SEQUENCE,
        "return part.masked_fill(is_padding.view(-1, *[1] * (x.ndim - dim - 1)), 0)",
        "return part",
        (f"{ORDER}::test_shards_are_padded_with_zeros",),
    ),
    (
        "traffic-counts-an-all-reduce-once",
        TRAFFIC,
        "return 2 * (size - 1) * given // size",
        "return (size - 1) * given // size",
        (COUNTED,),
    ),
    (
        "traffic-ignores-what-it-does-not-know",
        TRAFFIC,
        "if kind is None:",
        "if kind is None and (kind := 'broadcast') is None:",
        (COUNTED,),
    ),
    (
        "paged-shards-think-they-are-whole",
        BATCH,
        "shard=self.pool.shard,",
        "shard=(0, 1),",
        (f"{CACHE}::test_shards_hold_what_one_pool_holds",),
    ),
    (
        "paged-shard-counts-columns-of-a-whole-pool",
        PAGED,
        "self.span = page_size * shard[1]  # positions of a page of every shard: one column of "
        "tables",
        "self.span = page_size",
        (f"{CACHE}::test_each_rank_takes_its_part_of_the_memory",),
    ),
]

MUTANTS = [Mutant(*entry) for entry in _BREAKS]
