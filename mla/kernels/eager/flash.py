"""One rectangle of softmax attention with its log-sum-exp, forward and backward.

    out = softmax(scale * q k^T) v        causal: query l sees keys 0 .. l (sizes are equal then)

On a CPU, and in 16 bits on CUDA, this is PyTorch's fused attention, called below
`scaled_dot_product_attention` because that hides the log-sum-exp. Elsewhere blocks of queries go
through matrix products, which bounds the memory of the scores.

Dims: b rows, h heads, L queries, S keys, E width of queries, keys and values.
Source: FlashAttention-2, arXiv:2307.08691, sections 2.3 and 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_SCORES = 1 << 26  # elements of one block of scores: 256 MiB in float32


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """out ``[b, h, L, E]`` and lse ``[b, h, L]`` (float32, or float64 for float64)."""
    if q.is_cpu:
        result: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, scale=scale
        )
        return result
    if is_fused_on_cuda(q):
        return cuda_forward(q, k, v, causal, scale)
    return blocked_forward(q, k, v, causal, scale)


def is_fused_on_cuda(q: Tensor) -> bool:
    """Whether PyTorch's flash attention for CUDA takes these queries, and their gradients."""
    if not q.is_cuda or torch.version.hip is not None or q.dtype.itemsize != 2:
        return False
    capability = torch.cuda.get_device_capability(q.device)
    widest = 256 if capability in ((8, 0), (9, 0), (10, 0)) else 192  # shared memory
    is_built = torch.backends.cuda.is_flash_attention_available()
    return is_built and capability >= (8, 0) and q.shape[-1] <= widest


def cuda_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """`flash_forward` by PyTorch's flash attention for CUDA, whose widths are multiples of 8."""
    q, k, v, width = *_aligned(q, k, v), q.shape[-1]
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    out, lse, *_ = attend(q, k, v, 0.0, causal, scale=scale)
    return out[..., :width], lse


def blocked_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """`flash_forward` on any device: blocks of queries through matrix products."""
    blocks = []
    for begin, end in _query_blocks(q, k):
        scores = _scores(q[:, :, begin:end], k, causal, begin, scale)
        lse = torch.logsumexp(scores, dim=-1)
        weights = torch.exp(scores.sub_(lse[..., None])).to(v.dtype)
        blocks.append((weights @ v[:, :, : scores.shape[-1]], lse))
    outs, lses = zip(*blocks, strict=True)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def flash_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v; ``out`` and ``lse`` may be those of a larger set of keys."""
    if q.is_cpu:
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads: tuple[Tensor, Tensor, Tensor] = backward(
            d_out, q, k, v, out.to(q.dtype), lse, 0.0, causal, scale=scale
        )
        return grads
    if is_fused_on_cuda(q):
        return cuda_backward(d_out, q, k, v, out, lse, causal, scale)
    return blocked_backward(d_out, q, k, v, out, lse, causal, scale)


def cuda_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`flash_backward` by PyTorch's flash attention for CUDA."""
    width, sizes = q.shape[-1], (q.shape[2], k.shape[2])
    d_out, q, k, v, out = _aligned(d_out, q, k, v, out.to(q.dtype))
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # the state of a dropout of 0
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    none = None, None  # boundaries of packed sequences
    dq, dk, dv = backward(
        d_out, q, k, v, out, lse.contiguous(), *none, *sizes, 0.0, causal, unused, unused,
        scale=scale,
    )  # fmt: skip
    return dq[..., :width], dk[..., :width], dv[..., :width]


def _aligned(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Rows padded by zeros to a multiple of 8 numbers."""
    return tuple(F.pad(x, (0, -x.shape[-1] % 8)) for x in tensors)


def blocked_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`flash_backward` on any device."""
    sum_dtype = torch.promote_types(q.dtype, torch.float32)
    dq = torch.empty_like(q)
    dk, dv = torch.zeros_like(k, dtype=sum_dtype), torch.zeros_like(v, dtype=sum_dtype)
    delta = (d_out.to(sum_dtype) * out).sum(-1, keepdim=True)
    for begin, end in _query_blocks(q, k):
        block = slice(begin, end)
        scores = _scores(q[:, :, block], k, causal, begin, scale)
        S = scores.shape[-1]
        weights = torch.exp(scores.sub_(lse[:, :, block, None]))
        dv[:, :, :S] += weights.to(v.dtype).mT @ d_out[:, :, block]
        d_weights = (d_out[:, :, block] @ v[:, :, :S].mT).to(sum_dtype)
        d_scores = (weights * (d_weights - delta[:, :, block]) * scale).to(q.dtype)
        dq[:, :, block] = d_scores @ k[:, :, :S]
        dk[:, :, :S] += d_scores.mT @ q[:, :, block]
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _query_blocks(q: Tensor, k: Tensor) -> list[tuple[int, int]]:
    b, h, L, _ = q.shape
    size = max(16, MAX_SCORES // (b * h * k.shape[2]))
    return [(begin, min(begin + size, L)) for begin in range(0, L, size)]


def _scores(q: Tensor, k: Tensor, causal: bool, begin: int, scale: float) -> Tensor:
    """Scores of queries ``begin ..`` on the keys that the last of them sees."""
    L = q.shape[2]
    if causal:
        k = k[:, :, : begin + L]
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)).mul_(scale)
    if causal:
        query = torch.arange(begin, begin + L, device=q.device)
        later = torch.arange(k.shape[2], device=q.device) > query[:, None]
        scores.masked_fill_(later, float("-inf"))
    return scores
