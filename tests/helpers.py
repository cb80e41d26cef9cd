"""Helpers shared by the tests. `assert_within_budget` is the only place that says what is close."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from mla import reference
from mla.codec import Codec, PlainCodec
from mla.view import CacheView


def assert_within_budget(
    actual: Tensor, oracle: Tensor, eager: Tensor, name: str, *, least: float = 0.0
) -> None:
    """Fail when a result is worse than twice what plain PyTorch loses in the same dtype.

    One rounding of the largest value (of ``least`` if that is more) is always allowed.
    """
    assert actual.shape == oracle.shape, f"{name}: shape {actual.shape}, expected {oracle.shape}"
    assert torch.isfinite(actual).all(), f"{name}: output has non-finite values"
    if actual.numel() == 0:
        return
    oracle = oracle.double()
    # A float32 log-sum-exp of bfloat16 scores is no better than bfloat16: the eager run says so.
    ulp = max(torch.finfo(x.dtype).eps for x in (actual, eager))
    ulp *= max(oracle.abs().max().item(), least)
    if actual.dtype == torch.float64:
        ulp = 64 * ulp  # the oracle rounds like everybody else, and the eager run is the oracle
    budget = 2 * ((eager.double() - oracle).abs().max() + ulp)
    error = (actual.double() - oracle).abs().max()
    assert error <= budget, f"{name}: max error {error:.2e}, budget {budget:.2e}"


def assert_lse_within_budget(
    actual: Tensor, oracle: Tensor, eager: Tensor, *, least: float = 1.0
) -> None:
    """Log-sum-exp: -inf exactly where the oracle has it, the budget elsewhere.

    ``least`` is the size of the terms that cancel in a score, 1 or more: an absolute error of lse
    is a relative one of the weights, however small lse is.
    """
    empty = oracle == float("-inf")
    assert ((actual == float("-inf")) == empty).all(), "lse: -inf at the wrong places"
    filled = [lse.masked_fill(empty, 0.0) for lse in (actual, oracle, eager)]
    assert_within_budget(*filled, "lse", least=least)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values that are the same in every dtype up to rounding."""
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def poison_(rows: Tensor) -> Tensor:
    """Fill storage with what breaks careless arithmetic: NaN, or 0xFF bytes for coded rows."""
    return rows.fill_(float("nan") if rows.is_floating_point() else 0xFF)


def make_view(
    latent: Tensor,  # [B, S, C] float64
    k_rope: Tensor,  # [B, S, R] float64
    lengths: list[int],
    *,
    codec: Codec | None = None,
    dtype: torch.dtype = torch.float32,
    starts: list[int] | None = None,
    page_size: int | None = None,
    shard: tuple[int, int] = (0, 1),
    seed: int = 0,
) -> CacheView:
    """A view whose visible positions hold the given values and everything else is poison.

    ``page_size`` None gives the dense layout, otherwise pages in a drawn order with unused pages
    between them and garbage in the unused table entries. With ``shard`` (index, count) only the
    positions of that shard are stored.
    """
    codec = codec or PlainCodec()
    B, S, C = latent.shape
    R = k_rope.shape[-1]
    coded = codec.encode(latent.to(dtype), k_rope.to(dtype))
    starts_B = starts or [0] * B
    lengths_B = torch.tensor(lengths, dtype=torch.int32)
    starts_arg = None if starts is None else torch.tensor(starts, dtype=torch.int32)
    if page_size is None:
        rows = poison_(coded.new_empty(B, S + 3, coded.shape[-1]))
        for b in range(B):
            rows[b, starts_B[b] : lengths[b]] = coded[b, starts_B[b] : lengths[b]]
        return CacheView.dense(rows, lengths_B, C=C, R=R, codec=codec, starts=starts_arg)
    index, count = shard
    num_columns = -(-S // (page_size * count)) + 1
    num_pages = B * num_columns + 3
    rows = poison_(coded.new_empty(num_pages, page_size, coded.shape[-1]))
    order = torch.randperm(num_pages, generator=generator(seed)).tolist()
    page_table = torch.full((B, num_columns), 2**31 - 1, dtype=torch.int32)
    for b, column in product(range(B), range(num_columns)):
        first = (column * count + index) * page_size
        begin, end = max(first, starts_B[b]), min(first + page_size, lengths[b])
        if begin < end:
            page_table[b, column] = page = order.pop()
            rows[page, begin - first : end - first] = coded[b, begin:end]
    return CacheView.paged(
        rows, page_table, lengths_B, C=C, R=R, codec=codec, starts=starts_arg, shard=shard
    )


def stored_rows(view: CacheView, num_positions: int) -> tuple[Tensor, Tensor]:
    """``[B, S, C]`` and ``[B, S, R]`` float64 as the oracle reads them, one slot after the other.

    NaN at positions that are not visible or not on this shard.
    """
    index, count = view.shard
    Z, C, R = view.rows.shape[1], view.C, view.R
    rows = torch.full((view.batch_size, num_positions, C + R), float("nan"), dtype=torch.float64)
    starts = [0] * view.batch_size if view.starts is None else view.starts.tolist()
    for b, (start, length) in enumerate(zip(starts, view.lengths.tolist(), strict=True)):
        for position in range(start, length):
            column, slot = divmod(position, Z)
            if column % count != index:
                continue
            page = b if view.page_table is None else int(view.page_table[b, column // count])
            rows[b, position] = oracle_row(view.codec, view.rows[page, slot], C, R)
    return rows[..., :C], rows[..., C:]


def oracle_row(codec: Codec, row: Tensor, C: int, R: int) -> Tensor:
    """``[C+R]`` float64 of one stored row, the latent rotated back."""
    if isinstance(codec, PlainCodec):
        return row.double()
    options = {"group": codec.group, "rope_bits": codec.rope_bits, "rotation": codec.rotation}
    latent, k_rope = reference.decode_row(bytes(row.tolist()), codec.kind, C, R, **options)
    return torch.tensor(latent + k_rope, dtype=torch.float64)
