"""Rotate queries and outputs as a codec rotates latents: blocks times the Hadamard matrix.

    out[.., i] = sum_j (-1)^popcount(i & j) x[.., j] / sqrt(size),  size = gcd(C, 128)

One program rotates one row, by butterflies in float32; the matrix is its own inverse.

Dims: Y rows, C latent width. Oracle: mla.codec.rotate_latent.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mla.kernels import launch
from mla.kernels.tiles import hadamard, nearest


@triton.jit
def rotate_kernel(
    x_ptr,  # [Y, C] contiguous
    out_ptr,  # [Y, C] contiguous
    rotation_scale,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * C + tl.arange(0, BLOCK_C)  # int64: Y*C can pass 2**31
    is_c = tl.arange(0, BLOCK_C) < C
    x = tl.load(x_ptr + at, mask=is_c, other=0.0).to(tl.float32)
    x = hadamard(x, BLOCK_C, SIZE) * rotation_scale
    tl.store(out_ptr + at, nearest(x, out_ptr, ROUND_BF16), mask=is_c)


def rotate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x [.., C]`` with its latent rotated, in ``dtype``."""
    x = x.contiguous()
    C = x.shape[-1]
    size = math.gcd(C, 128)
    out = torch.empty_like(x, dtype=dtype)
    launch.run(
        rotate_kernel, (x.numel() // C,), x.device,
        x, out, size**-0.5, C=C, SIZE=size, BLOCK_C=max(2, triton.next_power_of_2(C)),
        ROUND_BF16=launch.is_interpreting(), num_warps=launch.append_warps(C),
    )  # fmt: skip
    return out
