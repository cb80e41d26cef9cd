"""What the tests of the faces of other libraries share: drawn caches, and the oracle without mask.

Dims: B batch, L queries, S cached positions, H heads, C latent width, R rotated width.
"""

from __future__ import annotations

from typing import Any

import torch
from helpers import stored_rows
from hypothesis import strategies as st
from strategies import DecodeCase, decode_cases
from torch import Tensor

from mla import reference
from mla.codec import Codec, Fp8Codec, PlainCodec
from mla.view import CacheView

CODECS: tuple[Codec, ...] = (PlainCodec(), Fp8Codec())


def face_cases(**fixed: Any) -> st.SearchStrategy[DecodeCase]:
    """Paged caches without left padding, 16-bit and wider or in fp8 rows; empty rows included."""
    options: dict[str, Any] = {
        "page_size": st.sampled_from([1, 3, 16]),
        "codec": st.sampled_from(CODECS),
        "starts": None,
        "query_lengths": None,
        "L": st.integers(1, 5),
    }
    return decode_cases(**{**options, **fixed})


def attend(
    case: DecodeCase, view: CacheView, *, causal: bool, scale: float, dtype: torch.dtype
) -> reference.Attention:
    """out ``[B, L, H, C]`` and lse ``[B, L, H]`` of the stored rows; without ``causal`` each query
    is asked alone, as the last of its row."""
    latent, k_rope = (x.to(dtype) for x in stored_rows(view, case.S))
    q_latent, q_rope = (x.to(dtype) for x in case.queries())
    lengths = torch.tensor(case.lengths)

    def asked(q_latent: Tensor, q_rope: Tensor, **options: Any) -> reference.Attention:
        return reference.absorbed_attention(
            q_latent, q_rope, latent, k_rope, lengths, scale=scale, **options
        )

    if causal:
        return asked(q_latent, q_rope, query_lengths=case.counts())
    alone = [asked(q_latent[:, [i]], q_rope[:, [i]]) for i in range(case.L)]
    return reference.Attention(*(torch.cat(parts, dim=1) for parts in zip(*alone, strict=True)))
