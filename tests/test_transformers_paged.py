"""A batch of requests over a shared pool: each sees its own tokens, wherever its pages lie."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import assert_within_budget, generator, oracle_row, poison_, randn
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

pytest.importorskip("transformers")

from mla import reference
from mla.codec import Codec, Fp8Codec, Int4Codec, Int8Codec, PlainCodec
from mla.integrations.transformers.attend import Sizes
from mla.integrations.transformers.paged import Batch, attend_batch
from mla.plan import should_absorb

C, R, N, V, H, Z = 24, 8, 12, 10, 3, 4
SCALE = 0.3
SIZES = Sizes(C, N, V)
SHARES = st.lists(st.tuples(st.integers(0, 11), st.integers(1, 9)), min_size=1, max_size=5)
CODECS = st.sampled_from(
    [PlainCodec(), Fp8Codec(group=16), Int8Codec(rope_bits=8), Int4Codec(group=16)]
)


def make_pool(
    shares: list[tuple[int, int]], codec: Codec, seed: int
) -> tuple[Tensor, list[list[int]], list[Tensor]]:
    """Poisoned pages ``[P, Z, W]``, those of each request, and all tokens of each ``[S, C+R]``."""
    num_pages = [-(-(past + new) // Z) for past, new in shares]
    P = sum(num_pages) + 2
    order = torch.randperm(P, generator=generator(seed)).tolist()
    tables = [[order.pop() for _ in range(n)] for n in num_pages]
    tokens = [
        randn(past + new, C + R, seed=seed + 1 + i, dtype=torch.float64)
        for i, (past, new) in enumerate(shares)
    ]
    width = codec.row_width(C, R)
    # As in the pool of several layers: pages of one layer do not follow each other.
    rows = poison_(torch.empty(P, 2, Z, width, dtype=codec.storage_dtype(torch.float64)))[:, 1]
    for table, held, (past, _) in zip(tables, tokens, shares, strict=True):
        coded = codec.encode(held[:past, :C], held[:past, C:])
        for position in range(past):
            rows[table[position // Z], position % Z] = coded[position]
    return rows, tables, tokens


def oracle(query: Tensor, held: Tensor, past: int, codec: Codec, weight: Tensor) -> Tensor:
    """``[new, H, V]`` float64 of one request alone."""
    coded = codec.encode(held[:, :C], held[:, C:])
    stored = torch.stack([oracle_row(codec, row, C, R) for row in coded])
    new = held.shape[0] - past
    if past == 0 or not should_absorb(new, held.shape[0], SIZES):
        stored[past:] = held[past:]
    latent, k_rope = stored[None].split([C, R], dim=-1)
    return reference.expanded_attention(
        query[None], latent, k_rope, weight, num_heads=H, value_dim=V, scale=SCALE
    ).out[0]


@given(shares=SHARES, codec=CODECS, seed=st.integers(0, 2**20))
@example(shares=[(0, 3), (5, 1), (7, 9), (0, 1), (11, 1)], codec=Int8Codec(), seed=0)
@example(shares=[(4, 4), (8, 4), (3, 1)], codec=PlainCodec(), seed=1)
def test_every_request_is_attended_to_alone(
    shares: list[tuple[int, int]], codec: Codec, seed: int
) -> None:
    rows, tables, held = make_pool(shares, codec, seed)
    before = rows.clone()
    batch = Batch(Z, rows.device)
    for table, (past, new) in zip(tables, shares, strict=True):
        batch.add([*table, 10**6], past, new)
    kv_b_proj = nn.Linear(C, H * (N + V), bias=False, dtype=torch.float64)
    with torch.no_grad():
        kv_b_proj.weight.copy_(randn(H * (N + V), C, seed=seed) / C**0.5)
    num_tokens = sum(new for _, new in shares)
    query_THE = randn(num_tokens, H, N + R, seed=seed + 7, dtype=torch.float64)
    fresh = torch.cat([x[past:] for x, (past, _) in zip(held, shares, strict=True)])
    with torch.no_grad():
        out = attend_batch(
            query_THE.transpose(0, 1)[None],
            fresh[None, None, :, :C],
            fresh[None, None, :, C:],
            kv_b_proj,
            SimpleNamespace(batch=batch, codec=codec, rows=lambda layer_idx, *_: rows),
            0,
            nope_dim=N,
            value_dim=V,
            scale=SCALE,
        )
    assert out.shape == (1, num_tokens, H, V)
    begin = 0
    for table, tokens, (past, new) in zip(tables, held, shares, strict=True):
        end = begin + new
        expected = oracle(query_THE[begin:end], tokens, past, codec, kv_b_proj.weight)
        assert_within_budget(out[0, begin:end], expected, expected, "out", least=1.0)
        coded = codec.encode(tokens[:, :C], tokens[:, C:])
        for position in range(past + new):
            page, slot = table[position // Z], position % Z
            assert torch.equal(rows[page, slot], coded[position])
            before[page, slot] = rows[page, slot]
        begin = end
    changed = rows.view(torch.uint8) != before.view(torch.uint8)
    assert not changed.any(), "rows of nobody were written"


def test_alike_requests_are_one_call() -> None:
    """Decoding requests of any length together, and all cold ones; the others one by one."""
    batch = Batch(Z, torch.device("cpu"))
    for past, new in ((9, 1), (0, 3), (30, 1), (20, 2), (0, 5), (2, 9), (5, 1)):
        batch.add(list(range(10)), past, new)
    cold, absorbed, expanded = batch.groups(SIZES)
    assert [[share.new for share in group.shares] for group in cold] == [[3, 5]]
    assert [[share.past for share in group.shares] for group in absorbed] == [[9, 30, 5], [20]]
    assert [[share.past for share in group.shares] for group in expanded] == [[2]]
    assert absorbed[0].tokens.tolist() == [0, 4, 21] and cold[0].boundaries.tolist() == [0, 3, 8]
    assert absorbed[0].page_table.shape == (3, 8) and absorbed[0].lengths.tolist() == [10, 31, 6]
    assert batch.groups(SIZES) is batch.groups(SIZES), "made once for all layers"
