"""What the property tests draw: sizes that differ and are no powers of two, and whole cases.

Dims: B batch, L queries, S keys, H heads, C latent, N unrotated, R rotated, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from helpers import make_view, randn
from hypothesis import strategies as st
from torch import Tensor

from mla.codec import Codec, Fp8Codec, Int4Codec, Int8Codec, PlainCodec
from mla.view import CacheView

SEEDS = st.integers(0, 2**31 - 1)
HEADS = st.sampled_from([1, 3, 9, 20])
LATENT_WIDTHS = st.sampled_from([5, 7, 24, 40, 130])  # odd ones, and several groups of scales
ROPE_WIDTHS = st.sampled_from([0, 2, 6, 10])
PAGE_SIZES = st.sampled_from([None, 1, 3, 16])
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CODED: tuple[Codec, ...] = (
    Fp8Codec(),
    Fp8Codec(group=32, rotation=True),
    Int8Codec(),
    Int8Codec(group=16, rope_bits=8),
    Int4Codec(),
    Int4Codec(group=32, rope_bits=8),
    Int4Codec(group=16, rotation=False),
)
CODECS: tuple[Codec, ...] = (PlainCodec(), *CODED)


@dataclass(frozen=True)
class DecodeCase:
    """A cache and the queries on it."""

    L: int
    H: int
    C: int
    R: int
    lengths: tuple[int, ...]
    starts: tuple[int, ...] | None
    query_lengths: tuple[int, ...] | None
    page_size: int | None
    codec: Codec
    dtype: torch.dtype
    magnitudes: tuple[float, float]  # of the latent and of the rotated key
    seed: int

    @property
    def B(self) -> int:
        return len(self.lengths)

    @property
    def S(self) -> int:
        return max(self.lengths)

    @property
    def scale(self) -> float:
        by_latent, by_rope = self.magnitudes
        return (self.C + self.R) ** -0.5 / (by_latent * by_rope)

    def rows(self) -> tuple[Tensor, Tensor]:
        """``[B, S, C]`` and ``[B, S, R]`` float64."""
        latent = randn(self.B, self.S, self.C, seed=self.seed, dtype=torch.float64)
        k_rope = randn(self.B, self.S, self.R, seed=self.seed + 1, dtype=torch.float64)
        return latent * self.magnitudes[0], k_rope * self.magnitudes[1]

    def queries(self) -> tuple[Tensor, Tensor]:
        """``[B, L, H, C]`` and ``[B, L, H, R]``; both halves weigh the same in the scores."""
        q_latent = randn(self.B, self.L, self.H, self.C, seed=self.seed + 2, dtype=torch.float64)
        q_rope = randn(self.B, self.L, self.H, self.R, seed=self.seed + 3, dtype=torch.float64)
        return (
            (q_latent * self.magnitudes[1]).to(self.dtype),
            (q_rope * self.magnitudes[0]).to(self.dtype),
        )

    def view(self, shard: tuple[int, int] = (0, 1)) -> CacheView:
        return make_view(
            *self.rows(),
            list(self.lengths),
            codec=self.codec,
            dtype=self.dtype,
            starts=None if self.starts is None else list(self.starts),
            page_size=self.page_size,
            shard=shard,
            seed=self.seed,
        )

    def counts(self) -> Tensor | None:
        """``query_lengths`` as the ops take it."""
        if self.query_lengths is None:
            return None
        return torch.tensor(self.query_lengths, dtype=torch.int32)


@st.composite
def decode_cases(draw: Any, **fixed: Any) -> DecodeCase:
    """Drawn cases; a keyword fixes a field (or, as a strategy, draws it in another way)."""

    def pick(name: str, strategy: Any) -> Any:
        value = fixed.get(name, strategy)
        return draw(value) if isinstance(value, st.SearchStrategy) else value

    L = pick("L", st.integers(1, 9))
    length = st.one_of(st.integers(0, 2), st.integers(3, 40))
    lengths = pick("lengths", st.lists(length, min_size=1, max_size=3).map(tuple))
    at_most = [st.integers(0, n) for n in lengths]
    counts = st.tuples(*[st.integers(0, L)] * len(lengths))
    return DecodeCase(
        L=L,
        H=pick("H", HEADS),
        C=pick("C", LATENT_WIDTHS),
        R=pick("R", ROPE_WIDTHS),
        lengths=lengths,
        starts=pick("starts", st.none() | st.tuples(*at_most)),
        query_lengths=pick("query_lengths", st.none() | counts),
        page_size=pick("page_size", PAGE_SIZES),
        codec=pick("codec", st.just(PlainCodec())),
        dtype=pick("dtype", st.sampled_from(DTYPES)),
        magnitudes=pick("magnitudes", st.sampled_from([(1.0, 1.0), (10.0, 0.1), (0.1, 10.0)])),
        seed=pick("seed", SEEDS),
    )
