"""Attention from absorbed queries straight to the compressed cache.

Dims: B batch, L queries, H heads, S cached positions, C latent width, R rotated width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mla.checks import (
    FLOAT_DTYPES,
    ShapeError,
    bind_dims,
    require_device,
    require_int32,
    require_same,
)
from mla.kernels.eager.decode import lse_dtype
from mla.ops.library import (
    NUM_VIEW_ARGUMENTS,
    define,
    flatten_view,
    refuse_gradient,
    unflatten_view,
    view_schema,
)
from mla.ops.select import Case, Impl, kernel_for
from mla.view import CacheView


class AttentionOutput(NamedTuple):
    """Result of an attention op; ``lse`` is the natural log-sum-exp of the scores."""

    out: Tensor
    lse: Tensor


def _kernel(q_latent: Tensor, q_rope: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    view = unflatten_view(arguments[:NUM_VIEW_ARGUMENTS])
    scale, query_lengths, out_dtype, impl = arguments[NUM_VIEW_ARGUMENTS:]
    case = Case("mla_decode", q_latent.device.type, q_latent.dtype, view.codec.kind)
    decode = kernel_for(impl, case)
    check_values("mla_decode", "query_lengths", query_lengths, "L", q_latent.shape[1])
    result: tuple[Tensor, Tensor] = decode(
        q_latent, q_rope, view, scale, query_lengths, out_dtype or q_latent.dtype
    )
    return result


def _fake(q_latent: Tensor, q_rope: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    out = q_latent.new_empty(q_latent.shape, dtype=arguments[-2] or q_latent.dtype)
    lse = q_latent.new_empty(q_latent.shape[:3], dtype=lse_dtype(q_latent))
    return out, lse


_decode = define(
    "decode",
    f"(Tensor q_latent, Tensor q_rope, {view_schema()}, float scale, Tensor? query_lengths, "
    "ScalarType? out_dtype, str impl) -> (Tensor, Tensor)",
    _kernel,
    _fake,
)
refuse_gradient("mla_decode", "train through mla_prefill, or decode under torch.no_grad()")


def mla_decode(
    q_latent: Tensor,
    q_rope: Tensor,
    view: CacheView,
    *,
    scale: float,
    query_lengths: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> AttentionOutput:
    """Attend from absorbed queries to the compressed cache, without expanding K or V.

        scores_BLHS = scale * (q_latent_BLHC . latent_BSC + q_rope_BLHR . k_rope_BSR)
        out_BLHC    = softmax over S of scores_BLHS, applied to latent_BSC

    Query l of row b sits at position ``lengths[b] - query_lengths[b] + l`` and sees the keys from
    ``starts[b]`` up to its own. Not differentiable: the backward pass raises.

    Args:
        q_latent: ``[B, L, H, C]`` queries already multiplied by W_UK, float64 to bfloat16.
        q_rope: ``[B, L, H, R]`` rotated queries, dtype and device of ``q_latent``.
        view: taken after these L tokens were appended.
        scale: multiplies scores before softmax, ``config.scale``.
        query_lengths: ``[B]`` int32, how many of the L queries exist in each row; None: all.
        out_dtype: dtype of ``out``, by default that of ``q_latent``.
        impl: ``"auto"`` takes the first of `supported_impls`; any other value runs or raises.

    Returns:
        out: ``[B, L, H, C]``; 0 where a query sees no key or does not exist.
        lse: ``[B, L, H]`` natural log, float32 (float64 for float64 queries); ``-inf`` there.

    Raises:
        ShapeError: two arguments disagree about a size, dtype or device.
        UnsupportedError: ``impl`` cannot run this case; the message lists those that can.

    Source: DeepSeek-V2, arXiv:2405.04434, section 2.1; absorption as in `mla.absorb`.
    """
    sizes: dict[str, int] = {}
    bind_dims("mla_decode", "q_latent", q_latent, "B L H C", sizes)
    bind_dims("mla_decode", "q_rope", q_rope, "B L H R", sizes)
    require_same("mla_decode", "q_rope", q_rope, "q_latent", q_latent)
    view.bind_dims("mla_decode", sizes)
    require_device("mla_decode", "view.rows", view.rows, "q_latent", q_latent)
    if query_lengths is not None:
        check_lengths("mla_decode", "query_lengths", query_lengths, sizes, q_latent)
    check_out_dtype("mla_decode", out_dtype)
    return AttentionOutput(
        *_decode(q_latent, q_rope, *flatten_view(view), scale, query_lengths, out_dtype, impl)
    )


def check_out_dtype(op: str, out_dtype: torch.dtype | None) -> None:
    """Require a dtype that attention can be computed in, or None."""
    if out_dtype is not None and out_dtype not in FLOAT_DTYPES:
        raise ShapeError(f"{op}: out_dtype has value {out_dtype}, expected float64 to bfloat16")


def check_lengths(op: str, name: str, lengths: Tensor, sizes: dict[str, int], like: Tensor) -> None:
    """Require ``[B]`` int32 on the device of ``like``."""
    bind_dims(op, name, lengths, "B", sizes)
    require_int32(op, name, lengths)
    require_device(op, name, lengths, "the other tensors", like)


def check_values(op: str, name: str, lengths: Tensor | None, letter: str, most: int) -> None:
    """On a CPU: require values of 0 to ``most``. Called inside ops, so compiled code checks too."""
    if lengths is None or not lengths.is_cpu or lengths.numel() == 0:
        return
    low, high = int(lengths.min()), int(lengths.max())
    if low < 0 or high > most:
        raise ShapeError(f"{op}: {name} has values {low} to {high}, expected 0 to {letter}={most}")
