"""The oracle: every formula of the package, written to be read, in any dtype up to float64.

Nothing fast imports this file and it imports nothing of the package, so that a mistake cannot
hide in both. It materialises all scores; use it for small sizes.

Dims: B batch, L queries, S keys, H heads, C latent width, N unrotated width, R rotated width,
V value width, X parts.
Source: DeepSeek-V2, arXiv:2405.04434, section 2.1; online softmax, arXiv:1805.02867.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor


class Attention(NamedTuple):
    out: Tensor
    lse: Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dim."""
    scaled = x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return scaled if weight is None else scaled * weight


def rotate(x: Tensor, angles: Tensor, pairing: str) -> Tensor:
    """Rotate pair l of the last dim by ``angles[.., l]``, as complex multiplication.

    ``interleaved`` pairs (x0, x1), (x2, x3) ..; ``half`` pairs (x0, x_R/2), (x1, x_R/2+1) ..
    """
    if pairing == "none":
        return x
    layout = "... (l two) -> ... l two" if pairing == "interleaved" else "... (two l) -> ... l two"
    pairs = rearrange(x, layout, two=2)
    real, imag = pairs.unbind(-1)
    turned = torch.stack(
        [
            real * angles.cos() - imag * angles.sin(),
            real * angles.sin() + imag * angles.cos(),
        ],
        dim=-1,
    )
    back = "... l two -> ... (l two)" if pairing == "interleaved" else "... l two -> ... (two l)"
    return rearrange(turned, back)


def visible_keys(
    num_queries: int,
    num_keys: int,
    lengths: Tensor,
    *,
    starts: Tensor | None = None,
    query_lengths: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """Which keys each query sees, ``[B, L, S]`` bool.

    Query l of row b sits at position ``lengths[b] - query_lengths[b] + l``. It sees the keys in
    ``[starts[b], lengths[b])``, with ``causal`` only those up to its own position. Queries from
    ``query_lengths[b]`` on do not exist and see nothing.
    """
    lengths = lengths.long()
    starts = torch.zeros_like(lengths) if starts is None else starts.long()
    count = torch.full_like(lengths, num_queries) if query_lengths is None else query_lengths.long()
    query = torch.arange(num_queries, device=lengths.device)
    key = torch.arange(num_keys, device=lengths.device)
    position = rearrange(lengths - count, "b -> b 1") + query
    exists = query < rearrange(count, "b -> b 1")
    stored = (key >= rearrange(starts, "b -> b 1")) & (key < rearrange(lengths, "b -> b 1"))
    seen = rearrange(stored, "b s -> b 1 s") & rearrange(exists, "b l -> b l 1")
    if causal:
        seen = seen & (key <= rearrange(position, "b l -> b l 1"))
    return seen


def _attend(scores: Tensor, values: Tensor, seen: Tensor, equation: str) -> Attention:
    """Softmax over the seen keys; 0 and -inf where there is none. NaN in unseen values is inert."""
    seen = rearrange(seen, "b l s -> b l 1 s")
    scores = scores.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - torch.where(lse.isinf(), torch.zeros_like(lse), lse).unsqueeze(-1))
    used = seen.any(dim=1).any(dim=1)  # [B, S]
    used = used.reshape(used.shape + (1,) * (values.ndim - 2))
    values = values.masked_fill(~used, 0.0)
    return Attention(einsum(weights, values, equation), lse)


def absorbed_attention(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    starts: Tensor | None = None,
    query_lengths: Tensor | None = None,
) -> Attention:
    """Attention from absorbed queries to latents.

        scores = scale * (q_latent . latent + q_rope . k_rope);  out = softmax(scores) latent

    Args:
        q_latent, q_rope: ``[B, L, H, C]`` and ``[B, L, H, R]``.
        latent, k_rope: ``[B, S, C]`` and ``[B, S, R]``, dequantised rows.
        lengths, starts, query_lengths: ``[B]`` integers, see `visible_keys`.

    Returns:
        out ``[B, L, H, C]`` (0 where no key is seen) and lse ``[B, L, H]`` (-inf there).
    """
    seen = visible_keys(
        q_latent.shape[1], latent.shape[1], lengths, starts=starts, query_lengths=query_lengths
    )
    scores = einsum(q_latent, latent, "b l h c, b s c -> b l h s")
    scores = scale * (scores + einsum(q_rope, k_rope, "b l h r, b s r -> b l h s"))
    return _attend(scores, latent, seen, "b l h s, b s c -> b l h c")


def expanded_attention(
    query: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    kv_b_weight: Tensor,
    *,
    num_heads: int,
    value_dim: int,
    scale: float,
    causal: bool = True,
    key_starts: Tensor | None = None,
    key_lengths: Tensor | None = None,
    query_lengths: Tensor | None = None,
) -> Attention:
    """Attention over keys and values expanded from the latent.

        k_i = [W_UK_i c | k_rope];  v_i = W_UV_i c;  out_i = softmax(scale * q_i . k_i) v_i

    Args:
        query: ``[B, L, H, N+R]``, unrotated part first.
        latent, k_rope: ``[B, S, C]`` and ``[B, S, R]``.
        kv_b_weight: ``[H*(N+V), C]``, per head N key rows, then V value rows.

    Returns:
        out ``[B, L, H, V]`` and lse ``[B, L, H]``.
    """
    B, S, _ = latent.shape
    R = k_rope.shape[-1]
    N = query.shape[-1] - R
    weight = rearrange(kv_b_weight, "(h d) c -> h d c", h=num_heads)
    w_uk, w_uv = weight.split([N, value_dim], dim=1)
    k_nope = einsum(latent, w_uk, "b s c, h n c -> b s h n")
    values = einsum(latent, w_uv, "b s c, h v c -> b s h v")
    keys = torch.cat([k_nope, repeat(k_rope, "b s r -> b s h r", h=num_heads)], dim=-1)
    if key_lengths is None:
        key_lengths = torch.full((B,), S, dtype=torch.int64, device=latent.device)
    seen = visible_keys(
        query.shape[1],
        S,
        key_lengths,
        starts=key_starts,
        query_lengths=query_lengths,
        causal=causal,
    )
    scores = scale * einsum(query, keys, "b l h d, b s h d -> b l h s")
    return _attend(scores, values, seen, "b l h s, b s h v -> b l h v")


def merge_partials(out: Tensor, lse: Tensor) -> Attention:
    """Merge attention over disjoint key sets, ``[X, .., W]`` and ``[X, ..]`` into ``[.., W]``.

        lse = log sum_X exp(lse_X);  out = sum_X exp(lse_X - lse) out_X

    A part with lse = -inf saw no key and may hold anything, NaN included.
    """
    total = torch.logsumexp(lse, dim=0)
    top = torch.where(total.isinf(), torch.zeros_like(total), total)
    weight = torch.exp(lse - top).unsqueeze(-1)
    merged = (weight * torch.where(weight == 0, torch.zeros_like(out), out)).sum(0)
    return Attention(merged, total)


# --- stored rows ---------------------------------------------------------------------------


def _align(num_bytes: int) -> int:
    return -(-num_bytes // 16) * 16


def hadamard(size: int) -> Tensor:
    """The orthonormal Sylvester-Hadamard matrix, ``[size, size]`` float64, size a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat(
            [torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)]
        )
    return matrix / math.sqrt(size)


def decode_row(
    row: bytes, kind: str, C: int, R: int, *, group: int, rope_bits: int, rotation: bool
) -> tuple[list[float], list[float]]:
    """One coded row, byte by byte: the published layout transcribed with the struct module.

    Sections ``values | scales | rope``, each starting at a multiple of 16 bytes. Values: one
    byte each (``fp8`` e4m3, ``int8``) or two to a byte, the even one in the low nibble, offset
    by 8 (``int4``). Scales: one per ``group`` values, float32 (float16 for ``int4``); with
    ``rope_bits == 8`` one more for the rope part. Rope: bfloat16, or int8.
    """
    import struct

    scale_size, scale_code = (2, "<e") if kind == "int4" else (4, "<f")
    num_groups = -(-C // group)
    scales_at = _align(-(-C // 2) if kind == "int4" else C)
    num_scales = num_groups + (rope_bits == 8)
    rope_at = _align(scales_at + scale_size * num_scales)
    scales = [
        struct.unpack_from(scale_code, row, scales_at + scale_size * i)[0]
        for i in range(num_scales)
    ]
    latent = []
    for i in range(C):
        if kind == "int4":
            value = float(((row[i // 2] >> (4 * (i % 2))) & 15) - 8)
        elif kind == "int8":
            value = float(struct.unpack_from("<b", row, i)[0])
        else:
            value = _e4m3(row[i])
        latent.append(value * scales[i // group])
    if rotation:
        size = math.gcd(C, 128)
        blocks = torch.tensor(latent, dtype=torch.float64).view(-1, size)
        latent = (blocks @ hadamard(size)).flatten().tolist()
    if rope_bits == 8:
        rope = [struct.unpack_from("<b", row, rope_at + i)[0] * scales[-1] for i in range(R)]
    else:
        halves = struct.unpack_from(f"<{R}H", row, rope_at)
        rope = [struct.unpack("<f", struct.pack("<I", half << 16))[0] for half in halves]
    return latent, rope


def _e4m3(byte: int) -> float:
    """Sign, 4 exponent bits with bias 7, 3 mantissa bits; all ones is NaN."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)
