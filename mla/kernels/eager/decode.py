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
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mla.checks import ShapeError
from mla.codec import rotate_latent
from mla.kernels.eager.rows import fetch, fetch_masked, local_count
from mla.view import CacheView

# Chunks of 256-1024 keys measured alike, and 1.1-2.2x faster than one product over 2048-8192 keys
# (batch 1, 16 heads, C=512, R=64, 2-core Zen 5, torch 2.13).
KEYS_PER_CHUNK = 512
MAX_SCORES = 1 << 24  # elements of one block of scores: 64 MiB in float32
MAX_WIDENED = 1 << 24  # elements of 16-bit rows that are float32 for a moment: 64 MiB


class Partial(NamedTuple):
    """Attention over some keys; its log-sum-exp is ``top + log(total)``.

    With a dim in front: over that many disjoint sets of keys.
    """

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
    if query.numel() == 0:
        out, lse = _nothing_seen(query, view.C)
    elif query.is_cpu:
        out, lse = _decode_runs(query, view, scale, query_lengths)
    else:
        out, lse = decode_masked(query, view, scale, query_lengths)
    if view.codec.rotation:
        out = rotate_latent(out)
    return out.to(out_dtype), lse


def _decode_runs(
    query: Tensor, view: CacheView, scale: float, query_lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run by run, on exact slices."""
    L = query.shape[1]
    longest = 2 * KEYS_PER_CHUNK if _is_narrow(query) else None
    runs = list(_runs(view, L, query_lengths, longest))
    if len(runs) == 1 and len(runs[0].ends) == L:
        parts = list(_visible_parts(query, view, runs[0], scale))
        return combine(parts) if parts else _nothing_seen(query, view.C)
    out, lse = _nothing_seen(query, view.C)
    for run in runs:
        parts = list(_visible_parts(query[run.b0 : run.b1], view, run, scale))
        if parts:
            at = (slice(run.b0, run.b1), slice(0, len(run.ends)))
            out[at], lse[at] = combine(parts)
    return out, lse


def _nothing_seen(query: Tensor, C: int) -> tuple[Tensor, Tensor]:
    out = query.new_zeros(*query.shape[:-1], C, dtype=lse_dtype(query))
    return out, torch.full_like(out[..., 0], float("-inf"))


def _runs(
    view: CacheView, L: int, query_lengths: Tensor | None, longest: int | None = None
) -> Iterator[Run]:
    """Group consecutive rows with the same start, length and query count.

    Rows of ``longest`` positions or more stay alone.
    """
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
        start, length, count = rows[b0]
        if b < len(rows) and rows[b] == rows[b0] and (longest is None or length < longest):
            continue
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
    b, L, H, W = query.shape
    S = rows.shape[1]
    is_narrow = _is_narrow(query)
    begin = 0
    # Chunks become the batch of one product; with more rows they could not be a view.
    if b == 1 and (not is_narrow or _multiplies(query.dtype)):
        least = KEYS_PER_CHUNK if is_narrow else 2 * KEYS_PER_CHUNK
        most = max(1, MAX_SCORES // (L * H * KEYS_PER_CHUNK))
        while S - begin >= least:
            X = min(most, (S - begin) // KEYS_PER_CHUNK)
            end = begin + X * KEYS_PER_CHUNK
            chunks = rows[0, begin:end].unflatten(0, (X, KEYS_PER_CHUNK))
            part = partial(query.expand(X, -1, -1, -1), chunks, C, scale)
            yield Partial(*(x.unsqueeze(1) for x in part))
            begin = end
    size = max(1, min(4 * KEYS_PER_CHUNK, MAX_SCORES // (b * L * H)))
    if is_narrow:
        query = query.float()
        size = max(1, min(size, MAX_WIDENED // (b * W)))
    for first in range(begin, S, size):
        yield partial(query, rows[:, first : first + size].to(query.dtype), C, scale)


# Where a processor multiplies bfloat16, oneDNN is fast on contiguous matrices of shapes it has
# seen: it copies others, and compiles a kernel for each new shape (1.2 ms), which the last chunk of
# a growing cache always is. So full chunks go to it as they are, row by row, and the rest becomes
# float32, as does everything where it has no product (float16: 12.3 -> 1.8 ms). One thread of a
# Zen 5 core, torch 2.13, 16 heads, C=512, R=64: 1.03 -> 0.71 ms for 1 row of 2049 keys, 7.0 -> 3.3
# for 4 rows.
def _is_narrow(query: Tensor) -> bool:
    return query.is_cpu and query.dtype in (torch.bfloat16, torch.float16)


@lru_cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has a fast product of this 16-bit dtype on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    ops = torch.ops.mkldnn
    is_supported = (
        ops._is_mkldnn_bf16_supported if dtype is torch.bfloat16 else ops._is_mkldnn_fp16_supported
    )
    return bool(is_supported())


def partial(
    query: Tensor, rows: Tensor, C: int, scale: float, seen: Tensor | None = None
) -> Partial:
    """Attention of ``query [b, L, H, C+R]`` over ``rows [b, n, C+R]``; ``seen [b|1, L, n]``."""
    L, H = query.shape[1:3]
    scores = torch.bmm(query.flatten(1, 2), rows.transpose(1, 2)).to(lse_dtype(query))
    scores = scores.mul_(scale).unflatten(1, (L, H))
    if seen is not None:
        scores = scores.masked_fill_(~seen[:, :, None], float("-inf"))
    top = scores.amax(-1)
    weights = scores.sub_((top if seen is None else _finite(top))[..., None]).exp_()
    total = weights.sum(-1)
    # Normalised before the product: sums over a thousand keys would overflow float16.
    divisor = total if seen is None else _nonzero(total)
    weights = weights.div_(divisor[..., None]).to(rows.dtype)
    # Cropped afterwards where oneDNN would copy the rows to crop them before.
    keys = rows if _is_narrow(rows) else rows[..., :C]
    value = torch.bmm(weights.flatten(1, 2), keys)[..., :C]
    return Partial(top, total, value.unflatten(1, (L, H)))


def combine(parts: list[Partial]) -> tuple[Tensor, Tensor]:
    """Merge partials, those that cover several sets of keys (a dim in front) included."""
    if len(parts) == 1 and parts[0].top.ndim == 3:
        top, total, value = parts[0]
        return value.to(top.dtype), top + torch.log(total)
    stacked = [part if part.top.ndim == 4 else Partial(*(x[None] for x in part)) for part in parts]
    top, total, value = (torch.cat(x) for x in zip(*stacked, strict=True))
    highest = _finite(top.amax(0))
    weight = torch.exp(top - highest) * total
    total = weight.sum(0)
    share = weight / _nonzero(total)
    out = (share[..., None] * value).sum(0)
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
    return combine(parts) if parts else _nothing_seen(query, view.C)


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
