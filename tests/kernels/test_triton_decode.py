"""The decode kernel against the oracle, on every layout and codec, and by what it promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from devices import DEVICE, DTYPES, on_cpu, on_device
from helpers import assert_lse_within_budget, assert_within_budget, stored_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import CODECS, CODED, HEADS, SEEDS, DecodeCase, decode_cases
from test_decode import attend

pytest.importorskip("triton")

from mla import UnsupportedError
from mla.codec import PlainCodec
from mla.kernels import launch
from mla.ops import AttentionOutput, merge_partials, mla_decode
from mla.view import CacheView

# Drawn cases with several splits: the interpreter's table cuts rows after 32 keys.
LENGTHS = st.lists(
    st.one_of(st.integers(0, 2), st.integers(3, 40), st.integers(60, 150)), min_size=1, max_size=3
).map(tuple)
CASES = decode_cases(
    lengths=LENGTHS, H=st.sampled_from([1, 3, 9, 20]), dtype=st.sampled_from(DTYPES)
)
CODED_CASES = decode_cases(
    lengths=LENGTHS,
    H=st.sampled_from([1, 5]),
    dtype=st.sampled_from(DTYPES),
    codec=st.sampled_from(CODED),
)


def decode(case: DecodeCase, view: CacheView) -> AttentionOutput:
    q_latent, q_rope = on_device(case.queries())
    result = mla_decode(
        q_latent,
        q_rope,
        on_device(view),
        scale=case.scale,
        query_lengths=on_device(case.counts()),
        impl="triton",
    )
    return AttentionOutput(*on_cpu(tuple(result)))


def check(case: DecodeCase) -> None:
    view = case.view()
    rows = stored_rows(view, case.S)
    actual, oracle = decode(case, view), attend(case, rows, torch.float64)
    plain = attend(case, rows, case.dtype)
    assert_within_budget(actual.out, oracle.out, plain.out, "out")
    assert_lse_within_budget(actual.lse, oracle.lse, plain.lse)


@given(case=CASES)
def test_matches_the_oracle(case: DecodeCase) -> None:
    check(case)


@given(case=CODED_CASES)
def test_matches_the_oracle_on_coded_rows(case: DecodeCase) -> None:
    check(case)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.spec)
def test_corners_of_every_codec(codec) -> None:
    """Pages of one token, no rotated part, odd widths, more rows than a tile, empty rows."""
    plain = {"query_lengths": None, "codec": codec, "magnitudes": (1.0, 1.0)}
    check(
        DecodeCase(
            L=3, H=9, C=40, R=0, lengths=(37, 0), starts=None, page_size=1, seed=0,
            dtype=torch.float32, **plain,
        )
    )  # fmt: skip
    check(
        DecodeCase(
            L=5, H=5, C=7, R=6, lengths=(45, 2), starts=(33, 2), page_size=3, seed=1,
            dtype=torch.bfloat16, **plain,
        )
    )  # fmt: skip
    check(
        DecodeCase(
            L=1, H=3, C=130, R=2, lengths=(64, 17), starts=None, page_size=32, seed=2,
            dtype=torch.float16, **plain,
        )
    )  # fmt: skip


@settings(max_examples=8)
@given(case=CASES, order_seed=SEEDS)
def test_a_row_has_the_same_bits_in_any_company(case: DecodeCase, order_seed: int) -> None:
    """Alone, in a batch, in another order, behind another bound, on other pages."""
    whole = decode(case, case.view())
    for b in range(case.B):
        alone = replace(
            case,
            lengths=case.lengths[b : b + 1],
            starts=None if case.starts is None else case.starts[b : b + 1],
            query_lengths=None if case.query_lengths is None else case.query_lengths[b : b + 1],
        )
        view = case.view()
        one = CacheView(
            rows=view.rows[b : b + 1] if view.page_table is None else view.rows,
            page_table=None if view.page_table is None else view.page_table[b : b + 1],
            lengths=view.lengths[b : b + 1],
            starts=None if view.starts is None else view.starts[b : b + 1],
            C=view.C,
            R=view.R,
            codec=view.codec,
            max_length=case.lengths[b],
        )
        queries = [q[b : b + 1] for q in on_device(case.queries())]
        result = mla_decode(
            *queries,
            on_device(one),
            scale=case.scale,
            query_lengths=on_device(alone.counts()),
            impl="triton",
        )
        assert torch.equal(result.out[0].cpu(), whole.out[b])
        assert torch.equal(result.lse[0].cpu(), whole.lse[b])


@settings(max_examples=8)
@given(seed=SEEDS, length=st.integers(2, 140), page_size=st.sampled_from([None, 16]))
def test_later_keys_change_no_bit_of_earlier_queries(
    seed: int, length: int, page_size: int | None
) -> None:
    case = DecodeCase(
        3, 5, 24, 6, (length,), None, None, page_size, PlainCodec(), torch.float32, (1.0, 1.0), seed
    )
    if length < 3:
        return
    before = decode(case, case.view())
    view = case.view()
    if view.page_table is None:
        view.rows[0, length - 1] += 1
    else:
        column, slot = divmod(length - 1, view.rows.shape[1])
        view.rows[int(view.page_table[0, column]), slot] += 1
    after = decode(case, view)
    assert torch.equal(before.out[:, :2], after.out[:, :2])
    assert not torch.equal(before.out[:, 2], after.out[:, 2])


@settings(max_examples=6)
@given(
    case=decode_cases(
        lengths=LENGTHS,
        H=st.just(3),
        page_size=st.sampled_from([1, 3, 16]),
        dtype=st.just(DTYPES[0]),
    ),
    count=st.integers(2, 3),
)
def test_shards_merge_to_the_whole(case: DecodeCase, count: int) -> None:
    whole = decode(case, case.view())
    parts = [decode(case, case.view(shard=(i, count))) for i in range(count)]
    merged = merge_partials(
        torch.stack([p.out for p in parts]), torch.stack([p.lse for p in parts])
    )
    # Float32: the parts are summed in another order than the whole.
    torch.testing.assert_close(merged.out, whole.out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged.lse, whole.lse, rtol=1e-5, atol=1e-5)


def test_workspace_limit_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = DecodeCase(
        1, 3, 24, 6, (150, 40, 99), None, None, 16, PlainCodec(), torch.float32, (1.0, 1.0), 0
    )
    whole = decode(case, case.view())
    monkeypatch.setattr(launch, "WORKSPACE_BYTES", 1)
    pieces = decode(case, case.view())
    assert torch.equal(whole.out, pieces.out) and torch.equal(whole.lse, pieces.lse)


def test_pool_beyond_2_31_elements() -> None:
    """A table that points at the last page: 32-bit offsets would read somewhere else."""
    C, R, Z = 512, 64, 16
    num_pages = 2**31 // (Z * (C + R)) + 2
    rows = torch.empty(num_pages, Z, C + R, dtype=torch.float16, device=DEVICE)  # lazily backed
    rows[-1] = torch.randn(Z, C + R)
    table = torch.tensor([[num_pages - 1]], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([Z], dtype=torch.int32, device=DEVICE)
    query = torch.randn(1, 1, 2, C + R, device=DEVICE).half().split([C, R], dim=-1)
    small = CacheView.paged(rows[-1:].clone(), torch.zeros_like(table), lengths, C=C, R=R)
    large = CacheView.paged(rows, table, lengths, C=C, R=R)
    expected = mla_decode(*query, small, scale=0.04, impl="triton")
    actual = mla_decode(*query, large, scale=0.04, impl="triton")
    assert torch.equal(actual.out, expected.out) and torch.equal(actual.lse, expected.lse)


def test_float64_is_refused_with_the_reason() -> None:
    case = DecodeCase(
        1, 1, 24, 6, (5,), None, None, None, PlainCodec(), torch.float64, (1.0, 1.0), 0
    )
    with pytest.raises(UnsupportedError, match="needs float32, bfloat16 or float16"):
        decode(case, case.view())


@pytest.mark.parametrize("H", HEADS.elements)
def test_heads_and_tokens_fill_tiles_of_any_size(H: int) -> None:
    for L in (1, 2, 7):
        check(
            DecodeCase(
                L, H, 24, 6, (33, 5), None, None, None, PlainCodec(), DTYPES[0], (1.0, 1.0), L
            )
        )
