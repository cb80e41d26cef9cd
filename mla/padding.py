"""Padded rows: a key mask as one run of real tokens in each row, and the positions it implies.

Dims: B batch, L new tokens, S keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mla.cache import LatentCache
from mla.checks import ShapeError, UnsupportedError


class Runs(NamedTuple):
    """A key mask as one run of real tokens in each row: ``[starts[b], ends[b])``."""

    starts: Tensor  # [B] int32
    ends: Tensor  # [B] int32


def runs_of(op: str, attn_mask: Tensor, B: int, L: int, cache: LatentCache | None) -> Runs:
    """The new tokens' part of ``attn_mask``, ``[B, L]`` or ``[B, S]`` bool, as runs.

    Raises:
        ShapeError: another shape or dtype, or a row with gaps (not looked for in compiled code).
        UnsupportedError: left padding behind what is cached.
    """
    past = 0 if cache is None else cache.max_length
    if attn_mask.dtype != torch.bool or tuple(attn_mask.shape) not in ((B, L), (B, past + L)):
        raise ShapeError(
            f"{op}: attn_mask has shape {tuple(attn_mask.shape)} and dtype "
            f"{attn_mask.dtype}, expected [B={B}, {L}] or [B={B}, {past + L}] bool"
        )
    fresh = attn_mask[:, attn_mask.shape[1] - L :]
    ends = L - fresh.flip(1).int().argmax(1)
    count = fresh.sum(1)
    ends = torch.where(count == 0, 0, ends)
    starts = ends - count
    if not torch.compiler.is_compiling():
        position = torch.arange(L, device=fresh.device)
        run = (position >= starts[:, None]) & (position < ends[:, None])
        if not torch.equal(run, fresh):
            raise ShapeError(f"{op}: attn_mask has a row with gaps, expected one run of True a row")
        if past and bool((starts > 0).any()):
            raise UnsupportedError(
                f"{op}: attn_mask has left padding, expected that only with an empty cache"
            )
    return Runs(starts.int(), ends.int())


def default_positions(
    hidden_states: Tensor,
    cache: LatentCache | None,
    runs: Runs | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Positions counted from the first real token of each row, ``[B, L]`` or ``[L]``."""
    L = hidden_states.shape[1]
    token = torch.arange(L, device=hidden_states.device)
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens, token.int(), right=True) - 1
        return token - cu_seqlens[sequence]
    if cache is None:
        return token if runs is None else (token - runs.starts[:, None]).clamp(min=0)
    new_lengths = cache.new_lengths(L)
    first = cache.lengths - (L if new_lengths is None else new_lengths)
    if cache.starts is not None:
        first = first - cache.starts
    return (first[:, None] + token).clamp(min=0)
