"""Keys and values of some heads from the latent: one matrix product of fixed tiles.

    kv_TO = latent_TC weight_OC^T

A library's product would round a row differently when the number of rows changes; here each row has
the same bits in any batch.

Dims: T tokens, C latent width, O = h * (N+V) rows of the weight.
Oracle: the product itself, in float64.
"""

import triton
import triton.language as tl
from torch import Tensor

from mla.kernels import launch
from mla.kernels.launch_prefill import expand_row


@triton.jit(do_not_specialize=["T"])
def expand_kernel(
    latent_ptr,  # [T, C], last dim contiguous
    weight_ptr,  # [O, C], last dim contiguous
    kv_ptr,  # [T, O] contiguous
    T,
    O,  # noqa: E741
    latent_stride,
    weight_stride,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UPCAST: tl.constexpr,
):
    dtype: tl.constexpr = latent_ptr.dtype.element_ty
    dot_dtype: tl.constexpr = tl.float32 if UPCAST else dtype
    num_tiles = tl.cdiv(O, BLOCK_O)
    first_t = (tl.program_id(0) // num_tiles).to(tl.int64) * BLOCK_T  # int64: T*O can pass 2**31
    first_o = (tl.program_id(0) % num_tiles).to(tl.int64) * BLOCK_O
    t, o, c = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_C)
    is_row_T, is_row_O = first_t + t < T, first_o + o < O
    latent_ptr += first_t * latent_stride
    weight_ptr += first_o * weight_stride
    offset_TC = t[:, None] * latent_stride + c[None, :]
    offset_OC = o[:, None] * weight_stride + c[None, :]

    acc_TO = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    for first_c in tl.range(0, C, BLOCK_C):
        is_latent_TC, is_weight_OC = is_row_T[:, None], is_row_O[:, None]
        if C % BLOCK_C:
            inside = (first_c + c < C)[None, :]
            is_latent_TC, is_weight_OC = is_latent_TC & inside, is_weight_OC & inside
        a_TC = tl.load(latent_ptr + first_c + offset_TC, mask=is_latent_TC, other=0.0)
        b_OC = tl.load(weight_ptr + first_c + offset_OC, mask=is_weight_OC, other=0.0)
        acc_TO = tl.dot(a_TC.to(dot_dtype), b_OC.to(dot_dtype).T, acc_TO, input_precision="ieee")

    place = kv_ptr + first_t * O + first_o + t[:, None] * O + o[None, :]
    tl.store(place, acc_TO.to(dtype), mask=is_row_T[:, None] & is_row_O[None, :])


def expand(latent: Tensor, weight: Tensor) -> Tensor:
    """latent ``[T, C]`` by weight ``[h, N+V, C]`` -> ``[T, h, N+V]``."""
    T, C = latent.shape
    rows = weight.flatten(0, 1)
    O = rows.shape[0]  # noqa: E741
    kv: Tensor = latent.new_empty(T, *weight.shape[:2])
    if kv.numel() == 0:
        return kv
    row = expand_row(launch.architecture(latent.device), latent.dtype)
    grid = (triton.cdiv(T, row.BLOCK_T) * triton.cdiv(O, row.BLOCK_O),)
    launch.run(
        expand_kernel, grid, latent.device,
        latent, rows, kv, T, O, latent.stride(0), rows.stride(0), C=C,
        BLOCK_T=row.BLOCK_T, BLOCK_O=row.BLOCK_O, BLOCK_C=row.BLOCK_C,
        UPCAST=launch.upcast(latent), num_warps=row.num_warps, num_stages=row.num_stages,
    )  # fmt: skip
    return kv
