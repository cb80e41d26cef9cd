"""Prefill kernels that are promised for each target, as data for `mla.kernels.variants`.

Every row of the tables in `mla.kernels.launch_prefill` is compiled for the widths of the presets
that reach it. `SPILLS` names the rows that spill at all.

Dims: N unrotated width, R rotated width, V value width, C latent width.
"""

from __future__ import annotations

from typing import Any

import torch

from mla.kernels.expand import expand_kernel
from mla.kernels.launch_prefill import Kernel, PrefillRow, expand_row, prefill_row
from mla.kernels.prefill import prefill_kernel
from mla.kernels.prefill_backward import BLOCK_T, prefill_delta_kernel
from mla.kernels.prefill_backward_keys import prefill_backward_keys_kernel
from mla.kernels.prefill_backward_queries import prefill_backward_queries_kernel
from mla.kernels.prefill_tiles import parts
from mla.kernels.variant_types import Variant

Widths = tuple[int, int, int]  # N, R, V

KERNELS: dict[Kernel, Any] = {
    "forward": prefill_kernel,
    "keys": prefill_backward_keys_kernel,
    "queries": prefill_backward_queries_kernel,
}
# minicpm3, mistral-small-4, deepseek and most others, glm
WIDTHS: tuple[Widths, ...] = ((64, 32, 64), (64, 64, 128), (128, 64, 128), (192, 64, 256))
USUAL: Widths = (128, 64, 128)
ARCHITECTURES = ("sm80", "sm86", "sm90", "sm100", "sm120", "gfx942", "gfx950")
MMA = {"sm90": "wgmma", "sm100": "tcgen05.mma"}  # elsewhere mma.sync or mfma
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
FLOAT32_POINTERS = ("lse_ptr", "log2_lse_ptr", "delta_ptr", "d_rope_ptr", "d_lse_ptr")

# Bytes that are spilled, at most over Triton 3.6.0, 3.7.1 and 3.9.0, and why.
SPILLS: dict[tuple[str, Kernel, Widths], tuple[int, str]] = {
    ("sm80", "keys", (64, 64, 128)): (12, "with Triton 3.9.0 only"),
    ("sm86", "queries", (128, 64, 128)): (8, "with Triton 3.9.0 only"),
    ("sm90", "keys", (128, 64, 128)): (8, "with Triton 3.9.0 only"),
    ("sm90", "keys", (192, 64, 256)): (
        112,
        "64 keys of 512 columns fill the registers; 32 keys would not reach wgmma",
    ),
    ("sm100", "keys", (64, 64, 128)): (4, "with Triton 3.6.0 only"),
    ("sm100", "keys", (192, 64, 256)): (12, "with Triton 3.9.0 only"),
    ("sm100", "queries", (64, 64, 128)): (12, "with Triton 3.6.0 only"),
    ("gfx942", "keys", (192, 64, 256)): (88, "with Triton 3.6.0 only"),
}
FLOAT32_SPILLS = (128, "exact products take no tensor cores; the assembler picks few registers")


def _signature(kernel: Any, constants: dict[str, Any], dtype: torch.dtype) -> dict[str, str]:
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            continue
        if name.endswith("_ptr"):
            types[name] = "*fp32" if name in FLOAT32_POINTERS else POINTERS[dtype]
        else:
            types[name] = "fp32" if name == "scale" else "i32"
    return types


def _attention(
    architecture: str, name: Kernel, widths: Widths, dtype: torch.dtype, causal: bool
) -> Variant:
    row: PrefillRow = prefill_row(
        architecture, name, sum(sum(parts(width)) for width in widths), dtype
    )
    N, R, V = widths
    constants = {
        **dict.fromkeys(("starts_ptr", "lengths_ptr", "cu_q_ptr", "cu_k_ptr")),
        "N": N,
        "R": R,
        "V": V,
        "CAUSAL": causal,
        "BLOCK_L": row.BLOCK_L,
        "BLOCK_S": row.BLOCK_S,
        "UPCAST": False,
    }
    is_float32 = dtype == torch.float32
    spills = SPILLS.get((architecture, name, widths), (0, ""))
    spill_bytes, reason = FLOAT32_SPILLS if is_float32 else spills
    return Variant(
        f"prefill {name} {str(dtype)[6:]} N={N} R={R} V={V} {row.BLOCK_L}x{row.BLOCK_S}"
        + ("" if causal else " full"),
        KERNELS[name],
        architecture,
        _signature(KERNELS[name], constants, dtype),
        constants,
        row.num_warps,
        row.num_stages,
        spill_bytes,
        reason,
        None if is_float32 else MMA.get(architecture),
    )


def _expand(architecture: str, dtype: torch.dtype) -> Variant:
    row = expand_row(architecture, dtype)
    is_float32 = dtype == torch.float32
    constants = {"C": 512, "UPCAST": False}
    constants |= {"BLOCK_T": row.BLOCK_T, "BLOCK_O": row.BLOCK_O, "BLOCK_C": row.BLOCK_C}
    return Variant(
        f"expand {str(dtype)[6:]} C=512 {row.BLOCK_T}x{row.BLOCK_O}",
        expand_kernel,
        architecture,
        _signature(expand_kernel, constants, dtype),
        constants,
        row.num_warps,
        row.num_stages,
        *(FLOAT32_SPILLS if is_float32 else (0, "")),
        None if is_float32 else MMA.get(architecture),
    )


def _delta(architecture: str) -> Variant:
    constants = {"V": 128, "BLOCK_V": 128, "BLOCK_T": BLOCK_T}
    return Variant(
        "prefill delta bfloat16 V=128",
        prefill_delta_kernel,
        architecture,
        _signature(prefill_delta_kernel, constants, torch.bfloat16),
        constants,
        4,
        1,
    )


def _variants() -> tuple[Variant, ...]:
    found: list[Variant] = []
    for architecture in ARCHITECTURES:
        for name in KERNELS:
            for widths in WIDTHS:
                found.append(_attention(architecture, name, widths, torch.bfloat16, True))
            found.append(_attention(architecture, name, USUAL, torch.bfloat16, False))
            found.append(_attention(architecture, name, USUAL, torch.float16, True))
            found.append(_attention(architecture, name, USUAL, torch.float32, True))
        found.append(_expand(architecture, torch.bfloat16))
        found.append(_expand(architecture, torch.float32))
        found.append(_delta(architecture))
    return tuple(found)


PREFILL_VARIANTS = _variants()
