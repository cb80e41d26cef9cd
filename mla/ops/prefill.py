"""Expanded attention over fresh latents, differentiable, for training and prefill.

Dims: B batch, L queries, S keys, T packed tokens, H heads, C latent width, N unrotated width,
R rotated width, V value width.
"""

from __future__ import annotations

from typing import Any, Literal

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
from mla.kernels.eager.decode import lse_dtype
from mla.kernels.prefill_types import Masking, sizes_of
from mla.ops.decode import AttentionOutput, check_lengths, check_out_dtype, check_values
from mla.ops.library import LIBRARY, define, refuse_gradient
from mla.ops.select import Case, Impl, kernel_for

Save = Literal["latent", "expanded"]

_MASKING_SCHEMA = (
    "float scale, bool causal, Tensor? key_starts, Tensor? key_lengths, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_q, SymInt max_k"
)


def _masking(arguments: tuple[Any, ...]) -> tuple[float, Masking]:
    scale, *masking = arguments[:8]
    return scale, Masking(*masking)


def _case(query: Tensor, k_rope: Tensor, weight: Tensor, masking: Masking) -> Case:
    """The same for the forward and the backward pass."""
    _, N, R, V = sizes_of(query, k_rope, weight)
    num_keys = k_rope.shape[1] if masking.max_k is None else masking.max_k
    return Case(
        "mla_prefill",
        query.device.type,
        query.dtype,
        widths=(N + R, V),
        num_keys=num_keys,
    )


def _kernel(
    query: Tensor, latent: Tensor, k_rope: Tensor, weight: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    scale, masking = _masking(arguments[:8])
    out_dtype, save_expanded, impl = arguments[8:]
    prefill = kernel_for(impl, _case(query, k_rope, weight, masking))
    _check_values(masking, query.shape[1], latent.shape[1])
    result: tuple[Tensor, Tensor, Tensor] = prefill(
        query, latent, k_rope, weight, scale, masking, out_dtype or query.dtype, save_expanded
    )
    return result


def _fake(
    query: Tensor, latent: Tensor, k_rope: Tensor, weight: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    out_dtype, save_expanded, _ = arguments[8:]
    B, L, H, width = query.shape
    both = weight.shape[0] // H  # N + V
    V = both - (width - k_rope.shape[-1])
    out = query.new_empty(B, L, H, V, dtype=out_dtype or query.dtype)
    lse = query.new_empty(B, L, H, dtype=lse_dtype(query))
    shape = (B, latent.shape[1], H, both) if save_expanded else (0,)
    return out, lse, query.new_empty(shape)


_prefill = define(
    "prefill",
    "(Tensor query, Tensor latent, Tensor k_rope, Tensor kv_b_weight, "
    f"{_MASKING_SCHEMA}, ScalarType? out_dtype, bool save_expanded, str impl) "
    "-> (Tensor, Tensor, Tensor)",
    _kernel,
    _fake,
)


def _backward_kernel(
    grad_out: Tensor, grad_lse: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, latent, k_rope, weight, out, lse, expanded = arguments[:7]
    scale, masking = _masking(arguments[7:])
    case = _case(query, k_rope, weight, masking)
    backward = kernel_for(arguments[-1], case, "mla_prefill_backward")
    result: tuple[Tensor, Tensor, Tensor, Tensor] = backward(
        grad_out.to(query.dtype),
        grad_lse,
        query,
        latent,
        k_rope,
        weight,
        out,
        lse,
        expanded,
        scale,
        masking,
    )
    return result


_prefill_backward = define(
    "prefill_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor latent, Tensor k_rope, "
    f"Tensor kv_b_weight, Tensor out, Tensor lse, Tensor expanded, {_MASKING_SCHEMA}, "
    "str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_kernel,
    lambda grad_out, grad_lse, *arguments: tuple(torch.empty_like(x) for x in arguments[:4]),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, latent, k_rope, weight = inputs[:4]
    starts, lengths, cu_q, cu_k = inputs[6:10]
    ctx.save_for_backward(query, latent, k_rope, weight, *output, starts, lengths, cu_q, cu_k)
    ctx.scale, ctx.causal, ctx.max_sizes, ctx.impl = inputs[4], inputs[5], inputs[10:12], inputs[14]
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    *tensors, starts, lengths, cu_q, cu_k = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(tensors[4])
    grads = _prefill_backward(
        grad_out,
        grad_lse,
        *tensors,
        ctx.scale,
        ctx.causal,
        starts,
        lengths,
        cu_q,
        cu_k,
        *ctx.max_sizes,
        ctx.impl,
    )
    return *grads, *([None] * 11)


torch.library.register_autograd("mla::prefill", _backward, setup_context=_setup, lib=LIBRARY)
refuse_gradient("mla_prefill_backward", "gradients of gradients are not implemented")


def mla_prefill(
    query: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    kv_b_weight: Tensor,
    *,
    scale: float,
    causal: bool = True,
    key_starts: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_q: int | None = None,
    max_k: int | None = None,
    out_dtype: torch.dtype | None = None,
    save: Save = "latent",
    impl: Impl = "auto",
) -> AttentionOutput:
    """Attend over keys and values expanded from the latent, which are never kept.

        k_i = [W_UK_i latent | k_rope],  v_i = W_UV_i latent,  out_i = softmax(scale q_i k_i^T) v_i

    Causal masks are bottom-right: query l of row b sits at position ``key_lengths[b] - L + l``.
    Differentiable in query, latent, k_rope and kv_b_weight, also through lse.

    Args:
        query: ``[B, L, H, N+R]``, unrotated part first, or packed ``[T, H, N+R]``.
        latent: ``[B, S, C]`` or packed ``[T', C]``, dtype and device of ``query``.
        k_rope: ``[B, S, R]`` or packed ``[T', R]``, rotated.
        kv_b_weight: ``[H*(N+V), C]``, per head N key rows, then V value rows.
        scale: multiplies scores before softmax.
        causal: whether a query sees only keys up to its own position.
        key_starts: ``[B]`` int32, first visible key of each row; None: 0.
        key_lengths: ``[B]`` int32, one past the last visible key of each row; None: S.
        cu_seqlens_q, cu_seqlens_k: ``[sequences + 1]`` int32 boundaries of packed sequences,
            from 0 to T (T'); cu_seqlens_k defaults to cu_seqlens_q.
        max_q, max_k: host bounds of the packed lengths, by default T and T'.
        out_dtype: dtype of ``out``, by default that of ``query``.
        save: what autograd keeps for the backward pass: the ``"latent"``, from which keys and
            values are expanded again, or also the ``"expanded"`` keys and values, which costs
            H*(N+V) numbers a token and saves one product.
        impl: see `mla_decode`.

    Returns:
        out: ``[B, L, H, V]`` or ``[T, H, V]``; 0 where a query sees no key.
        lse: ``[B, L, H]`` or ``[T, H]``, float32 (float64 for float64); ``-inf`` there.

    Raises:
        ShapeError: two arguments disagree, or (on a CPU) lengths or boundaries do not add up.

    Source: DeepSeek-V2, arXiv:2405.04434, section 2.1; FlashAttention-2, arXiv:2307.08691.
    """
    packed = cu_seqlens_q is not None
    if save not in ("latent", "expanded"):
        raise UnsupportedError(
            f"mla_prefill: save has value {save!r}, expected 'latent' or 'expanded'"
        )
    sizes: dict[str, int] = {}
    tokens = ("T", "T'") if packed else ("B L", "B S")
    bind_dims("mla_prefill", "query", query, f"{tokens[0]} H E", sizes)
    bind_dims("mla_prefill", "latent", latent, f"{tokens[1]} C", sizes)
    bind_dims("mla_prefill", "k_rope", k_rope, f"{tokens[1]} R", sizes)
    bind_dims("mla_prefill", "kv_b_weight", kv_b_weight, "O C", sizes)
    _check_heads(sizes)
    named = (("latent", latent), ("k_rope", k_rope), ("kv_b_weight", kv_b_weight))
    for name, tensor in named:
        require_same("mla_prefill", name, tensor, "query", query)
    _check_masking(sizes, query, key_starts, key_lengths, cu_seqlens_q, cu_seqlens_k)
    check_out_dtype("mla_prefill", out_dtype)
    if packed:
        query, latent, k_rope = query[None], latent[None], k_rope[None]
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    out, lse, _ = _prefill(
        query,
        latent,
        k_rope,
        kv_b_weight,
        scale,
        causal,
        key_starts,
        key_lengths,
        cu_seqlens_q,
        cu_seqlens_k,
        query.shape[1] if max_q is None else max_q,
        latent.shape[1] if max_k is None else max_k,
        out_dtype,
        save == "expanded",
        impl,
    )
    return AttentionOutput(out[0], lse[0]) if packed else AttentionOutput(out, lse)


def _check_heads(sizes: dict[str, int]) -> None:
    E, R, H, both = sizes["E"], sizes["R"], sizes["H"], sizes["O"]
    if R > E:
        raise ShapeError(
            f"mla_prefill: k_rope has last dim {R}, expected at most {E}, the width of a query head"
        )
    if H == 0 or both % H or both // H <= E - R:
        raise ShapeError(
            f"mla_prefill: kv_b_weight has {both} rows, expected H*(N+V) with H={H}, N={E - R} "
            "and a positive V"
        )


def _check_masking(
    sizes: dict[str, int],
    query: Tensor,
    key_starts: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> None:
    packed = cu_seqlens_q is not None
    for name, lengths in (("key_starts", key_starts), ("key_lengths", key_lengths)):
        if lengths is not None and packed:
            raise ShapeError(f"mla_prefill: {name} has a value, expected None with cu_seqlens_q")
        if lengths is not None:
            check_lengths("mla_prefill", name, lengths, sizes, query)
    if cu_seqlens_k is not None and not packed:
        raise ShapeError("mla_prefill: cu_seqlens_q has value None, expected it with cu_seqlens_k")
    if cu_seqlens_q is None:
        return
    ends_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    for name, ends in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", ends_k)):
        require_device("mla_prefill", name, ends, "query", query)
    if ends_k.shape != cu_seqlens_q.shape:
        raise ShapeError(
            f"mla_prefill: cu_seqlens_k has shape {tuple(ends_k.shape)}, "
            f"expected {tuple(cu_seqlens_q.shape)} as cu_seqlens_q has"
        )


def _check_values(masking: Masking, num_queries: int, num_keys: int) -> None:
    """What can be read on a CPU; inside the op, so that compiled code checks too."""
    check_values("mla_prefill", "key_starts", masking.key_starts, "S", num_keys)
    check_values("mla_prefill", "key_lengths", masking.key_lengths, "S", num_keys)
    if masking.cu_seqlens_q is not None and masking.cu_seqlens_k is not None:
        check_boundaries("mla_prefill", "cu_seqlens_q", masking.cu_seqlens_q, num_queries)
        check_boundaries("mla_prefill", "cu_seqlens_k", masking.cu_seqlens_k, num_keys)


def check_boundaries(op: str, name: str, boundaries: Tensor, num_tokens: int) -> None:
    """Require int32 ``[sequences + 1]``; on a CPU also 0 = first <= .. <= last = num_tokens."""
    bind_dims(op, name, boundaries, "K", {})
    require_int32(op, name, boundaries)
    if boundaries.shape[0] == 0:
        raise ShapeError(f"{op}: {name} has shape (0,), expected at least one boundary, 0")
    if torch.compiler.is_compiling() or not boundaries.is_cpu:
        return
    values = boundaries.tolist()
    if values[0] != 0 or values[-1] != num_tokens or sorted(values) != values:
        raise ShapeError(
            f"{op}: {name} has values {_short(values)}, "
            f"expected 0 <= .. <= {num_tokens} from 0 to {num_tokens}, the number of tokens"
        )


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{values[0]}, .., {values[-1]}]"
