"""Expanded attention over fresh latents, backward, without atomics: the same bits every time.

    weights_LS  = exp(scale * scores_LS - lse_L)
    d_value_SV  = weights_LS^T d_out_LV
    d_scores_LS = weights_LS * (d_out_LV . value_SV - delta_L),   delta = out . d_out - d_lse
    d_query_L   = scale * d_scores_LS key_S,   d_key_S = scale * d_scores_LS^T query_L

One kernel owns a tile of keys and walks over queries, another owns queries and walks over keys, so
scores are computed twice and nothing is added through memory. The gradient of the shared rotated
key is written for each head in float32 and summed in a fixed order. Gradients of the latent and of
the weight are matrix products of the library, as the gradient of any linear layer is.

Dims: T query tokens, T' key tokens, H heads, h heads of one group, C latent width, N unrotated
width, R rotated width, V value width.
Oracle: autograd through mla.reference.expanded_attention. Source: FlashAttention-2,
arXiv:2307.08691, section 3.1.2.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mla.kernels import launch
from mla.kernels.expand import expand
from mla.kernels.prefill_backward_keys import prefill_backward_keys_kernel
from mla.kernels.prefill_backward_queries import prefill_backward_queries_kernel
from mla.kernels.prefill_operands import flatten
from mla.kernels.prefill_tiles import LOG2_E
from mla.kernels.prefill_types import Gradients, Masking

BLOCK_T = 32  # tokens of one program of `prefill_delta_kernel`, which is bound by memory


@triton.jit(do_not_specialize=["T", "H"])
def prefill_delta_kernel(
    out_ptr,  # [T, H, V] contiguous
    d_out_ptr,  # [T, H, V] contiguous
    lse_ptr,  # [T, H] float32, contiguous
    d_lse_ptr,  # [T, H] contiguous, or None
    log2_lse_ptr,  # [H, T] float32: inf where a query sees nothing
    delta_ptr,  # [H, T] float32
    T,
    H,
    V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    head = tl.program_id(1)
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    v = tl.arange(0, BLOCK_V)
    lse_T = tl.load(lse_ptr + t * H + head, mask=t < T, other=float("-inf"))
    is_row_T = lse_T != float("-inf")
    mask_TV = is_row_T[:, None] & (v < V)[None, :]
    place = (t * H + head)[:, None] * V + v[None, :]
    out_TV = tl.load(out_ptr + place, mask=mask_TV, other=0.0).to(tl.float32)
    d_out_TV = tl.load(d_out_ptr + place, mask=mask_TV, other=0.0).to(tl.float32)
    delta_T = tl.sum(out_TV * d_out_TV, axis=1)
    if d_lse_ptr is not None:
        delta_T -= tl.load(d_lse_ptr + t * H + head, mask=is_row_T, other=0.0).to(tl.float32)
    log2_lse_T = tl.where(is_row_T, lse_T * LOG2_E, float("inf"))
    place = head.to(tl.int64) * T + t
    tl.store(delta_ptr + place, delta_T, mask=t < T)
    tl.store(log2_lse_ptr + place, log2_lse_T, mask=t < T)


def prefill_backward(
    grad_out: Tensor,  # [B, L, H, V]
    grad_lse: Tensor | None,  # [B, L, H]
    query: Tensor,  # [B, L, H, N+R]
    latent: Tensor,  # [B, S, C]
    k_rope: Tensor,  # [B, S, R]
    kv_b_weight: Tensor,  # [H*(N+V), C]
    out: Tensor,  # [B, L, H, V]
    lse: Tensor,  # [B, L, H]
    expanded: Tensor,  # [B, S, H, N+V], or empty
    scale: float,
    masking: Masking,
) -> Gradients:
    """Gradients of query, latent, k_rope and kv_b_weight."""
    operands = flatten(query, latent, k_rope, kv_b_weight, masking)
    H, N, R, V = operands.sizes
    T, num_keys = operands.query.shape[0], operands.latent.shape[0]
    # Queries outside every packed sequence are written by no program.
    d_query = query.new_zeros(T, H, N + R)
    d_latent = torch.zeros_like(operands.latent, dtype=torch.float32)
    d_k_rope = torch.zeros_like(operands.k_rope, dtype=torch.float32)
    d_weight = torch.zeros_like(operands.weight)
    if T and num_keys and operands.num_sequences:
        seen = operands.seen_tokens()
        seen_latent = operands.latent
        new = torch.empty if seen is None else torch.zeros  # unseen keys are written by no program
        if seen is not None:  # 0 times NaN is NaN: it must not reach the gradient of the weight
            seen_latent = seen_latent.masked_fill(~seen[:, None], 0)
        d_out = grad_out.reshape(T, H, V).contiguous()
        log2_lse, delta = _prepare(out.reshape(T, H, V), d_out, lse, grad_lse)
        shared: dict[str, Any] = {"d_out_ptr": d_out, "log2_lse_ptr": log2_lse, "delta_ptr": delta}
        shared |= {"T": T, "scale": scale}
        for heads in operands.head_groups(copies=2):
            weight = operands.weight[heads]
            is_saved = expanded.numel() > 0
            kv = expanded.flatten(0, 1)[:, heads] if is_saved else expand(operands.latent, weight)
            d_kv = new(kv.shape, dtype=kv.dtype, device=kv.device)
            d_rope = new((*kv.shape[:2], R), dtype=torch.float32, device=kv.device)
            operands.launch(
                prefill_backward_keys_kernel, "keys", heads, kv,
                d_kv_ptr=d_kv, d_rope_ptr=d_rope, **shared,
            )  # fmt: skip
            operands.launch(
                prefill_backward_queries_kernel, "queries", heads, kv, d_q_ptr=d_query, **shared
            )
            d_k_rope += d_rope.sum(1)
            d_rows = d_kv.flatten(1)
            d_latent += d_rows @ weight.flatten(0, 1)
            d_weight[heads] = (d_rows.T @ seen_latent).unflatten(0, weight.shape[:2])
    return Gradients(
        _like(query, d_query),
        _like(latent, d_latent),
        _like(k_rope, d_k_rope),
        _like(kv_b_weight, d_weight),
    )


def _like(x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with dtype, shape and strides of ``empty_like(x)``, as the op promises."""
    gradient = gradient.to(x.dtype).view(x.shape)
    return gradient if x.is_contiguous() else torch.empty_like(x).copy_(gradient)


def _prepare(
    out: Tensor, d_out: Tensor, lse: Tensor, d_lse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``[H, T]`` lse in base 2 and delta."""
    T, H, V = out.shape
    log2_lse = torch.empty(H, T, dtype=torch.float32, device=out.device)
    delta = torch.empty_like(log2_lse)
    launch.run(
        prefill_delta_kernel, (triton.cdiv(T, BLOCK_T), H), out.device,
        out.contiguous(), d_out, lse.contiguous(), None if d_lse is None else d_lse.contiguous(),
        log2_lse, delta, T, H, V=V, BLOCK_T=BLOCK_T, BLOCK_V=triton.next_power_of_2(V),
    )  # fmt: skip
    return log2_lse, delta
