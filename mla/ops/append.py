"""Write new rows into the cache and read old ones back.

Dims: B batch, L new tokens, E fetched positions, C latent width, R rotated width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mla.checks import ShapeError, UnsupportedError, bind_dims, require_device, require_same
from mla.ops.decode import check_lengths, check_values
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

_ADVICE = "append under torch.no_grad() or detach the rows"


class Rows(NamedTuple):
    """Latents ``[B, *, C]`` and shared rotated keys ``[B, *, R]``."""

    latent: Tensor
    k_rope: Tensor


def _check_room(op: str, view: CacheView, L: int, new_lengths: Tensor | None) -> None:
    """On a CPU: every new token has a position in the cache. Elsewhere that is the caller's."""
    check_values(op, "new_lengths", new_lengths, "L", L)
    if not view.lengths.is_cpu or view.batch_size == 0:
        return
    low = int((view.lengths - (L if new_lengths is None else new_lengths)).min())
    high = int(view.lengths.max())
    if low < 0 or high > view.capacity:
        raise ShapeError(
            f"{op}: view.lengths has new rows at positions {low} to {high}, "
            f"expected 0 to {view.capacity}; reserve the new rows first"
        )


def _append_kernel(*arguments: Any) -> None:
    view = unflatten_view(arguments[:NUM_VIEW_ARGUMENTS])
    latent, k_rope, new_lengths, impl = arguments[NUM_VIEW_ARGUMENTS:]
    case = Case("mla_append", latent.device.type, latent.dtype, view.codec.kind)
    append = kernel_for(impl, case)
    _check_room("mla_append", view, latent.shape[1], new_lengths)
    append(view, latent, k_rope, new_lengths)


_append = define(
    "append",
    f"({view_schema(mutated=True)}, Tensor latent, Tensor k_rope, Tensor? new_lengths, "
    "str impl) -> ()",
    _append_kernel,
    lambda *arguments: None,
)


def mla_append(
    view: CacheView,
    latent: Tensor,
    k_rope: Tensor,
    *,
    new_lengths: Tensor | None = None,
    impl: Impl = "auto",
) -> None:
    """Code new rows and write them into ``view.rows``, changed in place.

    Token l < new_lengths[b] goes to position ``lengths[b] - new_lengths[b] + l``; the lengths
    already count the new tokens. Only positions that this shard holds are written. No gradient
    flows into the cache.

    Args:
        view: where to write.
        latent: ``[B, L, C]`` normalised latents; converted to the dtype of the rows.
        k_rope: ``[B, L, R]`` rotated keys, dtype and device of ``latent``.
        new_lengths: ``[B]`` int32, 0 to L; None: all L.
        impl: see `mla_decode`.

    Raises:
        ShapeError: sizes, dtypes or devices disagree, or (on a CPU, where lengths can be read) a
            position lies outside the cache; nothing has been written then.
    """
    sizes: dict[str, int] = {}
    bind_dims("mla_append", "latent", latent, "B L C", sizes)
    bind_dims("mla_append", "k_rope", k_rope, "B L R", sizes)
    require_same("mla_append", "k_rope", k_rope, "latent", latent)
    view.bind_dims("mla_append", sizes)
    require_device("mla_append", "view.rows", view.rows, "latent", latent)
    if new_lengths is not None:
        check_lengths("mla_append", "new_lengths", new_lengths, sizes, latent)
    _append(*flatten_view(view), latent.detach(), k_rope.detach(), new_lengths, impl)


def _fused_kernel(*arguments: Any) -> tuple[Tensor, Tensor]:
    view = unflatten_view(arguments[:NUM_VIEW_ARGUMENTS])
    kv_a, norm_weight, cos, sin, eps, latent_scale, pairing, new_lengths, impl = arguments[
        NUM_VIEW_ARGUMENTS:
    ]
    case = Case("mla_append", kv_a.device.type, kv_a.dtype, view.codec.kind)
    fused = kernel_for(impl, case, "mla_norm_rope_append")
    _check_room("mla_norm_rope_append", view, kv_a.shape[1], new_lengths)
    result: tuple[Tensor, Tensor] = fused(
        view, kv_a, norm_weight, cos, sin, eps, latent_scale, pairing, new_lengths
    )
    return result


def _fused_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    C, R = arguments[4:6]
    kv_a = arguments[NUM_VIEW_ARGUMENTS]
    return kv_a.new_empty(*kv_a.shape[:2], C), kv_a.new_empty(*kv_a.shape[:2], R)


_norm_rope_append = define(
    "norm_rope_append",
    f"({view_schema(mutated=True)}, Tensor kv_a, Tensor? norm_weight, Tensor cos, Tensor sin, "
    "float eps, float latent_scale, str pairing, Tensor? new_lengths, str impl) "
    "-> (Tensor, Tensor)",
    _fused_kernel,
    _fused_fake,
)


def mla_norm_rope_append(
    view: CacheView,
    kv_a: Tensor,
    norm_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float,
    latent_scale: float = 1.0,
    pairing: str,
    new_lengths: Tensor | None = None,
    impl: Impl = "auto",
) -> Rows:
    """Normalise, rotate and append in one pass; ``view.rows`` is changed in place.

        latent = latent_scale * RMS(kv_a[:C]) * norm_weight;  k_rope = RoPE(kv_a[C:])

    Args:
        view: where to write, as in `mla_append`.
        kv_a: ``[B, L, C+R]``, output of ``kv_a_proj_with_mqa``.
        norm_weight: ``[C]``, or None for no norm.
        cos, sin: ``[B, L, R/2]``, see `mla.rope.cos_sin`; ignored with pairing ``"none"``.
        eps: of the norm.
        latent_scale: multiplies the latent after the norm.
        pairing: ``"interleaved"``, ``"half"`` or ``"none"``.
        new_lengths: ``[B]`` int32, 0 to L; None: all L.
        impl: see `mla_decode`.

    Returns:
        The fresh latent ``[B, L, C]`` and key ``[B, L, R]``, unquantised.

    Raises:
        ShapeError, UnsupportedError: as `mla_append`; nothing has been written then.
    """
    op = "mla_norm_rope_append"
    if pairing not in ("interleaved", "half", "none"):
        raise UnsupportedError(
            f"{op}: pairing has value {pairing!r}, expected 'interleaved', 'half' or 'none'"
        )
    sizes = {"B": view.batch_size, "W": view.C + view.R, "C": view.C, "K": view.R // 2}
    bind_dims(op, "kv_a", kv_a, "B L W", sizes)
    require_device(op, "view.rows", view.rows, "kv_a", kv_a)
    if norm_weight is not None:
        bind_dims(op, "norm_weight", norm_weight, "C", sizes)
        require_same(op, "norm_weight", norm_weight, "kv_a", kv_a)
    if pairing != "none":
        bind_dims(op, "cos", cos, "B L K", sizes)
        bind_dims(op, "sin", sin, "B L K", sizes)
    if new_lengths is not None:
        check_lengths(op, "new_lengths", new_lengths, sizes, kv_a)
    weight = None if norm_weight is None else norm_weight.detach()
    return Rows(
        *_norm_rope_append(
            *flatten_view(view),
            kv_a.detach(),
            weight,
            cos,
            sin,
            eps,
            latent_scale,
            pairing,
            new_lengths,
            impl,
        )
    )


def _gather_kernel(*arguments: Any) -> tuple[Tensor, Tensor]:
    view = unflatten_view(arguments[:NUM_VIEW_ARGUMENTS])
    begin, end, dtype, impl = arguments[NUM_VIEW_ARGUMENTS:]
    gather = kernel_for(impl, Case("mla_gather", view.rows.device.type, dtype, view.codec.kind))
    result: tuple[Tensor, Tensor] = gather(view, begin, end, dtype)
    return result


def _gather_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    rows, lengths, C, R = arguments[0], arguments[2], arguments[4], arguments[5]
    begin, end, dtype, _ = arguments[NUM_VIEW_ARGUMENTS:]
    shape = (lengths.shape[0], end - begin)
    return rows.new_empty(*shape, C, dtype=dtype), rows.new_empty(*shape, R, dtype=dtype)


_gather = define(
    "gather",
    f"({view_schema()}, SymInt begin, SymInt end, ScalarType dtype, str impl) -> (Tensor, Tensor)",
    _gather_kernel,
    _gather_fake,
)
refuse_gradient("mla_gather", _ADVICE)


def mla_gather(
    view: CacheView, begin: int, end: int, *, dtype: torch.dtype, impl: Impl = "auto"
) -> Rows:
    """Dequantised rows at positions ``[begin, end)``; 0 where no key is stored.

    Args:
        view: where to read.
        begin, end: positions, ``0 <= begin <= end``.
        dtype: of the result.
        impl: see `mla_decode`.

    Returns:
        latent ``[B, E, C]`` and k_rope ``[B, E, R]`` with E = end - begin.

    Raises:
        ShapeError: ``begin`` and ``end`` are no range.
    """
    if not 0 <= begin <= end:
        raise ShapeError(
            f"mla_gather: begin, end have values {begin}, {end}, expected 0 <= begin <= end"
        )
    return Rows(*_gather(*flatten_view(view), begin, end, dtype, impl))
