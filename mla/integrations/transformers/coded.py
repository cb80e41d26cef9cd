"""Coded rows under transformers' cache contract: appended once, read where they lie.

A layer that holds uint8 rows cannot hand out latents and keys as tensors without decoding all of
them at every step. Its ``update`` returns the `CacheView` of its rows in place of the keys and the
new tokens, as they were before they were coded, in place of the values; a replaced attention layer
passes both on untouched to `attend.attend_view`.

Dims: B batch, L new tokens, C latent width, R rotated width, Z capacity, W bytes of one row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mla.checks import UnsupportedError
from mla.codec import Codec
from mla.ops import mla_append
from mla.ops.append import Rows
from mla.view import CacheView


def append_coded(
    rows: Tensor,
    lengths: Tensor,
    max_length: int,
    latent: Tensor,
    k_rope: Tensor,
    codec: Codec,
) -> tuple[CacheView, Rows]:
    """Code the new tokens behind the ones that are there; ``rows`` is changed in place.

    Args:
        rows: ``[B, Z, W]`` uint8.
        lengths: ``[B]`` int32, the new tokens counted.
        max_length: host bound of ``lengths``.
        latent, k_rope: ``[B, 1, L, C]`` and ``[B, 1, L, R]`` of one dtype.
        codec: of the rows.

    Returns:
        The view of all rows, and the new tokens ``[B, L, C]`` and ``[B, L, R]`` unquantised.

    Raises:
        UnsupportedError: a gradient would have to pass through coded rows; nothing is written.
    """
    refuse_gradient(latent, k_rope)
    C, R = latent.shape[-1], k_rope.shape[-1]
    view = CacheView(  # not validated: a compiled graph cannot see where rows begin
        rows=rows,
        page_table=None,
        lengths=lengths,
        starts=None,
        C=C,
        R=R,
        codec=codec,
        max_length=max_length,
    )
    fresh = Rows(latent[:, 0], k_rope[:, 0])
    mla_append(view, *fresh)
    return view, fresh


def refuse_gradient(latent: Tensor, k_rope: Tensor) -> None:
    """Raise where autograd records the new tokens: it would silently see constants later on."""
    if torch.is_grad_enabled() and (latent.requires_grad or k_rope.requires_grad):
        raise UnsupportedError(
            "LatentCache.update: latents have requires_grad=True, expected False for coded rows, "
            "which carry no gradient; train with use_cache=False, or call the model under "
            "torch.no_grad()"
        )
