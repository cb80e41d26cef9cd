"""One decode step of the vLLM backend against the oracle, for the real vLLM and for a stand-in.

Dims: B requests, T their new tokens, L most new tokens of one, S cached positions, H heads,
C latent width, R rotated width.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from helpers import assert_lse_within_budget, assert_within_budget, stored_rows
from hypothesis import strategies as st
from strategies import DecodeCase, decode_cases
from torch import Tensor

from mla import reference
from mla.codec import PlainCodec
from mla.view import CacheView

F64 = torch.float64


def cases(**fixed: Any) -> st.SearchStrategy[DecodeCase]:
    """Requests with as many new tokens as they like, at least one, as vLLM schedules them."""
    B = st.integers(1, 4)
    options: dict[str, Any] = {
        "page_size": st.sampled_from([1, 3, 16]),
        "codec": PlainCodec(),
        "starts": None,
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        **fixed,
    }
    alone = B.flatmap(
        lambda n: decode_cases(
            lengths=st.tuples(*[st.integers(1, 40)] * n), L=1, query_lengths=None, **options
        )
    )
    several = B.flatmap(
        lambda n: decode_cases(
            lengths=st.tuples(*[st.integers(4, 40)] * n),
            query_lengths=st.tuples(*[st.integers(1, 4)] * n),
            L=4,
            **options,
        )
    )
    return st.one_of(alone, several)


def counts_of(case: DecodeCase) -> list[int]:
    return [case.L] * case.B if case.query_lengths is None else list(case.query_lengths)


def tokens(case: DecodeCase, x: Tensor) -> Tensor:
    """``[B, L, ..]`` -> ``[T, ..]``, the tokens that exist."""
    return torch.cat([row[:n] for row, n in zip(x, counts_of(case), strict=True)])


def metadata_of(backend: ModuleType, case: DecodeCase, view: CacheView) -> Any:
    starts = torch.tensor([0, *counts_of(case)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return backend.decode_metadata(view.page_table, view.lengths, starts)


def step(
    impl: Any, backend: ModuleType, case: DecodeCase, *, whole: bool = False, view: Any = None
) -> tuple[Tensor, Tensor]:
    """out ``[T, H, C]`` and lse ``[T, H]`` of the backend; ``whole``: queries in one tensor."""
    view = case.view() if view is None else view
    queries = tuple(tokens(case, x) for x in case.queries())
    q = torch.cat(queries, dim=-1) if whole else queries
    metadata = Metadata(metadata_of(backend, case, view))
    out, lse = impl.forward_mqa(q, view.rows, metadata, None)
    return out, lse


class Metadata:
    """What the backend reads of `MLACommonMetadata`."""

    def __init__(self, decode: Any) -> None:
        self.decode = decode


def check_step(impl: Any, backend: ModuleType, case: DecodeCase, *, whole: bool) -> None:
    """The step of ``impl`` is the oracle's, within what plain PyTorch loses in the same dtype."""
    view = case.view()
    out, lse = step(impl, backend, case, whole=whole, view=view)
    T = sum(counts_of(case))
    assert (out.shape, out.dtype) == ((T, case.H, case.C), case.dtype)
    assert (lse.shape, lse.dtype) == ((T, case.H), torch.float32)
    assert out.is_contiguous(), "vLLM calls view on it"
    oracle, plain = (oracle_step(case, view, dtype) for dtype in (F64, case.dtype))
    assert_within_budget(out, oracle[0], plain[0], "out")
    assert_lse_within_budget(lse, oracle[1], plain[1], least=(case.C + case.R) ** 0.5)


def oracle_step(case: DecodeCase, view: CacheView, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    latent, k_rope = (x.to(dtype) for x in stored_rows(view, case.S))
    q_latent, q_rope = (x.to(dtype) for x in case.queries())
    result = reference.absorbed_attention(
        q_latent,
        q_rope,
        latent,
        k_rope,
        torch.tensor(case.lengths),
        scale=case.scale,
        query_lengths=case.counts(),
    )
    return tokens(case, result.out), tokens(case, result.lse)
