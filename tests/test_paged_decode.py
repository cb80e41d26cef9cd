"""What is computed from a pool does not depend on where its pages lie or who else uses them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_lse_within_budget, assert_within_budget, make_view, poison_, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import SMALL, inputs, make_layer
from strategies import SEEDS
from test_cache import config
from torch import Tensor

from mla import DenseLatentCache, PagedLatentCache
from mla.cache import LatentCache, PagedBatch
from mla.codec import Codec, Fp8Codec, Int4Codec, Int8Codec, PlainCodec
from mla.ops import mla_decode, supported_impls
from mla.ops.decode import AttentionOutput
from mla.view import CacheView

F64 = torch.float64
CODECS: tuple[Codec, ...] = (PlainCodec(), Fp8Codec(), Int8Codec(), Int4Codec())
PLACES = st.fixed_dictionaries(
    {
        "length": st.integers(1, 40),
        "page_size": st.sampled_from([1, 3, 16]),
        "codec": st.sampled_from(CODECS),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
        "num_heads": st.sampled_from([3, 20]),
        "seed": SEEDS,
    }
)
C, R, L = 24, 6, 2


def write(pool: PagedLatentCache, sequence: int, rows: Tensor) -> None:
    """Append ``[S, C+R]`` rows in one step."""
    batch = pool.batch([sequence])
    batch.reserve(rows.shape[0])
    batch.append(0, rows[None, :, :C], rows[None, :, C:])


def placements(
    rows: Tensor, page_size: int, codec: Codec, seed: int, device: torch.device | str = "cpu"
) -> tuple[PagedLatentCache, list[int]]:
    """A pool that holds ``rows [S, C+R]`` in five ways, amid NaN: one sequence for each."""
    S, Z = rows.shape[0], page_size
    pool = PagedLatentCache(
        config(C, R),
        num_pages=10 * (S // Z + 2),
        page_size=Z,
        codec=codec,
        dtype=rows.dtype,
        device=device,
    )
    poison_(pool.rows(0))
    junk = torch.full_like(rows, float("nan"))
    ids = list(range(S))
    contiguous = pool.allocate(ids)
    write(pool, contiguous, rows)
    found = pool.allocate(ids)
    write(pool, found, rows[pool.length(found) :])
    copied = pool.fork(contiguous)
    pool.truncate(copied, S - 1 - (S - 1) % Z // 2)
    write(pool, copied, rows[pool.length(copied) :])
    others = [pool.allocate() for _ in range(4)]
    for other in others:
        write(pool, other, junk)
    pool.free(others[2], others[0])
    shuffled = pool.allocate()
    generator = torch.Generator().manual_seed(seed)
    while (begin := pool.length(shuffled)) < S:
        step = int(torch.randint(1, 2 * Z + 1, (), generator=generator))
        write(pool, shuffled, rows[begin : begin + step])
        write(pool, others[1], junk[:1])
    shared = pool.fork(shuffled)
    poison_free_memory(pool, [contiguous, found, copied, shuffled, shared])
    pool.check()
    return pool, [contiguous, found, copied, shuffled, shared]


def poison_free_memory(pool: PagedLatentCache, used: list[int]) -> None:
    """Everything but the positions of the sequences ``used`` becomes NaN."""
    kept = pool.rows(0).clone()
    poison_(pool.rows(0))
    Z = pool.page_size
    for sequence in used:
        for column, page in enumerate(pool._records[sequence].pages):
            end = min(Z, pool.length(sequence) - column * Z)
            pool.rows(0)[page, :end] = kept[page, :end]


def decode(query: Tensor, view: CacheView, impl: Any) -> AttentionOutput:
    B = view.batch_size
    query = query.expand(B, -1, -1, -1)
    return mla_decode(query[..., :C], query[..., C:], view, scale=0.2, impl=impl)


def same_wherever_it_lies(impl: Any, is_exact: bool, device: Any, **case: Any) -> None:
    S, dtype, codec = case["length"], case["dtype"], case["codec"]
    rows = randn(S, C + R, seed=case["seed"], dtype=dtype).to(device)
    query = randn(1, L, case["num_heads"], C + R, seed=case["seed"] + 1, dtype=dtype).to(device)
    pool, sequences = placements(rows, case["page_size"], codec, case["seed"], device)
    alone = [decode(query, pool.batch([s]).view(0), impl) for s in sequences]
    together = decode(query, pool.batch([None, *sequences, None]).view(0), impl)
    for i, one in enumerate(alone):
        for name in ("out", "lse"):
            for other in (getattr(together, name)[i + 1], getattr(alone[0], name)[0]):
                mine = getattr(one, name)[0]
                if is_exact:
                    assert torch.equal(mine, other), f"{name} of placement {i} has other bits"
                else:
                    loss = 4 * torch.finfo(mine.dtype).eps
                    # PyTorch's products may be rounded in another order beside other rows.
                    torch.testing.assert_close(mine, other, rtol=loss, atol=loss)
    # And they are right: the oracle is the plain code in float64 on the same stored rows.
    latent, k_rope = (x[None].double().cpu() for x in (rows[:, :C], rows[:, C:]))
    dense = make_view(latent, k_rope, [S], codec=codec, dtype=dtype)
    if isinstance(codec, PlainCodec):
        exact = make_view(latent, k_rope, [S], codec=codec, dtype=F64)
    else:
        exact = dense
    oracle = decode(query.double().cpu(), exact, "torch")
    plain = decode(query.cpu(), dense, "torch")
    assert_within_budget(alone[0].out.cpu(), oracle.out, plain.out, "out")
    assert_lse_within_budget(alone[0].lse.cpu(), oracle.lse, plain.lse)


IMPLS = [name for name, reason in supported_impls("mla_decode", device="cpu") if reason is None]


@pytest.mark.parametrize("impl", IMPLS)
@given(case=PLACES)
def test_output_is_the_same_wherever_the_pages_lie(impl, case):
    same_wherever_it_lies(impl, impl != "torch", "cpu", **case)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("codec", [PlainCodec(), Int8Codec()], ids=lambda codec: codec.kind)
def test_pool_beyond_2_31_elements(impl, codec):
    """The last page of a pool of which only a few pages are ever touched: 2 to 4 GiB reserved."""
    page_size, dtype = 4096, torch.bfloat16
    width = codec.row_width(C, R)
    num_pages = 2**31 // (page_size * width) + 4
    rows = randn(300, C + R, seed=1, dtype=dtype)
    query = randn(1, L, 3, C + R, seed=2, dtype=dtype)
    outputs = []
    for pages, taken in ((num_pages, num_pages - 2), (2, 0)):
        pool = PagedLatentCache(
            config(C, R), num_pages=pages, page_size=page_size, codec=codec, dtype=dtype
        )
        if taken:
            pool.batch([pool.allocate()]).reserve(taken * page_size)
        chat = pool.allocate()
        write(pool, chat, rows)
        copy = pool.fork(chat)
        write(pool, copy, rows[:1])  # copies the last page but one into the last
        batch = pool.batch([chat, copy])
        assert batch.page_table[:, 0].tolist() == [taken, taken + 1]
        outputs.append(decode(query, batch.view(0), impl))
    assert num_pages * page_size * width > 2**31
    for far, near in zip(*outputs, strict=True):
        assert torch.equal(far, near) and torch.isfinite(far).all()


def steps(
    cache: DenseLatentCache | PagedBatch, layers: Any, seed: int, longest_chunk: int
) -> list[Tensor]:
    """Ragged prefill, chunks, decoding and mixed steps, rows reordered, rolled back: outputs."""
    outputs = []
    for i, counts in enumerate(([5, 9, 2], 4, 1, 1, [1, 6, 2], [0, 1, 0], 3, longest_chunk, 1)):
        longest = counts if isinstance(counts, int) else max(counts)
        x = inputs(3, longest, seed + i)
        cache.reserve(counts)
        for layer in layers:
            x = x + layer(x, cache=cache)
        if i == 2:
            cache.reorder([2, 0, 2])
        if i == 4:
            cache.truncate([n - 3 for n in cache.lengths.tolist()])
        rows = [longest] * 3 if isinstance(counts, int) else counts
        outputs += [x[b, :n] for b, n in enumerate(rows)]
    return outputs


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.kind)
@settings(max_examples=4)
@given(page_size=st.sampled_from([1, 3, 16]), max_length=st.sampled_from([None, 60]), seed=SEEDS)
def test_the_layer_gives_what_a_dense_cache_gives(codec, page_size, max_length, seed):
    layers = [make_layer(SMALL, seed % 1000 + i, layer_idx=i) for i in range(2)]
    options: dict[str, Any] = {"num_layers": 2, "codec": codec, "dtype": F64}
    pool = PagedLatentCache(SMALL, num_pages=200, page_size=page_size, **options)
    for layer in range(2):
        poison_(pool.rows(layer))
    batch = pool.batch([pool.allocate() for _ in range(3)], max_length=max_length)
    dense = DenseLatentCache(SMALL, batch_size=3, **options)
    # A chunk that the layer expands sees its own latents before they are coded. A batch with
    # max_length never expands but for a cold start.
    longest_chunk = 30 if max_length is None else 2
    with torch.no_grad():
        caches = (batch, dense)
        outputs = [steps(cache, layers, seed, longest_chunk) for cache in caches]
        for actual, expected in zip(*outputs, strict=True):
            # Float64: sums in another order.
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    pool.check()


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.kind)
def test_a_prompt_found_in_the_pool_decodes_as_if_it_had_been_computed(codec):
    """Prompts of 13 tokens with 8 in common, computed in the steps that sharing leads to."""
    layers = [make_layer(SMALL, i, layer_idx=i) for i in range(2)]
    options: dict[str, Any] = {"num_layers": 2, "codec": codec, "dtype": F64}
    pool = PagedLatentCache(SMALL, num_pages=9, page_size=4, **options)
    table = inputs(1, 40, seed=7)[0]  # embeddings
    first, second = list(range(13)), [*range(8), *range(20, 25)]

    def run(tokens: list[int], cache: LatentCache) -> Tensor:
        x = table[tokens][None]
        for layer in layers:
            x = x + layer(x, cache=cache)
        return x

    with torch.no_grad():
        run(first, pool.batch([pool.allocate(first)]))
        chat = pool.allocate(second)
        assert pool.length(chat) == 8
        batch = pool.batch([chat])
        dense = DenseLatentCache(SMALL, batch_size=1, **options)
        run(second[:8], dense)
        for tokens in (second[8:], [30], [31], [32, 33]):
            # Float64: sums in another order.
            torch.testing.assert_close(run(tokens, batch), run(tokens, dense), rtol=1e-9, atol=1e-9)
    pool.check()


def test_right_padding_by_mask_and_left_padding_refused():
    layer = make_layer(SMALL, 3)
    pool = PagedLatentCache(SMALL, num_pages=9, page_size=4, dtype=F64)
    batch = pool.batch([pool.allocate(), pool.allocate()])
    mask = torch.tensor([[True] * 3, [True, True, False]])
    x = inputs(2, 3, seed=1)
    with torch.no_grad():
        out = layer(x, cache=batch, attn_mask=mask)
        torch.testing.assert_close(out[1, :2], layer(x[1:, :2])[0])
        assert batch.lengths.tolist() == [3, 2]
        batch.reset()
        with pytest.raises(ValueError, match="pad on the right"):
            layer(x, cache=batch, attn_mask=mask.flip(1))
    assert batch.lengths.tolist() == [0, 0]


def test_compiled_layers_decode_in_one_graph_whatever_happens_to_the_rows():
    """One for the cold step, one for all others: forks, rollbacks and idle rows included."""
    layers = [make_layer(SMALL, i, torch.float32, layer_idx=i) for i in range(2)]
    options: dict[str, Any] = {"num_layers": 2, "dtype": torch.float32}
    pool = PagedLatentCache(SMALL, num_pages=50, page_size=4, **options)
    ids = list(range(20))
    batch = pool.batch([pool.allocate(ids), pool.allocate()], max_length=40)
    graphs = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=count)
    def run(x: Tensor, cache: LatentCache) -> Tensor:
        for layer in layers:
            x = x + layer(x, cache=cache)
        return x

    with torch.no_grad():
        for step in range(12):
            if step == 4:
                batch.select([pool.fork(batch.sequences[0]), batch.sequences[1]])
            if step == 6:
                batch.truncate([5, 6])
            if step == 8:
                pool.free(batch.sequences[1])
            num_tokens = 3 if step == 0 else 1
            x = inputs(2, num_tokens, step, torch.float32)
            alone = pool.batch([pool.fork(batch.sequences[0])])
            batch.reserve(num_tokens)
            out = run(x, batch)
            expected = x[:1]
            for layer in layers:
                expected = expected + layer(expected, cache=alone)
            torch.testing.assert_close(out[:1], expected)
            pool.free(alone.sequences[0])
            pool.check()
    assert len(graphs) == 2
    assert pool.length(pool.allocate(ids)) == 4
