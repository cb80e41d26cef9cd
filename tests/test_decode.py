"""mla_decode against the oracle, on every layout, codec and dtype, and by what it must obey."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import (
    assert_lse_within_budget,
    assert_within_budget,
    make_view,
    poison_,
    randn,
    stored_rows,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import CODECS, DTYPES, HEADS, SEEDS, DecodeCase, decode_cases
from torch import Tensor

from mla import reference
from mla.codec import Int8Codec, PlainCodec
from mla.kernels.eager import decode as eager
from mla.ops import (
    AttentionOutput,
    merge_partials,
    mla_append,
    mla_decode,
    mla_gather,
    supported_impls,
)
from mla.view import CacheView

F64 = torch.float64


def able(dtype: torch.dtype, op: str = "mla_decode") -> list[str]:
    """Implementations that run on this CPU."""
    return [name for name, reason in supported_impls(op, dtype=dtype) if reason is None]


# The implementations, and the masked code of "torch" that other devices run.
PATHS = pytest.mark.parametrize("path", [*able(torch.float32), "masked"])


def decode(case: DecodeCase, view: CacheView, path: str = "torch") -> AttentionOutput:
    q_latent, q_rope = case.queries()
    if path != "masked":
        assume(path in able(case.dtype))
        options = {"scale": case.scale, "query_lengths": case.counts()}
        return mla_decode(q_latent, q_rope, view, **options, impl=path)
    if view.codec.rotation:
        q_latent = reference_rotate(q_latent)
    query = torch.cat([q_latent, q_rope], dim=-1)
    out, lse = eager.decode_masked(query, view, case.scale, case.counts())
    out = reference_rotate(out) if view.codec.rotation else out
    return AttentionOutput(out.to(case.dtype), lse)


def reference_rotate(x: Tensor) -> Tensor:
    """Block Hadamard in the dtype of ``x``."""
    size = 1
    while x.shape[-1] % (2 * size) == 0 and size < 128:
        size *= 2
    matrix = reference.hadamard(size).to(x.dtype)
    return (x.unflatten(-1, (-1, size)) @ matrix).flatten(-2)


def attend(case: DecodeCase, rows: tuple[Tensor, Tensor], dtype: torch.dtype) -> AttentionOutput:
    """The oracle's attention over ``rows``; below float64 it is what plain PyTorch loses."""
    q_latent, q_rope = (x.to(dtype) for x in case.queries())
    latent, k_rope = (x.to(dtype) for x in rows)
    rotates = case.codec.rotation and dtype != F64
    if rotates:
        q_latent, latent = reference_rotate(q_latent), reference_rotate(latent)
    out, lse = reference.absorbed_attention(
        q_latent,
        q_rope,
        latent,
        k_rope,
        torch.tensor(case.lengths),
        scale=case.scale,
        starts=None if case.starts is None else torch.tensor(case.starts),
        query_lengths=case.counts(),
    )
    return AttentionOutput(reference_rotate(out) if rotates else out, lse)


def check(case: DecodeCase, path: str) -> None:
    view = case.view()
    rows = stored_rows(view, case.S)
    actual = decode(case, view, path)
    oracle, plain = attend(case, rows, F64), attend(case, rows, case.dtype)
    assert_within_budget(actual.out, oracle.out, plain.out, "out")
    least = (case.C + case.R) ** 0.5
    assert_lse_within_budget(actual.lse, oracle.lse, plain.lse, least=least)
    assert actual.out.dtype == case.dtype
    assert actual.lse.dtype == torch.promote_types(case.dtype, torch.float32)


@PATHS
@given(case=decode_cases())
def test_matches_the_oracle(case, path):
    check(case, path)


@PATHS
@pytest.mark.parametrize("codec", CODECS[1:], ids=lambda codec: codec.spec)
@given(data=st.data())
def test_coded_rows_match_the_oracle(codec, path, data):
    check(data.draw(decode_cases(codec=codec, H=st.sampled_from([1, 9]))), path)


@PATHS
@given(
    case=decode_cases(
        lengths=st.tuples(st.integers(8, 40), st.integers(8, 40)),
        starts=st.tuples(st.integers(1, 8), st.integers(1, 8)),
        page_size=st.sampled_from([3, 16]),
    )
)
def test_left_padding_may_end_inside_a_page(case, path):
    check(case, path)


@PATHS
@given(case=decode_cases(dtype=st.sampled_from([F64, torch.float32])))
def test_lse_is_the_natural_log_sum_exp_of_the_scores(case, path):
    view = case.view()
    latent, k_rope = stored_rows(view, case.S)
    q_latent, q_rope = (x.double() for x in case.queries())
    lse = decode(case, view, path).lse
    tolerance = 1e-12 if case.dtype == F64 else 1e-5
    starts = case.starts or [0] * case.B
    counts = case.query_lengths or [case.L] * case.B
    for b in range(case.B):
        for i in range(case.L):
            end = min(case.lengths[b] - counts[b] + i + 1, case.lengths[b])
            keys = slice(starts[b], max(end, starts[b]) if i < counts[b] else starts[b])
            scores = q_latent[b, i] @ latent[b, keys].T + q_rope[b, i] @ k_rope[b, keys].T
            expected = torch.logsumexp(case.scale * scores, dim=-1)
            torch.testing.assert_close(lse[b, i].double(), expected, rtol=0, atol=tolerance)


@PATHS
def test_queries_without_keys_give_zero_and_minus_inf(path):
    case = DecodeCase(
        L=3, H=2, C=5, R=2, lengths=(0, 2, 4, 3), starts=(0, 2, 3, 0), query_lengths=(3, 2, 3, 1),
        page_size=None, codec=PlainCodec(), dtype=torch.float32, magnitudes=(1, 1), seed=0,
    )  # fmt: skip
    out, lse = decode(case, case.view(), path)
    sees = torch.tensor([[0, 0, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0]], dtype=torch.bool)
    assert (out[~sees] == 0).all() and (lse[~sees] == float("-inf")).all()
    assert (out[sees] != 0).all() and lse[sees].isfinite().all()


@PATHS
@given(case=decode_cases(query_lengths=None, starts=None), data=st.data())
def test_a_changed_token_leaves_earlier_queries_bit_for_bit(case, path, data):
    b = data.draw(st.integers(0, case.B - 1))
    if case.lengths[b] == 0:
        return
    changed = data.draw(st.integers(0, case.lengths[b] - 1))
    before = decode(case, view := case.view(), path)
    page, slot = b, changed
    if view.page_table is not None:
        column, slot = divmod(changed, view.rows.shape[1])
        page = view.page_table[b, column]
    view.rows[page, slot] = 3.0
    after = decode(case, view, path)
    earlier = case.L - (case.lengths[b] - changed)  # queries at positions before `changed`
    if earlier > 0:
        assert torch.equal(before.out[b, :earlier], after.out[b, :earlier])
        assert torch.equal(before.lse[b, :earlier], after.lse[b, :earlier])
    assert not torch.equal(before.lse[b, max(earlier, 0) :], after.lse[b, max(earlier, 0) :])


@PATHS
@given(
    case=decode_cases(page_size=st.sampled_from([1, 3, 16]), codec=st.sampled_from(CODECS)),
    count=st.integers(1, 3),
)
def test_shards_merge_to_the_whole(case, count, path):
    parts = [decode(case, case.view((index, count)), path) for index in range(count)]
    out, lse = merge_partials(
        torch.stack([part.out.to(part.lse.dtype) for part in parts]),
        torch.stack([part.lse for part in parts]),
    )
    rows = stored_rows(case.view(), case.S)
    oracle, plain = attend(case, rows, F64), attend(case, rows, case.dtype)
    plain_lse = attend(case, rows, torch.promote_types(case.dtype, torch.float32)).lse
    assert_within_budget(out.to(case.dtype), oracle.out, plain.out, "out")
    if case.dtype in (torch.float32, F64):
        least = (case.C + case.R) ** 0.5
        assert_lse_within_budget(lse, oracle.lse, plain_lse, least=least)


@given(case=decode_cases(query_lengths=None, codec=st.sampled_from(CODECS)), data=st.data())
def test_order_of_the_batch_is_irrelevant(case, data):
    order = data.draw(st.permutations(range(case.B)))
    view = case.view()
    rows, table = view.rows, view.page_table
    permuted = replace(
        view,
        rows=rows[order] if table is None else rows,
        page_table=None if table is None else table[order],
        lengths=view.lengths[order],
        starts=None if view.starts is None else view.starts[order],
    )
    q_latent, q_rope = case.queries()
    out, lse = mla_decode(q_latent, q_rope, view, scale=case.scale)
    again = mla_decode(q_latent[order], q_rope[order], permuted, scale=case.scale)
    plain = attend(case, stored_rows(view, case.S), case.dtype)
    oracle = attend(case, stored_rows(view, case.S), F64)
    assert_within_budget(again.out, oracle.out[order], plain.out[order], "out")
    assert torch.equal(again.lse.isinf(), lse[order].isinf())
    if case.dtype == F64:
        torch.testing.assert_close(again.out, out[order])


@given(case=decode_cases(codec=st.sampled_from(CODECS)), data=st.data())
def test_the_host_bound_changes_no_bit(case, data):
    view = case.view()
    bound = data.draw(st.integers(case.S, view.capacity))
    out, lse = decode(case, view.with_length(case.S))
    again = decode(case, view.with_length(bound))
    assert torch.equal(out, again.out) and torch.equal(lse, again.lse)


@given(case=decode_cases(dtype=F64), factor=st.floats(-3, 3))
def test_output_is_linear_in_the_values(case, factor):
    # Scaling the latent and unscaling its queries leaves the scores and scales the output.
    if abs(factor) < 0.1:
        return
    q_latent, q_rope = case.queries()
    view = case.view()
    out, lse = mla_decode(q_latent, q_rope, view, scale=case.scale, query_lengths=case.counts())
    view.rows[..., : case.C] *= factor
    scaled = mla_decode(
        q_latent / factor, q_rope, view, scale=case.scale, query_lengths=case.counts()
    )
    torch.testing.assert_close(scaled.out, factor * out)
    torch.testing.assert_close(scaled.lse, lse)


@given(case=decode_cases(dtype=F64), factor=st.floats(0.1, 4))
def test_scale_multiplies_both_halves_of_the_query(case, factor):
    q_latent, q_rope = case.queries()
    view, counts = case.view(), case.counts()
    one = mla_decode(q_latent, q_rope, view, scale=case.scale * factor, query_lengths=counts)
    other = mla_decode(
        q_latent * factor, q_rope * factor, view, scale=case.scale, query_lengths=counts
    )
    torch.testing.assert_close(one.out, other.out)
    torch.testing.assert_close(one.lse, other.lse)


@given(H=HEADS, seed=SEEDS, query=st.sampled_from(DTYPES), stored=st.sampled_from(DTYPES))
def test_rows_of_another_dtype_are_read_as_they_are(H, seed, query, stored):
    latent, k_rope = (randn(2, 12, w, seed=seed, dtype=F64) for w in (24, 6))
    view = make_view(latent, k_rope, [12, 5], dtype=stored)
    rows = stored_rows(view, 12)
    q = [randn(2, 2, H, w, seed=seed + w, dtype=query) for w in (24, 6)]

    def plain(dtype: torch.dtype) -> Tensor:
        arguments = [x.to(dtype) for x in (*q, *rows)]
        return reference.absorbed_attention(*arguments, view.lengths, scale=0.2).out

    out = mla_decode(*q, view, scale=0.2).out
    assert_within_budget(out, plain(F64), plain(query), "out")


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_out_dtype(dtype, out_dtype):
    view = make_view(*(randn(1, 7, w, seed=w, dtype=F64) for w in (24, 6)), [7], dtype=dtype)
    q = [randn(1, 2, 3, w, seed=w, dtype=dtype) for w in (24, 6)]
    out, lse = mla_decode(*q, view, scale=0.2)
    cast = mla_decode(*q, view, scale=0.2, out_dtype=out_dtype)
    assert cast.out.dtype == out_dtype and cast.lse.dtype == lse.dtype
    bound = max(torch.finfo(x).eps for x in (dtype, out_dtype))
    # One rounding in either dtype; 1e-30 is below any value here.
    torch.testing.assert_close(cast.out.double(), out.double(), rtol=2 * bound, atol=1e-30)


@pytest.mark.parametrize("impl", able(torch.float16))
def test_float16_does_not_overflow_over_many_equal_keys(impl):
    """2000 weights of 1 times 40 is beyond float16; normalised weights are not."""
    latent = torch.full((2, 2000, 16), 40.0, dtype=F64)
    view = make_view(latent, latent[..., :4] * 0, [2000, 2000], dtype=torch.float16)
    q = [torch.zeros(2, 1, 3, width, dtype=torch.float16) for width in (16, 4)]
    out = mla_decode(*q, view, scale=1.0, impl=impl).out
    # A little over float16's rounding, 9.8e-4, of the result and of the sum.
    torch.testing.assert_close(out, torch.full_like(out, 40.0), rtol=2e-3, atol=0)


@pytest.mark.parametrize("impl", able(torch.float32))
def test_autocast_does_not_reach_into_the_op(impl):
    view = make_view(*(randn(2, 9, w, seed=w, dtype=F64) for w in (24, 6)), [9, 4])
    q = [randn(2, 1, 3, w, seed=w) for w in (24, 6)]
    plain = mla_decode(*q, view, scale=0.2, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mla_decode(*q, view, scale=0.2, impl=impl)
    assert torch.equal(plain.out, inside.out) and torch.equal(plain.lse, inside.lse)


@pytest.mark.parametrize("sizes", [(0, 2, 3), (2, 0, 3), (2, 2, 0)], ids=["B", "L", "H"])
def test_nothing_to_do(sizes):
    B, L, H = sizes
    rows = poison_(torch.empty(B, 4, 7))
    view = CacheView.dense(rows, torch.full((B,), 3, dtype=torch.int32), C=5, R=2)
    out, lse = mla_decode(torch.zeros(B, L, H, 5), torch.zeros(B, L, H, 2), view, scale=1.0)
    assert out.shape == (B, L, H, 5) and lse.shape == (B, L, H)


@pytest.mark.parametrize(
    ("codec", "dtype"), [(PlainCodec(), torch.bfloat16), (Int8Codec(), torch.uint8)]
)
@pytest.mark.parametrize("impl", able(torch.bfloat16))
def test_offsets_beyond_2_to_the_31(codec, dtype, impl):
    """The last page of a pool of more than 2**31 elements; the pool is never touched otherwise."""
    C, R, Z = 512, 64, 16
    width = codec.row_width(C, R)
    num_pages = 2**31 // (Z * width) + 2
    try:
        rows = torch.empty(num_pages, Z, width, dtype=dtype)
    except RuntimeError:
        pytest.skip("no address space for 4 GiB")
    latent, k_rope = (randn(1, 11, w, seed=w, dtype=F64) for w in (C, R))
    coded = codec.encode(latent.bfloat16(), k_rope.bfloat16())
    rows[-1, :11] = coded[0]
    small = CacheView.dense(coded, torch.tensor([11], dtype=torch.int32), C=C, R=R, codec=codec)
    table = torch.tensor([[num_pages - 1, -7]], dtype=torch.int32)
    big = CacheView.paged(rows, table, small.lengths, C=C, R=R, codec=codec)
    q = [randn(1, 2, 3, w, seed=w, dtype=torch.bfloat16) for w in (C, R)]
    expected = mla_decode(*q, small, scale=0.04, impl=impl)
    out, lse = mla_decode(*q, big, scale=0.04, impl=impl)
    assert torch.equal(out, expected.out) and torch.equal(lse, expected.lse)
    tokens = latent[:, :2].bfloat16(), k_rope[:, :2].bfloat16()
    mla_append(big, *tokens, impl=impl if impl in able(torch.bfloat16, "mla_append") else "torch")
    assert torch.equal(rows[-1, 9:11], coded[0, :2]) and torch.equal(rows[-1, :9], coded[0, :9])
    past = mla_gather(big, 8, 11, dtype=F64)
    assert torch.equal(past.latent, mla_gather(small, 0, 11, dtype=F64).latent[:, [8, 0, 1]])
