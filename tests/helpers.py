"""Helpers shared by the tests. `assert_within_budget` is the only place that says what is close."""

from __future__ import annotations

import torch
from torch import Tensor

from mla.codec import Codec, PlainCodec
from mla.view import CacheView


def assert_within_budget(actual: Tensor, oracle: Tensor, eager: Tensor, name: str) -> None:
    """Fail when a result is worse than twice what plain PyTorch loses in the same dtype."""
    assert actual.shape == oracle.shape, f"{name}: shape {actual.shape}, expected {oracle.shape}"
    assert torch.isfinite(actual).all(), f"{name}: output has non-finite values"
    if actual.numel() == 0:
        return
    oracle = oracle.double()
    ulp = torch.finfo(actual.dtype).eps * oracle.abs().max()
    budget = 2 * ((eager.double() - oracle).abs().max() + ulp)
    error = (actual.double() - oracle).abs().max()
    assert error <= budget, f"{name}: max error {error:.2e}, budget {budget:.2e}"


def assert_lse_within_budget(actual: Tensor, oracle: Tensor, eager: Tensor) -> None:
    """Log-sum-exp: -inf exactly where the oracle has it, the budget elsewhere."""
    empty = oracle == float("-inf")
    assert ((actual == float("-inf")) == empty).all(), "lse: -inf at the wrong places"
    filled = [lse.masked_fill(empty, 0.0) for lse in (actual, oracle, eager)]
    assert_within_budget(*filled, "lse")


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
    seed: int = 0,
) -> CacheView:
    """A view whose visible positions hold the given values and everything else is poison.

    ``page_size`` None gives the dense layout, otherwise pages in a drawn order with unused
    pages between them and garbage in the unused table entries.
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
    num_columns = -(-S // page_size) + 1
    num_pages = B * num_columns + 3
    rows = poison_(coded.new_empty(num_pages, page_size, coded.shape[-1]))
    order = torch.randperm(num_pages, generator=generator(seed))
    page_table = torch.full((B, num_columns), 2**31 - 1, dtype=torch.int32)
    free = iter(order.tolist())
    for b in range(B):
        for column in range(-(-lengths[b] // page_size)):
            page = next(free)
            page_table[b, column] = page
            for slot in range(page_size):
                position = column * page_size + slot
                if starts_B[b] <= position < lengths[b]:
                    rows[page, slot] = coded[b, position]
    return CacheView.paged(rows, page_table, lengths_B, C=C, R=R, codec=codec, starts=starts_arg)
