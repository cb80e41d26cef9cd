"""Cached rows in and out of their storage: fetch, gather and append.

Dims: B batch, E fetched rows, L new tokens, Z positions in one page, M page-table width,
W stored row width, C latent width, R rotated width.
Oracle: mla.reference.decode_row. Source: layouts of mla.codec.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mla.checks import ShapeError
from mla.codec import rotate_latent
from mla.config import Pairing
from mla.rope import rotate
from mla.view import CacheView, positions_of


def local_count(view: CacheView, position: int) -> int:
    """How many positions below ``position`` this shard holds."""
    index, count = view.shard
    if count == 1:
        return max(position, 0)
    Z = view.rows.shape[1]
    cycles, rest = divmod(max(position, 0), Z * count)
    return cycles * Z + min(max(rest - index * Z, 0), Z)


def fetch(view: CacheView, b0: int, b1: int, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Rows ``[b1-b0, end-begin, C+R]`` of local slots ``[begin, end)``; no copy if plain, dense.

    The latent of a rotating codec comes back still rotated.
    """
    if view.page_table is None:
        stored = view.rows[b0:b1, begin:end]
    else:
        Z = view.rows.shape[1]
        first, last = begin // Z, -(-end // Z)
        pages = view.page_table[b0:b1, first:last].long()
        _check_pages(view, pages)
        stored = view.rows[pages].flatten(1, 2)[:, begin - first * Z : end - first * Z]
    return view.codec.decode(stored, view.C, view.R, dtype)


def _check_pages(view: CacheView, pages: Tensor) -> None:
    """On a CPU: table entries that are in use name pages. A negative one would wrap around."""
    if not pages.is_cpu or pages.numel() == 0:
        return
    low, high = int(pages.min()), int(pages.max())
    if low < 0 or high >= view.rows.shape[0]:
        raise ShapeError(
            f"CacheView: page_table has pages {low} to {high} in use, "
            f"expected 0 to {view.rows.shape[0] - 1}"
        )


def fetch_masked(view: CacheView, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """All slots of all rows without reading lengths on the host.

    Returns:
        rows ``[B, S, C+R]``, 0 where no key is stored; positions ``[S]``; stored ``[B, S]`` bool.
    """
    Z = view.rows.shape[1]
    span = max(Z * view.shard[1], 1)  # positions of one column; Z is 0 in a cache that has to grow
    num_columns = min(-(-view.max_length // span), view.capacity // span)
    positions = positions_of(view, num_columns).flatten()
    if view.page_table is None:
        positions = positions[: view.max_length]
    stored = positions < view.lengths[:, None]
    if view.starts is not None:
        stored = stored & (positions >= view.starts[:, None])
    if view.page_table is None:
        rows = view.rows[:, : positions.shape[0]]
    else:
        used = stored.unflatten(1, (num_columns, Z)).any(2)
        pages = view.page_table[:, :num_columns].long().masked_fill(~used, 0)
        _check_pages(view, pages)
        rows = view.rows[pages].flatten(1, 2)
    rows = view.codec.decode(rows, view.C, view.R, dtype).masked_fill(~stored[..., None], 0.0)
    return rows, positions, stored


def gather(view: CacheView, begin: int, end: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Latents ``[B, E, C]`` and keys ``[B, E, R]`` at positions ``[begin, end)``, 0 elsewhere."""
    rows, positions, _ = fetch_masked(view.with_length(min(end, view.capacity)), dtype)
    out = rows.new_zeros(rows.shape[0], end - begin, rows.shape[2])
    wanted = (positions >= begin) & (positions < end)
    out[:, (positions - begin)[wanted]] = rows[:, wanted]
    latent, k_rope = out.split([view.C, view.R], dim=-1)
    latent = rotate_latent(latent) if view.codec.rotation else latent.contiguous()
    # A copy even of one row, which is contiguous: outputs of an op must not share memory.
    return latent, k_rope.clone(memory_format=torch.contiguous_format)


def append(view: CacheView, latent: Tensor, k_rope: Tensor, new_lengths: Tensor | None) -> None:
    """Write token l < new_lengths[b] to position ``lengths[b] - new_lengths[b] + l``."""
    B, L, _ = latent.shape
    if B == 0 or L == 0:
        return
    coded = view.codec.encode(latent, k_rope).to(view.rows.dtype)
    if view.rows.is_cpu and view.page_table is None:
        _append_slices(view, coded, new_lengths)
        return
    token = torch.arange(L, device=latent.device)
    count = torch.full_like(view.lengths, L) if new_lengths is None else new_lengths
    position = (view.lengths - count).long()[:, None] + token
    Z = view.rows.shape[1]
    column, slot = position // Z, position % Z
    index, num_shards = view.shard
    valid = (token < count[:, None]) & (column % num_shards == index)
    if view.page_table is None:
        page = torch.arange(B, device=latent.device)[:, None].expand_as(position)
    else:
        local = torch.where(valid, column // num_shards, 0)
        page = view.page_table.long().gather(1, local)
        _check_pages(view, page[valid])
    if new_lengths is None and num_shards == 1:
        view.rows[page, slot] = coded
    else:
        view.rows[page[valid], slot[valid]] = coded[valid]


def _append_slices(view: CacheView, coded: Tensor, new_lengths: Tensor | None) -> None:
    """Dense rows on a CPU: one slice when all rows are alike, otherwise one a row."""
    B, L, _ = coded.shape
    ends = view.lengths.tolist()
    counts = [L] * B if new_lengths is None else new_lengths.tolist()
    if len(set(ends)) == 1 and len(set(counts)) == 1:
        view.rows[:, ends[0] - counts[0] : ends[0]] = coded[:, : counts[0]]
        return
    for b, (end, count) in enumerate(zip(ends, counts, strict=True)):
        view.rows[b, end - count : end] = coded[b, :count]


def norm_rope_append(
    view: CacheView,
    kv_a: Tensor,  # [B, L, C+R]
    norm_weight: Tensor | None,  # [C]
    cos: Tensor,  # [B, L, R/2]
    sin: Tensor,  # [B, L, R/2]
    eps: float,
    latent_scale: float,
    pairing: Pairing,
    new_lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Normalise, rotate and append; returns the fresh latent and key, unquantised."""
    latent, k_rope = kv_a.split([view.C, view.R], dim=-1)
    if norm_weight is not None:
        latent = torch.nn.functional.rms_norm(latent, (view.C,), norm_weight, eps)
    # Copies, also where nothing is computed: an op must not return a view of its input.
    latent = latent * latent_scale if latent_scale != 1.0 else latent.clone()
    k_rope = rotate(k_rope, cos, sin, pairing) if pairing != "none" else k_rope.clone()
    latent, k_rope = latent.contiguous(), k_rope.contiguous()
    append(view, latent, k_rope, new_lengths)
    return latent, k_rope
