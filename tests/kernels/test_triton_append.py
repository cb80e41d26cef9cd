"""The append kernel writes the bytes of mla.codec, wherever the layout puts them."""

from __future__ import annotations

import torch
from devices import DEVICE, DTYPES, on_device
from helpers import assert_within_budget, make_view, randn
from hypothesis import given
from hypothesis import strategies as st
from strategies import CODECS, LATENT_WIDTHS, PAGE_SIZES, ROPE_WIDTHS, SEEDS
from torch import Tensor

from mla import reference
from mla.codec import Fp8Codec
from mla.ops import mla_append, mla_norm_rope_append
from mla.view import CacheView

CASES = {
    "C": LATENT_WIDTHS,
    "R": ROPE_WIDTHS,
    "codec": st.sampled_from(CODECS),
    "dtype": st.sampled_from(DTYPES),
    "page_size": PAGE_SIZES,
    "lengths": st.tuples(st.integers(4, 20), st.integers(4, 20)),
    "seed": SEEDS,
}


def bits(rows: Tensor) -> Tensor:
    return rows.cpu().contiguous().view(torch.uint8)


def draw_view(C: int, R: int, codec, dtype, page_size, lengths, seed) -> CacheView:
    rows = [randn(2, max(lengths), width, seed=seed, dtype=torch.float64) for width in (C, R)]
    return make_view(*rows, list(lengths), codec=codec, dtype=dtype, page_size=page_size, seed=seed)


@given(counts=st.none() | st.tuples(st.integers(0, 3), st.integers(0, 3)), **CASES)
def test_bytes_equal_those_of_plain_pytorch(
    counts, C, R, codec, dtype, page_size, lengths, seed
) -> None:
    view = draw_view(C, R, codec, dtype, page_size, lengths, seed)
    spread = torch.tensor([1e-3, 1.0, 100.0]).view(1, 3, 1)
    latent = (randn(2, 3, C, seed=seed + 1) * spread).to(dtype)
    k_rope = (randn(2, 3, R, seed=seed + 2) * spread).to(dtype)
    new_lengths = None if counts is None else torch.tensor(counts, dtype=torch.int32)
    ours = on_device(view)
    fresh = on_device((latent, k_rope))
    mla_append(ours, *fresh, new_lengths=on_device(new_lengths), impl="triton")
    mla_append(view, latent, k_rope, new_lengths=new_lengths, impl="torch")
    if codec.rotation:  # another order of sums: a value on the edge may fall on the other side
        decoded = [codec.decode(x.cpu(), C, R, torch.float32) for x in (ours.rows, view.rows)]
        difference = (decoded[0] - decoded[1]).nan_to_num(0.0).abs()
        step = decoded[1][..., :C].nan_to_num(0.0).abs().amax()
        assert difference.max() <= 0.2 * step
        assert (difference > 1e-4 * step).float().mean() < 0.02
    else:
        assert torch.equal(bits(ours.rows), bits(view.rows))


@given(
    pairing=st.sampled_from(["interleaved", "half", "none"]),
    has_norm=st.booleans(),
    latent_scale=st.sampled_from([1.0, 2.5]),
    **CASES,
)
def test_fused_form_normalises_and_rotates(
    pairing, has_norm, latent_scale, C, R, codec, dtype, page_size, lengths, seed
) -> None:
    view = on_device(draw_view(C, R, codec, dtype, page_size, lengths, seed))
    kv_a = randn(2, 3, C + R, seed=seed + 1, dtype=dtype)
    angles = 3 * randn(2, 3, R // 2, seed=seed + 2, dtype=torch.float64)
    weight = randn(C, seed=seed + 3, dtype=dtype) if has_norm else None
    rows = mla_norm_rope_append(
        view,
        *on_device((kv_a, weight, angles.cos().to(dtype), angles.sin().to(dtype))),
        eps=1e-5,
        latent_scale=latent_scale,
        pairing=pairing,
        impl="triton",
    )

    def reference_rows(kind: torch.dtype) -> tuple[Tensor, Tensor]:
        latent, k_rope = kv_a.to(kind).split([C, R], dim=-1)
        if weight is not None:
            latent = reference.rms_norm(latent, weight.to(kind), 1e-5)
        return latent * latent_scale, reference.rotate(k_rope, angles.to(kind), pairing)

    for name, actual, oracle, plain in zip(
        ("latent", "k_rope"),
        rows,
        reference_rows(torch.float64),
        reference_rows(dtype),
        strict=True,
    ):
        assert_within_budget(actual.cpu(), oracle, plain, name)
    again = on_device(draw_view(C, R, codec, dtype, page_size, lengths, seed))
    mla_append(again, *rows, impl="triton")
    assert torch.equal(bits(again.rows), bits(view.rows)), "stored as the fresh rows would be"


def test_pool_beyond_2_31_bytes() -> None:
    """A table that points at the last page: 32-bit offsets would write somewhere else."""
    codec, C, R, Z = Fp8Codec(), 512, 64, 16
    num_pages = 2**31 // (Z * codec.row_width(C, R)) + 2
    shape = (num_pages, Z, codec.row_width(C, R))
    rows = torch.empty(shape, dtype=torch.uint8, device=DEVICE)  # lazily backed
    rows[-1] = 0
    small = rows[-1:].clone()
    table = torch.tensor([[num_pages - 1]], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([Z - 3], dtype=torch.int32, device=DEVICE)
    fresh = on_device((randn(1, 5, C, seed=0), randn(1, 5, R, seed=1)))
    for pool, pages in ((rows, table), (small, torch.zeros_like(table))):
        view = CacheView.paged(pool, pages, lengths, C=C, R=R, codec=codec)
        mla_append(view, *fresh, impl="triton")
    assert torch.equal(rows[-1], small[0]) and small[0, Z - 8 : Z - 3].any()
    assert not small[0, : Z - 8].any() and not small[0, Z - 3 :].any()


def test_nan_stays_visible_in_coded_rows() -> None:
    for codec in CODECS:
        latent, k_rope = torch.ones(1, 1, 40), torch.ones(1, 1, 6)
        latent[0, 0, 3] = float("nan")
        width, dtype = codec.row_width(40, 6), codec.storage_dtype(torch.float32)
        rows = torch.zeros(1, 1, width, dtype=dtype, device=DEVICE)
        lengths = torch.ones(1, dtype=torch.int32, device=DEVICE)
        view = CacheView.dense(rows, lengths, C=40, R=6, codec=codec)
        mla_append(view, *on_device((latent, k_rope)), impl="triton")
        decoded = codec.decode(rows.cpu(), 40, 6, torch.float32)
        assert decoded[0, 0, 3].isnan()
