"""How one cached row is stored: plain values, or 8- and 4-bit values with group scales.

A coded row is bytes in three sections, ``values | scales | rope``, each starting at a multiple of
16 bytes, the row padded to 16. Rows are coded once, when they are appended, and never again.

    codec        values                               scales                      rope
    plain        C + R values of the cache's dtype, no sections
    fp8          C bytes, e4m3                        float32, powers of two      bfloat16
    int8         C bytes                              float32                     bfloat16 | int8
    int4         ceil(C/2) bytes, 2j in the low       float16                     bfloat16 | int8
                 and 2j+1 in the high nibble of
                 byte j, each plus 8

With C = 512 and R = 64 the fp8 row is the 656-byte row of DeepSeek-V3.2 (vLLM's ``fp8_ds_mla``).
``rotation`` multiplies the latent by a block Hadamard matrix (blocks of the largest power of two
that divides C, at most 128) before coding; attention rotates the queries' latent part and the
output instead of the rows, see `rotate_latent`.

NaN or infinity in a group leaves no finite value in that group, so it cannot pass for a number.
Finite values beyond 7 times the largest float16, 458,528, saturate in int4.

Dims: B.. leading dims, C latent width, R rotated width, G scale groups, W row bytes.
Oracle: mla.reference.decode_row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mla.checks import UnsupportedError


class Sections(NamedTuple):
    """Byte offsets of one coded row."""

    num_groups: int
    scales_at: int
    rope_at: int
    row_bytes: int


def _align(num_bytes: int) -> int:
    return -(-num_bytes // 16) * 16


@dataclass(frozen=True, kw_only=True)
class PlainCodec:
    """Rows of C + R values in the cache's dtype, latent first."""

    kind: ClassVar[str] = "plain"
    rotation: ClassVar[bool] = False

    @property
    def spec(self) -> str:
        return self.kind

    def row_width(self, C: int, R: int) -> int:
        """Elements of one row."""
        return C + R

    def storage_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def encode(self, latent: Tensor, k_rope: Tensor) -> Tensor:
        """``[.., C]`` and ``[.., R]`` -> rows ``[.., C+R]``."""
        return torch.cat([latent, k_rope], dim=-1)

    def decode(self, rows: Tensor, C: int, R: int, dtype: torch.dtype) -> Tensor:
        """Rows -> ``[.., C+R]`` of ``dtype``; no copy when it is the dtype of the rows."""
        return rows.to(dtype)


@dataclass(frozen=True, kw_only=True)
class _GroupCodec:
    """Coded rows: one scale per ``group`` latent values; see the module docstring."""

    group: int = 128
    rope_bits: int = 16
    rotation: bool = False

    kind: ClassVar[str]
    value_bits: ClassVar[int] = 8
    scale_dtype: ClassVar[torch.dtype] = torch.float32

    def __post_init__(self) -> None:
        if self.group < 16 or self.group & (self.group - 1):
            raise UnsupportedError(
                f"{type(self).__name__}: group has value {self.group}, "
                "expected a power of two of at least 16"
            )
        if self.rope_bits not in ((16,) if self.kind == "fp8" else (8, 16)):
            expected = "16" if self.kind == "fp8" else "8 or 16"
            raise UnsupportedError(
                f"{type(self).__name__}: rope_bits has value {self.rope_bits}, expected {expected}"
            )

    @property
    def spec(self) -> str:
        return f"{self.kind}/{self.group}/{self.rope_bits}/{int(self.rotation)}"

    def sections(self, C: int, R: int) -> Sections:
        num_groups = -(-C // self.group)
        scales_at = _align(-(-C * self.value_bits // 8))
        num_scales = num_groups + (self.rope_bits == 8)
        rope_at = _align(scales_at + num_scales * self.scale_dtype.itemsize)
        return Sections(num_groups, scales_at, rope_at, _align(rope_at + R * self.rope_bits // 8))

    def row_width(self, C: int, R: int) -> int:
        """Bytes of one row."""
        return self.sections(C, R).row_bytes

    def storage_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.uint8

    def encode(self, latent: Tensor, k_rope: Tensor) -> Tensor:
        """``[.., C]`` and ``[.., R]`` -> rows ``[.., W]`` uint8."""
        C, R = latent.shape[-1], k_rope.shape[-1]
        sections = self.sections(C, R)
        latent = latent.float()
        if self.rotation:
            latent = rotate_latent(latent)
        padded = F.pad(latent, (0, sections.num_groups * self.group - C))
        grouped = padded.unflatten(-1, (sections.num_groups, self.group))
        scales = self._scales(grouped.abs().amax(-1))
        values = self._quantise(grouped, scales).flatten(-2)[..., :C]
        if self.rope_bits == 8:
            amax = k_rope.float().abs().amax(-1, keepdim=True) if R else k_rope.new_zeros(())
            rope_scale = (amax / 127).expand(*k_rope.shape[:-1], 1).to(self.scale_dtype)
            rope = _round_to(k_rope.float(), rope_scale.float(), 127).to(torch.int8)
            scales = torch.cat([scales, rope_scale], dim=-1)
        else:
            rope = k_rope.to(torch.bfloat16)
        parts = [self._pack(values), _bytes(scales), _bytes(rope)]
        ends = [sections.scales_at, sections.rope_at, sections.row_bytes]
        begins = [0, sections.scales_at, sections.rope_at]
        return torch.cat(
            [
                F.pad(part, (0, end - begin - part.shape[-1]))
                for part, begin, end in zip(parts, begins, ends, strict=True)
            ],
            dim=-1,
        )

    def decode(self, rows: Tensor, C: int, R: int, dtype: torch.dtype) -> Tensor:
        """Rows ``[.., W]`` uint8 -> ``[.., C+R]`` of ``dtype``, the latent still rotated."""
        at = self.sections(C, R)
        product_dtype = torch.promote_types(dtype, torch.float32)
        num_scales = at.num_groups + (self.rope_bits == 8)
        scale_bytes = rows[
            ..., at.scales_at : at.scales_at + num_scales * self.scale_dtype.itemsize
        ]
        scales = scale_bytes.view(self.scale_dtype).to(product_dtype)
        values = self._unpack(rows[..., : -(-C * self.value_bits // 8)], C)
        per_value = scales[..., : at.num_groups].repeat_interleave(self.group, dim=-1)[..., :C]
        latent = (values * per_value).to(dtype)
        rope_bytes = rows[..., at.rope_at : at.rope_at + R * self.rope_bits // 8]
        if self.rope_bits == 8:
            rope = rope_bytes.view(torch.int8) * scales[..., -1:]
        else:
            rope = rope_bytes.view(torch.bfloat16)
        return torch.cat([latent, rope.to(dtype)], dim=-1)

    def _scales(self, amax: Tensor) -> Tensor:
        """Scale of each group from its largest magnitude, in the dtype it is stored in."""
        scales = amax / (2 ** (self.value_bits - 1) - 1)
        largest = torch.finfo(self.scale_dtype).max
        return torch.where(scales.isinf(), scales, scales.clamp(max=largest)).to(self.scale_dtype)

    def _quantise(self, grouped: Tensor, scales: Tensor) -> Tensor:
        return _round_to(grouped, scales.float().unsqueeze(-1), 2 ** (self.value_bits - 1) - 1)

    def _pack(self, values: Tensor) -> Tensor:
        return values.to(torch.int8).view(torch.uint8)

    def _unpack(self, packed: Tensor, C: int) -> Tensor:
        return packed.view(torch.int8).float()


@dataclass(frozen=True, kw_only=True)
class Fp8Codec(_GroupCodec):
    """e4m3 values; scale ``2**ceil(log2(max(amax/448, 1e-4)))`` per ``group`` values."""

    kind: ClassVar[str] = "fp8"

    def _scales(self, amax: Tensor) -> Tensor:
        return torch.exp2(torch.ceil(torch.log2((amax / 448).clamp(min=1e-4))))

    def _quantise(self, grouped: Tensor, scales: Tensor) -> Tensor:
        return (grouped / scales.unsqueeze(-1)).clamp(-448, 448)

    def _pack(self, values: Tensor) -> Tensor:
        return values.to(torch.float8_e4m3fn).view(torch.uint8)

    def _unpack(self, packed: Tensor, C: int) -> Tensor:
        return packed.view(torch.float8_e4m3fn).float()


@dataclass(frozen=True, kw_only=True)
class Int8Codec(_GroupCodec):
    """int8 values with scale ``amax/127`` per ``group`` values; rope optionally in 8 bits."""

    kind: ClassVar[str] = "int8"


@dataclass(frozen=True, kw_only=True)
class Int4Codec(_GroupCodec):
    """4-bit values with scale ``amax/7`` per ``group`` values, of the rotated latent."""

    group: int = 64
    rotation: bool = True
    kind: ClassVar[str] = "int4"
    value_bits: ClassVar[int] = 4
    scale_dtype: ClassVar[torch.dtype] = torch.float16

    def _pack(self, values: Tensor) -> Tensor:
        nibbles = F.pad(values + 8, (0, values.shape[-1] % 2)).to(torch.uint8)
        return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)

    def _unpack(self, packed: Tensor, C: int) -> Tensor:
        nibbles = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
        return nibbles[..., :C].float() - 8


Codec = PlainCodec | _GroupCodec
_GROUP_CODECS: dict[str, type[_GroupCodec]] = {
    codec.kind: codec for codec in (Fp8Codec, Int8Codec, Int4Codec)
}
CODECS = (PlainCodec.kind, *_GROUP_CODECS)


@lru_cache
def codec_from_spec(spec: str) -> Codec:
    """The codec whose ``spec`` this is, or that of a kind with its defaults, such as ``"int4"``.

    Custom ops carry codecs as such strings.

    Raises:
        UnsupportedError: there is no such codec.
    """
    if spec == PlainCodec.kind:
        return PlainCodec()
    kind, *options = spec.split("/")
    is_number = all(option.isdecimal() for option in options)
    if kind not in _GROUP_CODECS or len(options) not in (0, 3) or not is_number:
        raise UnsupportedError(
            f"codec_from_spec: spec has value {spec!r}, expected one of {CODECS}"
        )
    if not options:
        return _GROUP_CODECS[kind]()
    group, rope_bits, rotation = map(int, options)
    return _GROUP_CODECS[kind](group=group, rope_bits=rope_bits, rotation=bool(rotation))


def rotate_latent(latent: Tensor) -> Tensor:
    """Multiply blocks of the last dim by the orthonormal Hadamard matrix; its own inverse."""
    C = latent.shape[-1]
    size = math.gcd(C, 128)
    blocks = latent.unflatten(-1, (C // size, size))
    return (blocks @ _hadamard(size, latent.dtype, latent.device)).flatten(-2)


def _hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``H[i, j] = (-1)^popcount(i & j) / sqrt(size)``."""
    index = torch.arange(size, device=device)
    bits = index[:, None] & index[None, :]
    parity = torch.zeros_like(bits)
    while size > 1:
        parity ^= bits & 1
        bits = bits >> 1
        size >>= 1
    return (1 - 2 * parity).to(dtype) / math.sqrt(index.shape[0])


def _round_to(values: Tensor, scale: Tensor, largest: int) -> Tensor:
    """Nearest integers of ``values / scale`` in ``[-largest, largest]``; 0 where scale is 0."""
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (values / safe).round().clamp(-largest, largest)


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)
