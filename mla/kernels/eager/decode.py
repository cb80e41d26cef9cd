"""Absorbed attention over the cache in plain PyTorch, and the merge of partial results.

    scores = scale * q . row,  out = softmax(scores) row[:C]      q = [q_latent | q_rope]

Rows serve as keys and, cropped, as values, so the cache is never copied for plain, dense rows.
Keys are processed in chunks whose partial softmaxes are merged once at the end: short matrix
products keep both cores of a small machine busy at batch 1, and bound the memory of the scores.

Dims: B batch, L queries, H heads, S keys, C latent width, R rotated width, X chunks.
Oracle: mla.reference.absorbed_attention. Source: arXiv:2405.04434 section 2.1, arXiv:1805.02867.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mla.checks import ShapeError
from mla.codec import rotate_latent
from mla.kernels.eager.rows import fetch, fetch_masked, local_count
from mla.view import CacheView

# Chunks of 256-1024 keys measured alike, and 1.1-2.2x faster than one product over 2048-8192 keys
# (batch 1, 16 heads, C=512, R=64, 2-core Zen 4, torch 2.13).
KEYS_PER_CHUNK = 512
MAX_SCORES = 1 << 24  # elements of one block of scores: 64 MiB in float32


class Partial(NamedTuple):
    """Attention over some keys; its log-sum-exp is ``top + log(total)``."""

    top: Tensor  # [b, L, H] largest score
    total: Tensor  # [b, L, H] sum of exp(score - top)
    value: Tensor  # [b, L, H, C] weighted mean of the latents; 0 where no key is seen


class Run(NamedTuple):
    """Consecutive batch rows that are alike."""

    b0: int
    b1: int
    begin: int  # first visible local slot
    ends: tuple[int, ...]  # for each query, one past the last visible local slot


def decode(
    q_latent: Tensor,
    q_rope: Tensor,
    view: CacheView,
    scale: float,
    query_lengths: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """out ``[B, L, H, C]`` of ``out_dtype`` and lse ``[B, L, H]`` of `lse_dtype`."""
    if view.codec.rotation:
        q_latent = rotate_latent(q_latent)
    query = torch.cat([q_latent, q_rope], dim=-1)
    out = torch.zeros(q_latent.shape, dtype=lse_dtype(query), device=query.device)
    lse = torch.full_like(out[..., 0], float("-inf"))
    if query.numel() == 0:
        return out.to(out_dtype), lse
    if query.is_cpu:
        for run in _runs(view, query.shape[1], query_lengths):
            parts = list(_visible_parts(query[run.b0 : run.b1], view, run, scale))
            if parts:
                L = len(run.ends)
                out[run.b0 : run.b1, :L], lse[run.b0 : run.b1, :L] = combine(parts)
    else:
        out, lse = decode_masked(query, view, scale, query_lengths)
    if view.codec.rotation:
        out = rotate_latent(out)
    return out.to(out_dtype), lse


def _runs(view: CacheView, L: int, query_lengths: Tensor | None) -> Iterator[Run]:
    """Group consecutive rows with the same start, length and query count."""
    lengths = view.lengths.tolist()
    if max(lengths) > view.capacity:
        raise ShapeError(
            f"CacheView: lengths has values up to {max(lengths)}, expected at most {view.capacity}"
        )
    starts = [0] * len(lengths) if view.starts is None else view.starts.tolist()
    counts = [L] * len(lengths) if query_lengths is None else query_lengths.tolist()
    rows = list(zip(starts, lengths, counts, strict=True))
    b0 = 0
    for b in range(1, len(rows) + 1):
        if b < len(rows) and rows[b] == rows[b0]:
            continue
        start, length, count = rows[b0]
        ends = tuple(local_count(view, length - count + i + 1) for i in range(count))
        yield Run(b0, b, local_count(view, start), ends)
        b0 = b


def _visible_parts(query: Tensor, view: CacheView, run: Run, scale: float) -> Iterator[Partial]:
    """Keys that every query sees, in chunks, then the last few, which only some see."""
    L = len(run.ends)
    if L == 0 or run.ends[-1] <= run.begin:
        return
    query = query[:, :L]
    shared = max(run.ends[0], run.begin)
    rows = fetch(view, run.b0, run.b1, run.begin, run.ends[-1], query.dtype)
    yield from _chunked(query, rows[:, : shared - run.begin], view.C, scale)
    tail = rows[:, shared - run.begin :]
    if tail.shape[1]:
        slot = torch.arange(shared, run.ends[-1], device=rows.device)
        ends = torch.tensor(run.ends, device=rows.device)
        yield partial(query, tail, view.C, scale, (slot < ends[:, None])[None])


def _chunked(query: Tensor, rows: Tensor, C: int, scale: float) -> Iterator[Partial]:
    """Partials over all of ``rows [b, S, C+R]``."""
    b, L, H, _ = query.shape
    S = rows.shape[1]
    begin = 0
    if b == 1:  # chunks become the batch of one product; with more rows they could not be a view
        most = max(1, MAX_SCORES // (L * H * KEYS_PER_CHUNK))
        while S - begin >= 2 * KEYS_PER_CHUNK:
            X = min(most, (S - begin) // KEYS_PER_CHUNK)
            end = begin + X * KEYS_PER_CHUNK
            chunks = rows[0, begin:end].unflatten(0, (X, KEYS_PER_CHUNK))
            part = partial(query.expand(X, -1, -1, -1), chunks, C, scale)
            yield Partial(*(x.unsqueeze(1) for x in part))
            begin = end
    size = max(1, min(4 * KEYS_PER_CHUNK, MAX_SCORES // (b * L * H)))
    for first in range(begin, S, size):
        yield partial(query, rows[:, first : first + size], C, scale)


def partial(
    query: Tensor, rows: Tensor, C: int, scale: float, seen: Tensor | None = None
) -> Partial:
    """Attention of ``query [b, L, H, C+R]`` over ``rows [b, n, C+R]``; ``seen [b|1, L, n]``."""
    L, H = query.shape[1:3]
    scores = torch.matmul(query.flatten(1, 2), rows.transpose(1, 2)).to(lse_dtype(query))
    scores = scores.mul_(scale).unflatten(1, (L, H))
    if seen is not None:
        scores = scores.masked_fill_(~seen[:, :, None], float("-inf"))
    top = scores.amax(-1)
    weights = scores.sub_(_finite(top)[..., None]).exp_()
    total = weights.sum(-1)
    # Normalised before the product: sums over a thousand keys would overflow float16.
    weights = weights.div_(_nonzero(total)[..., None]).to(rows.dtype)
    value = torch.matmul(weights.flatten(1, 2), rows[..., :C])
    return Partial(top, total, value.unflatten(1, (L, H)))


def combine(parts: list[Partial]) -> tuple[Tensor, Tensor]:
    """Merge partials; a leading chunk dim of 1 row in front is merged like separate parts."""
    flat: list[Partial] = []
    for part in parts:
        if part.top.ndim == 4:  # [X, 1, L, H]: chunks of one row
            flat.extend(Partial(*chunk) for chunk in zip(*(x.unbind(0) for x in part), strict=True))
        else:
            flat.append(part)
    if len(flat) == 1:
        top, total, value = flat[0]
        return value.to(top.dtype), top + torch.log(total)
    top = torch.stack([part.top for part in flat])
    highest = _finite(top.amax(0))
    weight = torch.exp(top - highest) * torch.stack([part.total for part in flat])
    total = weight.sum(0)
    share = weight / _nonzero(total)
    out = (share[..., None] * torch.stack([part.value for part in flat])).sum(0)
    return out, highest + torch.log(total)


def decode_masked(
    query: Tensor, view: CacheView, scale: float, query_lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same over the whole batch at once, without reading lengths on the host."""
    B, L, H, _ = query.shape
    rows, positions, stored = fetch_masked(view, query.dtype)
    token = torch.arange(L, device=query.device)
    count = torch.full_like(view.lengths, L) if query_lengths is None else query_lengths
    last = (view.lengths - count)[:, None] + token  # position of each query
    seen = stored[:, None] & (positions <= last[..., None]) & (token < count[:, None])[..., None]
    size = max(1, MAX_SCORES // max(1, B * L * H))
    parts = [
        partial(query, rows[:, s : s + size], view.C, scale, seen[..., s : s + size])
        for s in range(0, rows.shape[1], size)
    ]
    if parts:
        return combine(parts)
    out = query.new_zeros(B, L, H, view.C, dtype=lse_dtype(query))
    return out, torch.full_like(out[..., 0], float("-inf"))


def merge(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge ``out [X, .., W]`` by ``lse [X, ..]``; parts with lse = -inf may hold anything."""
    highest = _finite(lse.amax(0))
    weight = torch.exp(lse - highest)
    total = weight.sum(0)
    share = weight / _nonzero(total)
    used = torch.where((weight == 0)[..., None], torch.zeros_like(out), out)
    return (share[..., None] * used).sum(0), highest + torch.log(total)


def lse_dtype(query: Tensor) -> torch.dtype:
    """float32, or float64 for float64 queries: the dtype of sums, statistics and lse."""
    return torch.promote_types(query.dtype, torch.float32)


def _finite(top: Tensor) -> Tensor:
    """0 where no key was seen, so that ``-inf - top`` stays -inf instead of NaN."""
    return torch.where(top == float("-inf"), torch.zeros_like(top), top)


def _nonzero(total: Tensor) -> Tensor:
    """1 where no key was seen, so that 0 / 0 is 0."""
    return torch.where(total == 0, torch.ones_like(total), total)
