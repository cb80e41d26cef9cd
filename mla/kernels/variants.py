"""Every (kernel, sizes, dtype, codec, target) that is promised, compiled without a GPU.

`compile_variant` runs Triton's compiler and the assembler for one target on any machine and
reports shared memory, registers, spilled bytes and the kind of matrix instruction. ``python -m mla
compile`` prints the table; a test holds every row against the target's limit and recorded spills.

Dims: H heads, L queries, C latent width, R rotated width.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mla.codec import Codec, Fp8Codec, Int4Codec, Int8Codec, PlainCodec
from mla.kernels import launch
from mla.kernels.append import append_kernel
from mla.kernels.decode import decode_kernel
from mla.kernels.merge import merge_kernel

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm86": GPUTarget("cuda", 86, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "sm120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_CODECS: tuple[Codec, ...] = (PlainCodec(), Fp8Codec(), Int8Codec(), Int4Codec())


@dataclass(frozen=True)
class Variant:
    """One kernel with all its constants, for one architecture."""

    name: str
    kernel: Any
    architecture: str
    signature: dict[str, str]  # dtypes of the arguments that are no constants
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    spill_bytes: int = 0  # allowed
    reason: str = ""  # for spills
    mma: str | None = None  # required matrix instruction

    @property
    def target(self) -> GPUTarget:
        return TARGETS[self.architecture]


class Report(NamedTuple):
    """What the compiler says about one variant."""

    shared: int
    shared_limit: int
    registers: int
    spill_bytes: int
    mma: str


def compile_variant(variant: Variant) -> Report:
    """Compile for the variant's target; no device is needed.

    Raises:
        RuntimeError: the assembler refused the code.
    """
    names = variant.kernel.arg_names
    signature = {
        name: "constexpr" if name in variant.constants else variant.signature[name]
        for name in names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name.endswith("_stride")
    }
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    source = ASTSource(variant.kernel, signature, constants, aligned)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(source, target=variant.target, options=options)
    limit = launch.SHARED_LIMIT[variant.architecture]
    shared = compiled.metadata.shared
    if variant.target.backend == "cuda":
        registers, spills = _assemble(compiled.asm["ptx"], compiled.asm.get("cubin"), variant)
        return Report(shared, limit, registers, spills, _mma_of(compiled.asm["ptx"]))
    text = compiled.asm["amdgcn"]
    registers = _amd_count(text, "vgpr_count")
    spills = 4 * _amd_count(text, "vgpr_spill_count")
    return Report(shared, limit, registers, spills, "mfma" if "v_mfma" in text else "-")


def _assemble(ptx: str, cubin: bytes | None, variant: Variant) -> tuple[int, int]:
    """Registers and spilled bytes that ptxas reports."""
    from triton.backends.nvidia.compiler import get_ptxas

    capability = variant.target.arch
    suffix = "a" if capability >= 90 else ""
    try:
        ptxas = get_ptxas(capability).path
    except TypeError:  # Triton 3.6 knows one assembler for all
        ptxas = get_ptxas().path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [ptxas, "-v", f"-arch=sm_{capability}{suffix}", str(path), "-o", str(path) + ".o"]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"ptxas refused {variant.name}: {run.stderr.strip()}")
    registers = max(map(int, re.findall(r"Used (\d+) registers", run.stderr)), default=0)
    spills = sum(map(int, re.findall(r"(\d+) bytes spill stores", run.stderr)))
    return registers, spills


def _mma_of(ptx: str) -> str:
    for name in ("tcgen05.mma", "wgmma", "mma.sync"):
        if name in ptx:
            return name
    return "-"


def _amd_count(text: str, name: str) -> int:
    return max(map(int, re.findall(rf"\.{name}:\s+(\d+)", text)), default=0)


def variants() -> Iterator[Variant]:
    """The promised list."""
    for architecture in TARGETS:
        for codec in _CODECS:
            for H in (16, 128):
                yield _decode(architecture, codec, H, 512, 64, torch.bfloat16)
            yield _append(architecture, codec, 512, 64, torch.bfloat16)
        yield _decode(architecture, PlainCodec(), 32, 256, 64, torch.float16)
        yield _decode(architecture, PlainCodec(), 40, 256, 32, torch.bfloat16)
        yield _decode(architecture, PlainCodec(), 16, 512, 64, torch.float32)
        yield _merge(architecture, torch.bfloat16)


def _view_signature(codec: Codec, dtype: torch.dtype) -> dict[str, str]:
    """Pointers to rows of this codec."""
    if isinstance(codec, PlainCodec):
        return dict.fromkeys(("values_ptr", "scales_ptr", "rope_ptr"), _POINTERS[dtype])
    scales = "*fp16" if codec.scale_dtype == torch.float16 else "*fp32"
    rope = "*u8" if codec.rope_bits == 8 else "*bf16"
    return {"values_ptr": "*u8", "scales_ptr": scales, "rope_ptr": rope}


def _view_constants(codec: Codec, dtype: torch.dtype) -> dict[str, Any]:
    plain = isinstance(codec, PlainCodec)
    return {
        "KIND": launch.KINDS[codec.kind],
        "ROPE_BITS": 16 if isinstance(codec, PlainCodec) else codec.rope_bits,
        "VALUE_BYTES": dtype.itemsize if plain else 1,
        "SCALE_BYTES": dtype.itemsize
        if isinstance(codec, PlainCodec)
        else codec.scale_dtype.itemsize,
        "ROPE_BYTES": dtype.itemsize if plain else 2,
        "IS_PAGED": True,
        "SHARDS": 1,
    }


def _decode(architecture: str, codec: Codec, H: int, C: int, R: int, dtype: torch.dtype) -> Variant:
    plan = launch.decode_plan(architecture, H, C, R, dtype, codec)
    name = f"decode {codec.kind} {str(dtype)[6:]} H={H} C={C} R={R} {plan.BLOCK_H}x{plan.BLOCK_S}"
    integers = ("scales_at", "rope_at", "rope_scale_idx", "Z", "M", "shard_index", "num_splits")
    signature = {
        "q_latent_ptr": _POINTERS[dtype],
        "q_rope_ptr": _POINTERS[dtype],
        **_view_signature(codec, dtype),
        **dict.fromkeys(("table_ptr", "lengths_ptr", "starts_ptr", "query_lengths_ptr"), "*i32"),
        "out_ptr": _POINTERS[dtype],
        **dict.fromkeys(("lse_ptr", "part_ptr", "part_lse_ptr"), "*fp32"),
        "scale": "fp32",
        **dict.fromkeys((*integers, "page_stride", "slot_stride"), "i32"),
    }
    constants = {
        **_view_constants(codec, dtype),
        "L": 1,
        "H": H,
        "C": C,
        "R": R,
        "W": plan.W,
        "T": plan.T,
        "HAS_STARTS": False,
        "HAS_QUERY_LENGTHS": False,
        "SPLIT_KEYS": plan.SPLIT_KEYS,
        "MAX_SPLITS": launch.MAX_SPLITS,
        "BLOCK_H": plan.BLOCK_H,
        "BLOCK_S": plan.BLOCK_S,
        "BLOCK_R": max(16, triton.next_power_of_2(R)),
        "UPCAST": False,
    }
    return Variant(
        name, decode_kernel, architecture, signature, constants, plan.num_warps, plan.num_stages
    )


def _append(architecture: str, codec: Codec, C: int, R: int, dtype: torch.dtype) -> Variant:
    pointers = ("latent_ptr", "k_rope_ptr", "norm_ptr", "cos_ptr", "sin_ptr")
    strides = [f"{name}_stride_{dim}" for name in ("latent", "rope", "cos") for dim in ("b", "l")]
    integers = ("scales_at", "rope_at", "rope_scale_idx", "Z", "M", "shard_index", "L")
    signature = {
        **dict.fromkeys(pointers, _POINTERS[dtype]),
        **dict.fromkeys(("fresh_latent_ptr", "fresh_rope_ptr"), _POINTERS[dtype]),
        **_view_signature(codec, dtype),
        **dict.fromkeys(("table_ptr", "lengths_ptr", "new_lengths_ptr"), "*i32"),
        **dict.fromkeys((*strides, *integers, "page_stride", "slot_stride"), "i32"),
        **dict.fromkeys(("eps", "latent_scale", "rotation_scale"), "fp32"),
    }
    group = 1 if isinstance(codec, PlainCodec) else codec.group
    constants = {
        **_view_constants(codec, dtype),
        "C": C,
        "R": R,
        "GROUP": group,
        "HADAMARD": 128 if codec.rotation else 1,
        "HAS_NORM": True,
        "PAIRING": 1,
        "IS_FUSED": True,
        "HAS_NEW_LENGTHS": True,
        "BLOCK_C": max(triton.next_power_of_2(C), group),
        "BLOCK_K": triton.next_power_of_2(R // 2),
        "ROUND_BF16": False,
    }
    name = f"append {codec.kind} {str(dtype)[6:]} C={C} R={R}"
    return Variant(name, append_kernel, architecture, signature, constants, 4, 2)


def _merge(architecture: str, dtype: torch.dtype) -> Variant:
    plan = launch.decode_plan(architecture, 16, 512, 64, dtype, PlainCodec())
    signature = {
        **dict.fromkeys(("part_ptr", "lse_part_ptr", "lse_ptr"), "*fp32"),
        "lengths_ptr": "*i32",
        "out_ptr": _POINTERS[dtype],
        **dict.fromkeys(("num_splits", "num_rows", "shard_index", "Z"), "i32"),
    }
    constants = {
        "C": 512,
        "ALL_PARTS": False,
        "SHARDS": 1,
        "SPLIT_KEYS": plan.SPLIT_KEYS,
        "MAX_SPLITS": launch.MAX_SPLITS,
        "BLOCK_S": plan.BLOCK_S,
        "BLOCK_X": 128,
        "BLOCK_C": 128,
    }
    return Variant("merge", merge_kernel, architecture, signature, constants, 4, 2)
