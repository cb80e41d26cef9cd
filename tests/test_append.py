"""mla_append, mla_norm_rope_append and mla_gather: what is written where, and read back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers import generator, make_view, poison_, randn, stored_rows
from hypothesis import given
from hypothesis import strategies as st
from strategies import CODECS, LATENT_WIDTHS, PAGE_SIZES, ROPE_WIDTHS, SEEDS
from torch import Tensor

from mla import reference
from mla.checks import ShapeError
from mla.codec import Codec, Int4Codec, Int8Codec, PlainCodec, rotate_latent
from mla.ops import mla_append, mla_gather, mla_norm_rope_append
from mla.ops.select import Case, kernel_for
from mla.view import CacheView

F64 = torch.float64
CAPACITY = 24


@pytest.fixture(scope="module", params=["auto", "torch"], autouse=True)
def _impl(request):
    """Every test runs what "auto" takes here (C++ where it is built) and plain PyTorch."""

    def chosen(impl: str, case: Case, part: str | None = None) -> Any:
        return kernel_for(request.param if impl == "auto" else impl, case, part)

    with patch("mla.ops.append.kernel_for", chosen):
        yield


@dataclass(frozen=True)
class AppendCase:
    """An empty cache and, for each step, how many tokens each row gets."""

    C: int
    R: int
    steps: tuple[tuple[int, ...], ...]
    page_size: int | None
    codec: Codec
    shard: tuple[int, int]
    seed: int

    @property
    def B(self) -> int:
        return len(self.steps[0])

    def view(self) -> CacheView:
        width = self.codec.row_width(self.C, self.R)
        dtype = self.codec.storage_dtype(torch.float32)
        lengths = torch.zeros(self.B, dtype=torch.int32)
        options: dict[str, Any] = {"C": self.C, "R": self.R, "codec": self.codec}
        if self.page_size is None:
            rows = poison_(torch.empty(self.B, CAPACITY, width, dtype=dtype))
            return CacheView.dense(rows, lengths, **options)
        columns = -(-CAPACITY // (self.page_size * self.shard[1]))
        num_pages = self.B * columns + 2
        rows = poison_(torch.empty(num_pages, self.page_size, width, dtype=dtype))
        order = torch.randperm(num_pages, generator=generator(self.seed))[: self.B * columns]
        table = order.int().view(self.B, columns)
        return CacheView.paged(rows, table, lengths, **options, shard=self.shard)


@st.composite
def append_cases(draw: Any, codecs: tuple[Codec, ...] = CODECS) -> AppendCase:
    B = draw(st.integers(1, 3))
    steps = st.lists(st.tuples(*[st.integers(0, 6)] * B), min_size=1, max_size=4)
    page_size = draw(PAGE_SIZES)
    count = draw(st.integers(1, 3)) if page_size else 1
    return AppendCase(
        C=draw(LATENT_WIDTHS),
        R=draw(ROPE_WIDTHS),
        steps=tuple(draw(steps)),
        page_size=page_size,
        codec=draw(st.sampled_from(codecs)),
        shard=(draw(st.integers(0, count - 1)), count),
        seed=draw(SEEDS),
    )


def bits(rows: Tensor) -> Tensor:
    """Storage as integers, so that poison compares equal to itself."""
    return rows if rows.dtype == torch.uint8 else rows.view(torch.int32)


def fresh(case: AppendCase, step: int, L: int) -> tuple[Tensor, Tensor]:
    latent = randn(case.B, L, case.C, seed=case.seed + 2 * step)
    return latent, randn(case.B, L, case.R, seed=case.seed + 2 * step + 1)


def expect(case: AppendCase, view: CacheView, expected: Tensor, rows: Tensor, counts: Any) -> None:
    """Write the coded ``rows [B, L, W]`` where the contract puts them, one token at a time."""
    index, num_shards = case.shard
    for b, count in enumerate(counts):
        for i in range(count):
            position = int(view.lengths[b]) - count + i
            page, slot = b, position
            if view.page_table is not None:
                column, slot = divmod(position, case.page_size)
                if column % num_shards != index:
                    continue
                page = int(view.page_table[b, column // num_shards])
            expected[page, slot] = rows[b, i]


@given(case=append_cases(), extra=st.integers(0, 2))
def test_rows_land_in_their_places_and_nothing_else_changes(case, extra):
    view = case.view()
    expected = view.rows.clone()
    for step, counts in enumerate(case.steps):
        L = max(counts) + extra
        latent, k_rope = fresh(case, step, L)
        expect_rows = case.codec.encode(latent, k_rope)
        for b, count in enumerate(counts):
            latent[b, count:] = k_rope[b, count:] = float("nan")  # tokens that do not exist
        view.lengths.add_(torch.tensor(counts, dtype=torch.int32))
        is_ragged = len({*counts, L}) > 1
        new_lengths = torch.tensor(counts, dtype=torch.int32) if is_ragged else None
        expect(case, view, expected, expect_rows, counts)
        mla_append(view, latent, k_rope, new_lengths=new_lengths, impl="torch")
        assert torch.equal(bits(view.rows), bits(expected))


@given(case=append_cases())
def test_gather_returns_what_the_rows_hold(case):
    view = case.view()
    for step, counts in enumerate(case.steps):
        view.lengths.add_(torch.tensor(counts, dtype=torch.int32))
        latent, k_rope = fresh(case, step, max(counts))
        new_lengths = torch.tensor(counts, dtype=torch.int32)
        mla_append(view, latent, k_rope, new_lengths=new_lengths, impl="torch")
    expected = [x.nan_to_num(0.0) for x in stored_rows(view, CAPACITY)]
    actual = mla_gather(view, 0, CAPACITY, dtype=F64)
    # Float64: scale times code in another order.
    torch.testing.assert_close(actual.latent, expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual.k_rope, expected[1], rtol=1e-12, atol=0)


@given(case=append_cases(codecs=(PlainCodec(),)))
def test_plain_rows_come_back_bit_for_bit(case):
    if case.shard[1] > 1:
        return
    view = case.view()
    written = [torch.empty(0, case.C + case.R)] * case.B
    for step, counts in enumerate(case.steps):
        view.lengths.add_(torch.tensor(counts, dtype=torch.int32))
        rows = fresh(case, step, max(counts))
        mla_append(view, *rows, new_lengths=torch.tensor(counts, dtype=torch.int32), impl="torch")
        for b, count in enumerate(counts):
            written[b] = torch.cat([written[b], torch.cat(rows, dim=-1)[b, :count]])
    latent, k_rope = mla_gather(view, 0, CAPACITY, dtype=torch.float32)
    both = torch.cat([latent, k_rope], dim=-1)
    for b, rows in enumerate(written):
        assert torch.equal(both[b, : len(rows)], rows)
        assert (both[b, len(rows) :] == 0).all()


@given(
    seed=SEEDS,
    page_size=PAGE_SIZES,
    codec=st.sampled_from(CODECS),
    lengths=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    data=st.data(),
)
def test_gather_of_a_window_is_the_window_of_all(seed, page_size, codec, lengths, data):
    starts = [data.draw(st.integers(0, n)) for n in lengths]
    begin = data.draw(st.integers(0, 24))
    end = data.draw(st.integers(begin, 24))
    latent, k_rope = (randn(2, max(lengths), w, seed=seed, dtype=F64) for w in (24, 6))
    options = {"codec": codec, "page_size": page_size, "starts": starts, "seed": seed}
    view = make_view(latent, k_rope, list(lengths), **options)
    rows = torch.zeros(2, 24, 30, dtype=F64)
    rows[:, : max(lengths)] = torch.cat(stored_rows(view, max(lengths)), dim=-1).nan_to_num(0.0)
    window = mla_gather(view, begin, end, dtype=F64)
    assert window.latent.shape == (2, end - begin, 24)
    actual = torch.cat(window, dim=-1)
    # Float64: scale times code in another order.
    torch.testing.assert_close(actual, rows[:, begin:end], rtol=1e-12, atol=1e-12)


@given(case=append_cases(codecs=(Int8Codec(), Int4Codec())))
def test_coded_rows_are_written_once(case):
    """Appending and gathering more never touches the bytes of earlier rows."""
    view = case.view()
    before: dict[tuple[int, int], Tensor] = {}
    for step, counts in enumerate(case.steps):
        view.lengths.add_(torch.tensor(counts, dtype=torch.int32))
        rows = fresh(case, step, max(counts))
        # Larger by a thousand each time: rescaling old rows would show.
        rows = tuple(x * 1000.0**step for x in rows)
        written = view.rows.clone()
        mla_append(view, *rows, new_lengths=torch.tensor(counts, dtype=torch.int32), impl="torch")
        changed = (view.rows != written).any(-1)
        for place, bytes_before in before.items():
            assert torch.equal(view.rows[place], bytes_before)
        before.update({tuple(p): view.rows[tuple(p)].clone() for p in changed.nonzero().tolist()})
    mla_gather(view, 0, CAPACITY, dtype=torch.float32)
    assert all(torch.equal(view.rows[place], row) for place, row in before.items())


FUSED = {
    "pairing": st.sampled_from(["interleaved", "half", "none"]),
    "has_norm": st.booleans(),
    "latent_scale": st.sampled_from([1.0, 2.5]),
    "page_size": PAGE_SIZES,
    "codec": st.sampled_from(CODECS),
    "B": st.integers(1, 3),
    "L": st.integers(1, 4),
    "R": ROPE_WIDTHS,
    "seed": SEEDS,
}


@given(**FUSED)
def test_fused_append_is_norm_rotation_and_append(
    pairing, has_norm, latent_scale, page_size, codec, B, L, R, seed
):
    C = 24
    case = AppendCase(C, R, ((L,) * B,), page_size, codec, (0, 1), seed)
    fused, plain = case.view(), case.view()
    for view in (fused, plain):
        view.lengths.fill_(5)
    kv_a = randn(B, L, C + R, seed=seed)
    weight = 1 + 0.1 * randn(C, seed=seed + 1) if has_norm else None
    angles = randn(B, L, R // 2, seed=seed + 2, dtype=F64)
    counts = torch.randint(0, L + 1, (B,), generator=generator(seed), dtype=torch.int32)
    latent, k_rope = mla_norm_rope_append(
        fused, kv_a, weight, angles.cos().float(), angles.sin().float(),
        eps=1e-6, latent_scale=latent_scale, pairing=pairing, new_lengths=counts, impl="torch",
    )  # fmt: skip
    oracle = kv_a[..., :C].double()
    if weight is not None:
        oracle = reference.rms_norm(oracle, weight.double(), 1e-6)
    rotated = reference.rotate(kv_a[..., C:].double(), angles, pairing)
    torch.testing.assert_close(latent, (latent_scale * oracle).float())
    torch.testing.assert_close(k_rope, rotated.float())
    mla_append(plain, latent, k_rope, new_lengths=counts, impl="torch")
    assert torch.equal(bits(fused.rows), bits(plain.rows))


@pytest.mark.parametrize("R", [0, 2])
def test_fused_append_returns_no_view_of_its_input(R):
    case = AppendCase(24, R, ((1,),), None, PlainCodec(), (0, 1), 0)
    view = case.view()
    view.lengths.fill_(1)
    kv_a = randn(1, 1, 24 + R, seed=0)
    empty = kv_a.new_empty(1, 1, R // 2)
    options = {"eps": 0.0, "pairing": "none", "impl": "torch"}
    rows = mla_norm_rope_append(view, kv_a, None, empty, empty, **options)
    storages = [x.untyped_storage().data_ptr() for x in (kv_a, *rows, view.rows) if x.numel()]
    assert len(set(storages)) == len(storages)


def test_rows_take_the_dtype_of_the_cache():
    view = make_view(*(randn(1, 3, w, seed=w, dtype=F64) for w in (24, 6)), [3])
    rows = [randn(1, 2, w, seed=w, dtype=F64) for w in (24, 6)]
    mla_append(view, *rows)
    assert torch.equal(view.rows[0, 1:3], torch.cat(rows, dim=-1)[0].float())


def test_no_gradient_reaches_the_cache():
    view = make_view(*(randn(1, 3, w, seed=w, dtype=F64) for w in (24, 6)), [3])
    mla_append(view, *(randn(1, 1, w, seed=w).requires_grad_() for w in (24, 6)))
    assert not view.rows.requires_grad
    assert not mla_gather(view, 0, 3, dtype=torch.float32).latent.requires_grad


def test_rotating_codecs_gather_unrotated_latents():
    view = make_view(*(randn(1, 3, w, seed=w, dtype=F64) for w in (24, 6)), [3], codec=Int4Codec())
    stored = view.codec.decode(view.rows[:, :3], 24, 6, F64)[..., :24]
    latent = mla_gather(view, 0, 3, dtype=F64).latent
    torch.testing.assert_close(latent, rotate_latent(stored))


# --- bad input: an error that says what is wrong, and nothing written -----------------------------


def small_view(lengths: list[int], page_size: int | None = None) -> CacheView:
    case = AppendCase(4, 2, ((0,) * len(lengths),), page_size, PlainCodec(), (0, 1), 0)
    view = case.view()
    view.lengths.copy_(torch.tensor(lengths))
    return view


@pytest.mark.parametrize("page_size", [None, 3])
@pytest.mark.parametrize(
    ("lengths", "L", "range_"), [([25, 2], 2, "0 to 25"), ([3, 1], 2, "-1 to 3")]
)
def test_positions_outside_the_cache(lengths, L, range_, page_size):
    view = small_view(lengths, page_size)
    before = view.rows.clone()
    match = f"new rows at positions {range_}, expected 0 to 24; reserve the new rows first"
    rows = torch.zeros(2, L, 6)
    for run in (
        lambda: mla_append(view, rows[..., :4], rows[..., 4:]),
        lambda: mla_norm_rope_append(
            view, rows, None, rows[..., :1], rows[..., :1], eps=0.0, pairing="half"
        ),
        lambda: torch.compile(mla_append, backend="eager")(view, rows[..., :4], rows[..., 4:]),
    ):
        with pytest.raises(ShapeError, match=match):
            run()
        assert torch.equal(bits(view.rows), bits(before))


@pytest.mark.parametrize("page", [-1, 99])
def test_a_bad_page_is_found_before_anything_is_written(page):
    view = small_view([5, 5], page_size=3)
    view.page_table[1, 1] = page
    before = view.rows.clone()
    match = f"page_table has pages -?[0-9]+ to [0-9]+ in use, expected 0 to {len(view.rows) - 1}"
    with pytest.raises(ShapeError, match=match):
        mla_append(view, torch.zeros(2, 5, 4), torch.zeros(2, 5, 2))
    assert torch.equal(bits(view.rows), bits(before))
    with pytest.raises(ShapeError, match="page_table has pages"):
        mla_gather(view, 0, 5, dtype=torch.float32)
    only_first = torch.tensor([2, 0], dtype=torch.int32)  # the bad page is not in use
    mla_append(view, torch.zeros(2, 2, 4), torch.zeros(2, 2, 2), new_lengths=only_first)
