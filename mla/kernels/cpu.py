"""The C++ kernels of `csrc/`: finds `mla._C`, says why it is absent, and calls it.

Dims: B batch, L queries, H heads, C latent width, R rotated width.
Oracle: mla.reference.absorbed_attention.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
from functools import cache
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from mla.checks import ShapeError, UnsupportedError
from mla.codec import PlainCodec, rotate_latent
from mla.config import Pairing
from mla.view import CacheView

# Slowest first; the index names a set in `torch.ops.mla_cpp`. Those of x86 are absent elsewhere.
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512bf16", "avx512vnni")
KINDS = {"plain": 0, "fp8": 1, "int8": 2, "int4": 3}
PAIRINGS = {"none": 0, "interleaved": 1, "half": 2}
_PLAIN = (0, 0, 0, 0, 0)


class Extension(NamedTuple):
    """What `describe` says."""

    reason_absent: str | None  # None: it is there
    instruction_sets: tuple[str, ...]  # that this processor has, slowest first


@cache
def describe() -> Extension:
    """Load the extension if it is there."""
    if importlib.util.find_spec("mla._C") is None:
        reason = "needs mla._C, which was not built: a C++ compiler and make env build it"
        return Extension(reason, ())
    try:
        importlib.import_module("mla._C")
    except ImportError as error:
        return Extension(f"needs mla._C, which does not load here: {error}", ())
    found = int(torch.ops.mla_cpp.instruction_sets())
    return Extension(None, tuple(x for i, x in enumerate(INSTRUCTION_SETS) if found >> i & 1))


def reason_absent() -> str | None:
    """Why the C++ kernels cannot run here, or None."""
    return describe().reason_absent


@cache
def _op(name: str) -> Any:
    describe()
    return getattr(torch.ops.mla_cpp, name).default


@cache
def _set_index(name: str | None) -> int:
    """Place of an instruction set, by default the fastest that this processor has."""
    found = describe().instruction_sets
    if name is not None and name not in found:
        raise UnsupportedError(
            f"mla_decode: instruction_set has value {name!r}, expected one of {found}"
        )
    return INSTRUCTION_SETS.index(found[-1] if name is None else name)


@cache
def _sections(codec: Any, C: int, R: int) -> tuple[int, ...]:
    """Kind, group, bits of the rotated key, and where scales and rotated key begin."""
    if isinstance(codec, PlainCodec):
        return _PLAIN
    at = codec.sections(C, R)
    return KINDS[codec.kind], codec.group, codec.rope_bits, at.scales_at, at.rope_at


def run_peak(iterations: int, *, bf16: bool) -> int:
    """Multiply-adds in registers alone; returns how many operations they were. For benchmarks."""
    return int(_op("peak")(iterations, bf16, _set_index(None)))


@cache
def _hadamard(size: int) -> Tensor:
    return rotate_latent(torch.eye(size))


def _rotate_rows(latent: Tensor) -> Tensor:
    """`rotate_latent` in float32 to the last bit, which codes of rows depend on."""
    size = math.gcd(latent.shape[-1], 128)
    return (latent.float().unflatten(-1, (-1, size)) @ _hadamard(size)).flatten(-2)


def _rotate(latent: Tensor, dtype: torch.dtype) -> Tensor:
    """`rotate_latent` with sums in another order, rounded to ``dtype``."""
    C = latent.shape[-1]
    out = torch.empty(latent.shape, dtype=dtype)
    _op("rotate")(latent.reshape(-1, C).contiguous(), out.view(-1, C), math.gcd(C, 128))
    return out


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _refuse(error: RuntimeError) -> NoReturn:
    """The checks of the extension speak as ours do; torch makes RuntimeErrors of them."""
    place_and_message = str(error).partition("\n")[0]
    found = re.search(r"\b(CacheView|mla_\w+): .*", place_and_message)
    if found is None:
        raise error
    raise ShapeError(found[0]) from None


def decode(
    q_latent: Tensor,
    q_rope: Tensor,
    view: CacheView,
    scale: float,
    query_lengths: Tensor | None,
    out_dtype: torch.dtype,
    *,
    instruction_set: str | None = None,
) -> tuple[Tensor, Tensor]:
    """out ``[B, L, H, C]`` of ``out_dtype`` and lse ``[B, L, H]`` float32.

    ``instruction_set`` forces one of `describe().instruction_sets`.
    """
    rotation = view.codec.rotation
    if rotation:
        q_latent = _rotate(q_latent, q_latent.dtype)
    dtype = torch.float32 if rotation else out_dtype
    out = torch.empty(q_latent.shape, dtype=dtype)
    lse = torch.empty(q_latent.shape[:3], dtype=torch.float32)
    try:
        _op("decode")(
            _unit_stride(q_latent),
            _unit_stride(q_rope),
            view.rows,
            _contiguous(view.page_table),
            view.lengths.contiguous(),
            _contiguous(view.starts),
            _contiguous(query_lengths),
            out,
            lse,
            scale,
            *view.shard,
            *_sections(view.codec, view.C, view.R),
            _set_index(instruction_set),
        )
    except RuntimeError as error:
        _refuse(error)
    if rotation:
        out = _rotate(out, out_dtype)
    return out, lse


def append(view: CacheView, latent: Tensor, k_rope: Tensor, new_lengths: Tensor | None) -> None:
    """Code and store ``latent [B, L, C]`` and ``k_rope [B, L, R]``."""
    if view.codec.rotation:
        latent = _rotate_rows(latent)
    try:
        _op("append")(
            view.rows,
            _contiguous(view.page_table),
            view.lengths.contiguous(),
            _unit_stride(latent),
            _unit_stride(k_rope),
            _contiguous(new_lengths),
            *view.shard,
            *_sections(view.codec, view.C, view.R),
        )
    except RuntimeError as error:
        _refuse(error)


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
    latent = kv_a.new_empty(*kv_a.shape[:2], view.C)
    k_rope = kv_a.new_empty(*kv_a.shape[:2], view.R)
    is_turned = pairing != "none" and view.R > 0
    angles = [_angles(x, kv_a) if is_turned else None for x in (cos, sin)]
    try:
        _op("norm_rope")(
            _unit_stride(kv_a),
            _contiguous(norm_weight),
            *angles,
            latent,
            k_rope,
            eps,
            latent_scale,
            PAIRINGS[pairing] if is_turned else 0,
        )
    except RuntimeError as error:
        _refuse(error)
    append(view, latent, k_rope, new_lengths)
    return latent, k_rope


def _angles(angles: Tensor, like: Tensor) -> Tensor:
    """In the dtype of ``like`` or in float32, the only two in which pairs are turned."""
    return _unit_stride(angles if angles.dtype == like.dtype else angles.float())
