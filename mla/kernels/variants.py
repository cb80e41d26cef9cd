"""Every (kernel, sizes, dtype, codec, target) that is promised, compiled without a GPU.

`compile_variant` runs Triton's compiler and the assembler for one target on any machine and
reports memory, registers, spilled bytes and the kind of matrix instruction. ``python -m mla
compile`` prints the table; a test holds every row against the target's limits and recorded spills.

Dims: H heads, L queries, C latent width, R rotated width, Z positions in one page.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
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
from mla.kernels.merge import BLOCK_LSE, BLOCK_X, merge_kernel
from mla.kernels.prefill_variants import PREFILL_VARIANTS
from mla.kernels.rotate import rotate_kernel
from mla.kernels.variant_types import Variant

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm86": GPUTarget("cuda", 86, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "sm120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
TENSOR_MEMORY = 512  # columns of sm100; a kernel that needs more compiles to nothing
_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_CODECS: tuple[Codec, ...] = (PlainCodec(), Fp8Codec(), Int8Codec(), Int4Codec())

# Bytes that are spilled, at most over Triton 3.6.0, 3.7.1 and 3.9.0, and why.
_FULL = "64 rows of 512 columns fill the registers; 32 rows would read the cache twice as often"
SPILLS: dict[tuple[str, str], tuple[int, str]] = {
    ("sm80", "decode plain float32 H=16 C=512 R=64 16x32"): (8, "with Triton 3.6.0 alone"),
    ("sm80", "decode plain bfloat16 H=16 C=512 R=64 L=4 64x32"): (20, _FULL),
    ("sm100", "decode plain bfloat16 H=16 C=512 R=64 L=4 64x32"): (24, _FULL),
    ("sm100", "decode plain bfloat16 H=40 C=256 R=32 64x32"): (4, "with Triton 3.9.0 alone"),
}


class Report(NamedTuple):
    """What the compiler says about one variant."""

    shared: int
    shared_limit: int
    tensor_memory: int  # columns
    registers: int
    spill_bytes: int
    mma: str
    num_mma: int  # matrix instructions in the text, those of a loop once

    def complaints(self, variant: Variant) -> list[str]:
        """What does not keep the promise."""
        found = []
        if self.shared > self.shared_limit:
            found.append(f"{self.shared} bytes of shared memory, limit {self.shared_limit}")
        if self.tensor_memory > TENSOR_MEMORY:
            found.append(f"{self.tensor_memory} columns of tensor memory, limit {TENSOR_MEMORY}")
        if self.spill_bytes > variant.spill_bytes:
            found.append(f"{self.spill_bytes} bytes spilled, recorded {variant.spill_bytes}")
        if variant.mma is not None and self.mma != variant.mma:
            found.append(f"matrix instruction {self.mma}, promised {variant.mma}")
        return found


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
    target = TARGETS[variant.architecture]
    compiled = triton.compile(source, target=target, options=options)
    limit = launch.SHARED_LIMIT[variant.architecture]
    shared = compiled.metadata.shared
    if target.backend == "cuda":
        registers, spills = _assemble(compiled.asm["ptx"], variant)
        columns = getattr(compiled.metadata, "tmem_size", None) or 0
        return Report(shared, limit, columns, registers, spills, *_mma_of(compiled.asm["ptx"]))
    text = compiled.asm["amdgcn"]
    registers = _amd_count(text, "vgpr_count")
    spills = _amd_count(text, "private_segment_fixed_size")
    count = len(re.findall(r"\bv_mfma", text))
    return Report(shared, limit, 0, registers, spills, "mfma" if count else "-", count)


def _assemble(ptx: str, variant: Variant) -> tuple[int, int]:
    """Registers and spilled bytes that ptxas reports."""
    from triton.backends.nvidia.compiler import get_ptxas

    capability = TARGETS[variant.architecture].arch
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


def _mma_of(ptx: str) -> tuple[str, int]:
    for name in ("tcgen05.mma", "wgmma", "mma.sync"):
        count = len(re.findall(rf"\b{re.escape(name)}[._]?(?:mma_async|cta_group|aligned)", ptx))
        if count:
            return name, count
    return "-", 0


def _amd_count(text: str, name: str) -> int:
    return max(map(int, re.findall(rf"\.{name}:\s+(\d+)", text)), default=0)


def variants() -> Iterator[Variant]:
    """The promised list."""
    bf16, plain = torch.bfloat16, PlainCodec()
    for architecture in TARGETS:
        for codec in _CODECS:
            yield _decode(architecture, codec, 16, 512, 64, bf16)
            yield _decode(architecture, codec, 128, 512, 64, bf16)
            yield _append(architecture, codec, 512, 64, bf16)
        yield _decode(architecture, plain, 20, 512, 64, bf16)
        yield _decode(architecture, plain, 32, 256, 64, torch.float16)
        yield _decode(architecture, Fp8Codec(), 32, 512, 64, bf16)
        yield _decode(architecture, Int4Codec(), 32, 512, 64, bf16)
        yield _decode(architecture, plain, 40, 256, 32, bf16)
        yield _decode(architecture, plain, 16, 512, 64, torch.float32)
        yield _decode(architecture, plain, 16, 512, 64, bf16, Z=0)
        yield _decode(architecture, plain, 16, 512, 64, bf16, Z=1)
        yield _decode(architecture, plain, 128, 512, 64, bf16, Z=16)
        yield _decode(architecture, plain, 16, 512, 64, bf16, L=4)
        yield _decode(architecture, Int8Codec(rope_bits=8), 16, 512, 64, bf16)
        yield _decode(architecture, Int4Codec(rope_bits=8), 16, 512, 64, bf16)
        yield _append(architecture, Int4Codec(rope_bits=8), 512, 64, bf16)
        yield _merge(architecture, bf16)
        yield _rotate(architecture, bf16)
    yield from PREFILL_VARIANTS


def _named(
    name: str,
    kernel: Any,
    architecture: str,
    types: dict[str, str],
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int = 1,
    mma: str | None = None,
) -> Variant:
    """A variant with its recorded spills; arguments of no given type are int32."""
    signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
    spill_bytes, reason = SPILLS.get((architecture, name), (0, ""))
    return Variant(
        name, kernel, architecture, signature, constants, num_warps, num_stages,
        spill_bytes, reason, mma,
    )  # fmt: skip


def _rows_pointer(codec: Codec, dtype: torch.dtype) -> str:
    return _POINTERS[dtype] if isinstance(codec, PlainCodec) else "*u8"


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _codec_words(codec: Codec) -> str:
    is_small = not isinstance(codec, PlainCodec) and codec.rope_bits == 8
    return f"{codec.kind}+rope8" if is_small else codec.kind


def _decode(
    architecture: str,
    codec: Codec,
    H: int,
    C: int,
    R: int,
    dtype: torch.dtype,
    *,
    Z: int = 64,
    L: int = 1,
) -> Variant:
    """Pages of ``Z`` keys, 0 for the dense layout; with L > 1 ragged queries and left padding."""
    plan = launch.decode_plan(architecture, L * H, C, R, dtype, codec)
    is_ragged = L > 1
    layout = "" if Z == 64 else " dense" if Z == 0 else f" Z={Z}"
    name = (
        f"decode {_codec_words(codec)} {_words(dtype)} H={H} C={C} R={R}{layout}"
        f"{f' L={L}' if is_ragged else ''} {plan.BLOCK_H}x{plan.BLOCK_S}"
    )
    int32 = ("table_ptr", "lengths_ptr", "starts_ptr", "query_lengths_ptr")
    types = {
        **dict.fromkeys(("q_latent_ptr", "q_rope_ptr", "out_ptr"), _POINTERS[dtype]),
        "rows_ptr": _rows_pointer(codec, dtype),
        **dict.fromkeys(int32, "*i32"),
        **dict.fromkeys(("lse_ptr", "part_ptr", "part_lse_ptr"), "*fp32"),
        "scale": "fp32",
    }
    constants = {
        **launch.row_constants(codec, C, R),
        **({} if is_ragged else {"L": 1}),
        "Z": Z,
        "SHARDS": 1,
        "H": H,
        "C": C,
        "R": R,
        "HAS_STARTS": is_ragged,
        "HAS_QUERY_LENGTHS": is_ragged,
        **plan.constants(R),
        "UPCAST": False,
    }
    mma = launch.DECODE_MMA.get((architecture, plan.BLOCK_H))
    return _named(
        name, decode_kernel, architecture, types, constants, plan.num_warps, plan.num_stages, mma
    )


def _append(architecture: str, codec: Codec, C: int, R: int, dtype: torch.dtype) -> Variant:
    pointers = ("latent_ptr", "k_rope_ptr", "norm_ptr", "cos_ptr", "sin_ptr")
    types = {
        **dict.fromkeys((*pointers, "fresh_latent_ptr", "fresh_rope_ptr"), _POINTERS[dtype]),
        "rows_ptr": _rows_pointer(codec, dtype),
        **dict.fromkeys(("table_ptr", "lengths_ptr", "new_lengths_ptr"), "*i32"),
        **dict.fromkeys(("eps", "latent_scale", "rotation_scale"), "fp32"),
    }
    constants = {
        **launch.row_constants(codec, C, R),
        **launch.append_constants(codec, C, R),
        "Z": 64,
        "SHARDS": 1,
        "HAS_NORM": True,
        "PAIRING": 1,
        "IS_FUSED": True,
        "HAS_NEW_LENGTHS": True,
        "ROUND_BF16": False,
    }
    name = f"append {_codec_words(codec)} {_words(dtype)} C={C} R={R}"
    return _named(name, append_kernel, architecture, types, constants, launch.append_warps(C))


def _merge(architecture: str, dtype: torch.dtype) -> Variant:
    plan = launch.decode_plan(architecture, 16, 512, 64, dtype, PlainCodec())
    types = {
        **dict.fromkeys(("part_ptr", "lse_part_ptr", "lse_ptr"), "*fp32"),
        "lengths_ptr": "*i32",
        "out_ptr": _POINTERS[dtype],
    }
    constants = {
        "C": 512,
        "Z": 64,
        "ALL_PARTS": False,
        "SHARDS": 1,
        "SPLIT_KEYS": plan.SPLIT_KEYS,
        "MAX_SPLITS": launch.MAX_SPLITS,
        "BLOCK_S": plan.BLOCK_S,
        "BLOCK_LSE": BLOCK_LSE,
        "BLOCK_X": BLOCK_X,
        "BLOCK_C": 128,
    }
    return _named(f"merge {_words(dtype)} C=512", merge_kernel, architecture, types, constants, 4)


def _rotate(architecture: str, dtype: torch.dtype) -> Variant:
    types = {"x_ptr": _POINTERS[dtype], "out_ptr": _POINTERS[dtype], "rotation_scale": "fp32"}
    constants = {"C": 512, "SIZE": 128, "BLOCK_C": 512, "ROUND_BF16": False}
    warps = launch.append_warps(512)
    return _named(
        f"rotate {_words(dtype)} C=512", rotate_kernel, architecture, types, constants, warps
    )
