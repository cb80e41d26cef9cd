"""The two calls of FlashMLA that decode from a paged cache, on the ops of this package.

    from mla.integrations.flash_mla import flash_mla_with_kvcache, get_mla_metadata

Covered: dense attention over ``[pages, page_size, 1, C+R]`` caches in 16 bits (32 and 64 too) and
over fp8 caches of 656-byte rows (``512 e4m3 | 4 float32 scales | 64 bf16``, and the same layout for
other C and R), causal or not, several queries a row, any page size, any number of heads, on every
device the package runs on. Both styles of call: with the two scheduler tensors, and with the one
opaque object that newer versions return. How keys are split is decided inside the kernels here, so
neither is read: they are checked for their form and cost nothing.

What differs: fp8 rows are attended densely, where the original has them with ``indices`` only.

Raises `UnsupportedError`, by name: ``indices``, ``attn_sink``, ``extra_k_cache``,
``extra_indices_in_kvcache``, ``topk_length``, ``extra_topk_length`` (sparse attention), and more
than one key-value head. ``flash_mla_sparse_fwd`` and the varlen prefill functions are not here.

At this edge only, the log-sum-exp of a query that sees no key is ``+inf`` and its dims are
``[B, H, L]``, as in the original; `mla.ops.mla_decode` has ``-inf`` and ``[B, L, H]``.

Dims: B batch, L queries, H heads, P pages, Z positions in one page, M table width, C latent width,
R rotated width, W bytes of an fp8 row.
Source: signatures of github.com/deepseek-ai/FlashMLA, flash_mla/flash_mla_interface.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mla.checks import (
    ShapeError,
    UnsupportedError,
    bind_dims,
    require_device,
    require_int32,
    require_same,
)
from mla.codec import Fp8Codec
from mla.integrations.faces import decode, refuse
from mla.ops.decode import check_values
from mla.view import CacheView

NAME = "flash_mla_with_kvcache"
METADATA_SIZE = 8  # int32 numbers for each part of the schedule
BYTE_DTYPES = (torch.uint8, torch.int8, torch.float8_e4m3fn)


@dataclass
class FlashMLASchedMeta:
    """The opaque object of the new style of call: it remembers what it was first used for.

    Attributes:
        sizes: of the first call, by name; None before it.
    """

    sizes: dict[str, Any] | None = None


def get_mla_metadata(
    cache_seqlens: Tensor | None = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
) -> tuple[FlashMLASchedMeta | Tensor, Tensor | None]:
    """What `flash_mla_with_kvcache` wants as ``tile_scheduler_metadata`` and ``num_splits``.

    Without arguments the pair of the new style, an opaque object and None. With ``cache_seqlens``
    the two tensors of the old style, which never change with its values: a captured graph may go
    on using them.

    Args:
        cache_seqlens: ``[B]`` int32.
        num_q_tokens_per_head_k, num_heads_k, num_heads_q, is_fp8_kvcache: not needed here.
        topk: of sparse attention; None.

    Returns:
        Old style: ``[1, 8]`` int32, one part with all the work, and ``[B+1]`` int32, one split in
        each row.

    Raises:
        ShapeError: ``cache_seqlens`` is not ``[B]`` int32.
        UnsupportedError: ``topk`` has a value.
    """
    refuse("get_mla_metadata", topk=topk)
    if cache_seqlens is None:
        return FlashMLASchedMeta(), None
    bind_dims("get_mla_metadata", "cache_seqlens", cache_seqlens, "B", {})
    require_int32("get_mla_metadata", "cache_seqlens", cache_seqlens)
    options: dict[str, Any] = {"dtype": torch.int32, "device": cache_seqlens.device}
    num_splits = torch.arange(cache_seqlens.shape[0] + 1, **options)
    return torch.zeros(1, METADATA_SIZE, **options), num_splits


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta | Tensor,
    num_splits: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of absorbed queries to a paged cache of latents, read in place.

    Args:
        q: ``[B, L, H, C+R]``, latent part first.
        k_cache: ``[P, Z, 1, C+R]`` in the dtype of ``q``; with ``is_fp8_kvcache`` ``[P, Z, 1, W]``
            of a one-byte dtype, rows of `mla.Fp8Codec`, starting at multiples of 16 bytes.
        block_table: ``[B, M]`` int32; entries beyond the pages of a row may be anything.
        cache_seqlens: ``[B]`` int32, one past the last position of each row.
        head_dim_v: C.
        tile_scheduler_metadata, num_splits: what `get_mla_metadata` returned, in either style.
        softmax_scale: multiplies scores; None: ``(C+R) ** -0.5``.
        causal: query l of row b sees keys up to position ``cache_seqlens[b] - L + l``; otherwise
            all queries see all keys.

    Returns:
        out ``[B, L, H, C]``, dtype of ``q``, 0 where a query sees no key; and lse ``[B, H, L]``,
        natural log, float32 (float64 for float64 queries), ``+inf`` there.

    Raises:
        ShapeError: two arguments disagree about a size, dtype or device.
        UnsupportedError: an argument of sparse attention has a value.
    """
    refuse(
        NAME,
        indices=indices,
        attn_sink=attn_sink,
        extra_k_cache=extra_k_cache,
        extra_indices_in_kvcache=extra_indices_in_kvcache,
        topk_length=topk_length,
        extra_topk_length=extra_topk_length,
    )
    view = _view(q, k_cache, block_table, cache_seqlens, head_dim_v, is_fp8_kvcache)
    sizes = {
        "shape of q": tuple(q.shape),
        "page_size": k_cache.shape[1],
        "causal": causal,
        "is_fp8_kvcache": is_fp8_kvcache,
    }
    _check_schedule(tile_scheduler_metadata, num_splits, view, sizes)
    out, lse = decode(
        q[..., :head_dim_v],
        q[..., head_dim_v:],
        view,
        scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        causal=causal,
    )
    return out, lse.masked_fill(lse == -math.inf, math.inf).transpose(1, 2).contiguous()


def _view(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    is_fp8_kvcache: bool,
) -> CacheView:
    """The cache as the ops see it, no copy."""
    sizes: dict[str, int] = {}
    bind_dims(NAME, "q", q, "B L H D", sizes)
    bind_dims(NAME, "k_cache", k_cache, "P Z K W", sizes)
    if sizes["K"] != 1:
        raise UnsupportedError(
            f"{NAME}: k_cache has {sizes['K']} key-value heads, expected 1, the shared latent"
        )
    if not 0 < head_dim_v <= sizes["D"]:
        raise ShapeError(
            f"{NAME}: head_dim_v has value {head_dim_v}, expected 1 to {sizes['D']}, "
            "the last dim of q"
        )
    for name, tensor, dims in (
        ("block_table", block_table, "B M"),
        ("cache_seqlens", cache_seqlens, "B"),
    ):
        if tensor is None:
            raise UnsupportedError(
                f"{NAME}: {name} has value None, expected a tensor; there is dense attention only"
            )
        bind_dims(NAME, name, tensor, dims, sizes)
        require_int32(NAME, name, tensor)
        require_device(NAME, name, tensor, "q", q)
    assert block_table is not None and cache_seqlens is not None
    C, R = head_dim_v, sizes["D"] - head_dim_v
    codec = Fp8Codec() if is_fp8_kvcache else None
    width = codec.row_width(C, R) if codec else C + R
    if sizes["W"] != width:
        raise ShapeError(
            f"{NAME}: k_cache has shape {tuple(k_cache.shape)}, expected a last dim of {width} "
            f"for C={C}, R={R}{' in fp8' if codec else ''}"
        )
    if codec is None:
        require_same(NAME, "k_cache", k_cache, "q", q)
    else:
        require_device(NAME, "k_cache", k_cache, "q", q)
        if k_cache.dtype not in BYTE_DTYPES:
            raise ShapeError(
                f"{NAME}: k_cache has dtype {k_cache.dtype}, expected one of {BYTE_DTYPES} "
                "with is_fp8_kvcache"
            )
        k_cache = k_cache.view(torch.uint8)
    capacity = sizes["M"] * sizes["Z"]
    check_values(NAME, "cache_seqlens", cache_seqlens, "M*Z", capacity)
    return CacheView.paged(k_cache[:, :, 0], block_table, cache_seqlens, C=C, R=R, codec=codec)


def _check_schedule(
    metadata: FlashMLASchedMeta | Tensor,
    num_splits: Tensor | None,
    view: CacheView,
    sizes: dict[str, Any],
) -> None:
    """Require what one style has; an object keeps to what it was first used for."""
    if isinstance(metadata, FlashMLASchedMeta):
        if num_splits is not None:
            raise ShapeError(f"{NAME}: num_splits has a value, expected None beside the object")
        first = metadata.sizes or sizes
        for name, value in sizes.items():
            if value != first[name]:
                raise ShapeError(
                    f"{NAME}: {name} has value {value}, expected {first[name]} as in the first "
                    "call with this tile_scheduler_metadata; get_mla_metadata makes another"
                )
        metadata.sizes = first
        return
    bind_dims(NAME, "tile_scheduler_metadata", metadata, f"parts {METADATA_SIZE}", {})
    require_int32(NAME, "tile_scheduler_metadata", metadata)
    if num_splits is not None:
        bind_dims(NAME, "num_splits", num_splits, str(view.batch_size + 1), {})
        require_int32(NAME, "num_splits", num_splits)
