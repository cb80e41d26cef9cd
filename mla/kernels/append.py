"""Append new rows: latent norm, rotation, coding and store of each token in one pass.

    latent = latent_scale * RMS(kv_a[:C]) * norm_weight,  k_rope = RoPE(kv_a[C:]),  row = code(both)

One program writes one token. Coded bytes equal those of mla.codec: divisions round to nearest,
integers and e4m3 values to nearest even, and fp8 scales are powers of two found from the bits.

Dims: B batch, L new tokens, C latent width, R rotated width, G scale groups, Z positions in one
page, M page-table width.
Oracle: mla.reference.decode_row, rms_norm, rotate. Source: layouts of mla.codec.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from mla.config import Pairing
from mla.kernels import launch
from mla.kernels.tiles import FP8, INT8, PLAIN, hadamard, nearest
from mla.view import CacheView

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds a float32 to an integer


@triton.jit
def round_even(x):
    """Nearest integer, ties to even, for magnitudes below 2**22."""
    return (x + ROUND) - ROUND


@triton.jit
def power_of_two_above(x):
    """The smallest power of two that is at least ``x``, for normal positive float32."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def float_to_e4m3(x):
    """Bytes of the nearest e4m3 values, ties to even, for magnitudes up to 448."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    # Drop 20 of 23 mantissa bits with rounding, then move the exponent's bias from 127 to 7.
    rounded = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
    normal = rounded - (120 << 3)
    tiny = round_even(magnitude.to(tl.float32, bitcast=True) * 512.0).to(tl.int32)
    code = tl.where(magnitude < 0x3C800000, tiny, normal)  # below 2**-6 the spacing is 2**-9
    return (sign | code).to(tl.uint8)


@triton.jit(do_not_specialize=["M", "shard_index", "L"])
def append_kernel(
    latent_ptr,  # [B, L, *] strides below; last dim contiguous
    k_rope_ptr,  # [B, L, *]
    norm_ptr,  # [C] or unused
    cos_ptr,  # [B, L, R/2] or unused
    sin_ptr,
    fresh_latent_ptr,  # [B, L, C] contiguous, the result before coding, or unused
    fresh_rope_ptr,  # [B, L, R]
    rows_ptr,  # [P, Z, *] rows as elements (plain) or bytes
    table_ptr,  # [B, M] int32; unused for the dense layout
    lengths_ptr,  # [B] int32
    new_lengths_ptr,  # [B] int32 or unused
    latent_stride_b,
    latent_stride_l,
    rope_stride_b,
    rope_stride_l,
    cos_stride_b,
    cos_stride_l,
    eps,
    latent_scale,
    rotation_scale,
    page_stride,
    slot_stride,
    M,
    shard_index,
    L,
    C: tl.constexpr,
    R: tl.constexpr,
    GROUP: tl.constexpr,
    HADAMARD: tl.constexpr,  # block size of the rotation, 1 for none
    Z: tl.constexpr,  # positions in one page; 0: dense
    KIND: tl.constexpr,
    SCALES_AT: tl.constexpr,  # begin of the scales in a row, in elements of rows_ptr
    ROPE_AT: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    ROPE_BITS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    PAIRING: tl.constexpr,  # 0 none, 1 interleaved, 2 half
    IS_FUSED: tl.constexpr,  # writes the fresh latent and key
    HAS_NEW_LENGTHS: tl.constexpr,
    SHARDS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,  # at least R/2
    ROUND_BF16: tl.constexpr,
):
    token = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)  # int64: offsets into the pool can pass 2**31
    c = tl.arange(0, BLOCK_C)
    is_c = c < C
    x = tl.load(
        latent_ptr + b * latent_stride_b + token * latent_stride_l + c, mask=is_c, other=0.0
    ).to(tl.float32)
    if HAS_NORM:
        mean = tl.sum(x * x, axis=0) / C
        weight = tl.load(norm_ptr + c, mask=is_c, other=0.0).to(tl.float32)
        x = x * tl.math.rsqrt(mean + eps) * weight
        x = nearest(x, latent_ptr, ROUND_BF16)
    if IS_FUSED:
        x = nearest(x * latent_scale, latent_ptr, ROUND_BF16)

    # Pairs of the rotated part; without rotation any split into two halves will do.
    k = tl.arange(0, BLOCK_K)
    is_first = k < (R + 1) // 2
    is_second = k < R // 2
    if PAIRING == 1:
        at_first = 2 * k
        at_second = 2 * k + 1
    else:
        at_first = k
        at_second = k + (R + 1) // 2
    key_at = k_rope_ptr + b * rope_stride_b + token * rope_stride_l
    first = tl.load(key_at + at_first, mask=is_first, other=0.0).to(tl.float32)
    second = tl.load(key_at + at_second, mask=is_second, other=0.0).to(tl.float32)
    if PAIRING != 0:
        angle_at = b * cos_stride_b + token * cos_stride_l + k
        cos = tl.load(cos_ptr + angle_at, mask=is_second, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle_at, mask=is_second, other=0.0).to(tl.float32)
        turned = first * cos - second * sin
        second = second * cos + first * sin
        first = turned
    first = nearest(first, k_rope_ptr, ROUND_BF16)
    second = nearest(second, k_rope_ptr, ROUND_BF16)
    if IS_FUSED:
        fresh = b * L + token
        tl.store(fresh_latent_ptr + fresh * C + c, x, mask=is_c)
        tl.store(fresh_rope_ptr + fresh * R + at_first, first, mask=is_first)
        tl.store(fresh_rope_ptr + fresh * R + at_second, second, mask=is_second)

    count = tl.load(new_lengths_ptr + b) if HAS_NEW_LENGTHS else L
    position = tl.load(lengths_ptr + b) - count + token
    if Z > 0:
        column = position // Z
        if (token >= count) | (column % SHARDS != shard_index):
            return
        page = tl.load(table_ptr + b * M + column // SHARDS).to(tl.int64)
        offset = page * page_stride + (position % Z).to(tl.int64) * slot_stride
    else:
        if token >= count:
            return
        offset = b * page_stride + position.to(tl.int64) * slot_stride
    row = rows_ptr + offset
    out_rope = row + ROPE_AT
    if KIND != PLAIN:
        scale_type: tl.constexpr = tl.float16 if SCALE_BITS == 16 else tl.float32
        scale_at = (row + SCALES_AT).to(tl.pointer_type(scale_type), bitcast=True)
        if ROPE_BITS == 16:
            out_rope = out_rope.to(tl.pointer_type(tl.bfloat16), bitcast=True)

    if KIND == PLAIN:
        tl.store(row + c, nearest(x, rows_ptr, ROUND_BF16), mask=is_c)
    else:
        if HADAMARD > 1:
            x = hadamard(x, BLOCK_C, HADAMARD) * rotation_scale
        grouped = tl.reshape(x, [BLOCK_C // GROUP, GROUP])
        amax = tl.max(tl.abs(grouped), axis=1)
        if KIND == FP8:
            scale = power_of_two_above(tl.maximum(tl.div_rn(amax, 448.0), 1e-4))
        elif KIND == INT8:
            scale = tl.div_rn(amax, 127.0)
        else:
            scale = tl.minimum(tl.div_rn(amax, 7.0), 65504.0).to(tl.float16).to(tl.float32)
        has_nan = tl.max((grouped != grouped).to(tl.int32), axis=1)
        scale = tl.where(has_nan > 0, float("nan"), scale)  # codes cannot say NaN, scales can
        g = tl.arange(0, BLOCK_C // GROUP)
        tl.store(scale_at + g, scale, mask=g * GROUP < C)
        safe = tl.where(scale == 0.0, 1.0, scale)
        ratio = tl.div_rn(grouped, tl.broadcast_to(safe[:, None], grouped.shape))
        if KIND == FP8:
            ratio = tl.minimum(tl.maximum(ratio, -448.0), 448.0)
            code = tl.reshape(float_to_e4m3(ratio), [BLOCK_C])
            tl.store(row + c, code, mask=is_c)
        elif KIND == INT8:
            ratio = tl.minimum(tl.maximum(round_even(ratio), -127.0), 127.0)
            code = tl.reshape(ratio.to(tl.int8), [BLOCK_C])
            tl.store(row + c, code.to(tl.uint8, bitcast=True), mask=is_c)
        else:
            ratio = tl.minimum(tl.maximum(round_even(ratio), -7.0), 7.0)
            code = tl.reshape(ratio.to(tl.int32), [BLOCK_C // 2, 2])
            even, odd = tl.split(code)
            j = tl.arange(0, BLOCK_C // 2)
            high = tl.where(2 * j + 1 < C, odd + 8, 0)
            packed = ((even + 8) | (high << 4)).to(tl.uint8)
            tl.store(row + j, packed, mask=2 * j < C)
    if ROPE_BITS == 8:
        amax = tl.maximum(tl.max(tl.abs(first), axis=0), tl.max(tl.abs(second), axis=0))
        scale = tl.div_rn(amax, 127.0)
        if SCALE_BITS == 16:
            scale = scale.to(tl.float16).to(tl.float32)
        tl.store(scale_at + (C + GROUP - 1) // GROUP, scale)  # behind those of the latent
        safe = tl.where(scale == 0.0, 1.0, scale) + tl.zeros([BLOCK_K], dtype=tl.float32)
        first = round_even(tl.div_rn(first, safe))
        second = round_even(tl.div_rn(second, safe))
        first = tl.minimum(tl.maximum(first, -127.0), 127.0).to(tl.int8)
        second = tl.minimum(tl.maximum(second, -127.0), 127.0).to(tl.int8)
        tl.store(out_rope + at_first, first.to(tl.uint8, bitcast=True), mask=is_first)
        tl.store(out_rope + at_second, second.to(tl.uint8, bitcast=True), mask=is_second)
    else:
        tl.store(out_rope + at_first, nearest(first, out_rope, ROUND_BF16), mask=is_first)
        tl.store(out_rope + at_second, nearest(second, out_rope, ROUND_BF16), mask=is_second)


def append(view: CacheView, latent: Tensor, k_rope: Tensor, new_lengths: Tensor | None) -> None:
    """Code and store ``latent [B, L, C]`` and ``k_rope [B, L, R]``."""
    _launch(view, latent, k_rope, None, None, None, 0.0, 1.0, "none", new_lengths, None)


def norm_rope_append(
    view: CacheView,
    kv_a: Tensor,  # [B, L, C+R]
    norm_weight: Tensor | None,  # [C]
    cos: Tensor,  # [B, L, R/2]
    sin: Tensor,
    eps: float,
    latent_scale: float,
    pairing: Pairing,
    new_lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Normalise, rotate, code and store; returns the fresh latent and key, unquantised."""
    latent, k_rope = kv_a.split([view.C, view.R], dim=-1)
    fresh = latent.new_empty(latent.shape), k_rope.new_empty(k_rope.shape)
    _launch(
        view, latent, k_rope, norm_weight, cos, sin, eps, latent_scale, pairing, new_lengths, fresh
    )
    return fresh


def _launch(
    view: CacheView,
    latent: Tensor,
    k_rope: Tensor,
    norm_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    latent_scale: float,
    pairing: Pairing,
    new_lengths: Tensor | None,
    fresh: tuple[Tensor, Tensor] | None,
) -> None:
    B, L, C = latent.shape
    if B == 0 or L == 0:
        return
    R, codec = view.R, view.codec
    table = view.lengths if view.page_table is None else view.page_table
    is_rotated = pairing != "none" and R > 0
    angles = (latent, latent)
    if is_rotated and cos is not None and sin is not None:
        angles = (cos.contiguous(), sin.contiguous())
    outputs = (latent, latent) if fresh is None else fresh
    launch.run(
        append_kernel, (L, B), latent.device,
        latent, k_rope, latent if norm_weight is None else norm_weight, *angles, *outputs,
        view.rows, table, view.lengths,
        view.lengths if new_lengths is None else new_lengths,
        latent.stride(0), latent.stride(1), k_rope.stride(0), k_rope.stride(1),
        angles[0].stride(0), angles[0].stride(1),
        eps, latent_scale, math.gcd(C, 128) ** -0.5,
        view.rows.stride(0), view.rows.stride(1), table.stride(0), view.shard[0], L,
        **launch.append_constants(codec, C, R), **launch.view_constants(view),
        HAS_NORM=norm_weight is not None,
        PAIRING={"none": 0, "interleaved": 1, "half": 2}[pairing] if is_rotated else 0,
        IS_FUSED=fresh is not None, HAS_NEW_LENGTHS=new_lengths is not None,
        ROUND_BF16=launch.is_interpreting(),
        num_warps=launch.append_warps(C),
    )  # fmt: skip
