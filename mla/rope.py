"""Rotary embedding: positions to angles, and the rotation itself.

    angle_LR = position_L * inv_freq_R          R/2 angles for each position
    (x, y)   -> (x cos - y sin, y cos + x sin)  for each pair, cos and sin times rope.amplitude

Dims: L positions, R rotated width. Oracle: mla.reference.rotate.
Source: RoFormer, arXiv:2104.09864; YaRN, arXiv:2309.00071; LongRoPE, arXiv:2402.13753; the llama3
ramp and the order of float32 operations as in transformers' ``modeling_rope_utils``, so that angles
agree bit for bit: at position 10,000 one rounding of a frequency moves an angle by 5e-4.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from mla.checks import ShapeError
from mla.config import Pairing, RopeConfig


def inverse_frequencies(
    rope: RopeConfig,
    R: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    long: bool = False,
) -> Tensor:
    """Angle per position of each pair.

    Args:
        rope: frequencies given, or ``theta`` and ``scaling``.
        R: rotated width, even.
        dtype: computed and returned in ``promote_types(dtype, float32)``.
        long: longrope only: the frequencies for contexts beyond the trained one.

    Returns:
        ``[R/2]``.

    Raises:
        ShapeError: R is odd or negative, or differs from the length of given frequencies.
    """
    _check_width(rope, R)
    dtype = torch.promote_types(dtype, torch.float32)
    if rope.inv_freq is not None:
        return torch.tensor(rope.inv_freq, dtype=dtype, device=device)
    exponents = torch.arange(0, R, 2, dtype=dtype, device=device) / R
    powers = rope.theta**exponents
    if rope.scaling == "longrope":
        factors = rope.long_factor if long else rope.short_factor
        return 1.0 / (torch.tensor(factors, dtype=dtype, device=device) * powers)
    if rope.scaling == "yarn":
        return _yarn(rope, R, powers)
    if rope.scaling == "llama3":
        return _llama3(rope, 1.0 / powers)
    if rope.scaling == "linear":
        return (1.0 / powers) / rope.factor
    return 1.0 / powers


def cos_sin(
    rope: RopeConfig, R: int, positions: Tensor, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle, times ``rope.amplitude``.

    Under longrope one position beyond the trained context gives all positions of the call the long
    frequencies, as in transformers; the choice stays on the device.

    Args:
        rope: its pairing is not looked at.
        R: rotated width, even.
        positions: ``[..]`` integers.
        dtype: of the result; the computation runs in ``promote_types(dtype, float32)``.

    Returns:
        cos, sin: ``[.., R/2]`` each, on the device of ``positions``.

    Raises:
        ShapeError: as `inverse_frequencies`.
    """
    compute_dtype = torch.promote_types(dtype, torch.float32)
    table = _table_for(rope, R, compute_dtype, positions)
    if rope.scaling == "longrope":
        is_long = (positions >= _trained_context(rope)).any()
        inv_freq = torch.where(is_long, table[1], table[0])
    else:
        inv_freq = table[0]
    angles = positions.unsqueeze(-1).to(compute_dtype) * inv_freq
    cos, sin = angles.cos(), angles.sin()
    if rope.amplitude != 1.0:
        cos, sin = cos * rope.amplitude, sin * rope.amplitude
    return cos.to(dtype), sin.to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, pairing: Pairing) -> Tensor:
    """Turn each pair of the last dim by its angle.

        x_2i, x_2i+1    -> interleaved       x_i, x_i+R/2 -> half       nothing -> none

    Products and sums run in ``promote_types(x.dtype, cos.dtype)``: cos and sin in the dtype of
    ``x`` give the bits of transformers' DeepSeek-V3 family; in float32 there is one rounding, at
    the end, as in its DeepSeek-V2.

    Args:
        x: ``[.., R]``.
        cos, sin: ``[.., R/2]``, broadcast against the leading dims of ``x``.
        pairing: which numbers form a pair.

    Returns:
        ``[.., R]``, dtype and order of ``x``: interleaved input stays interleaved.

    Raises:
        ShapeError: R is odd, or cos is not R/2 wide.
    """
    R = x.shape[-1]
    if pairing == "none" or R == 0:
        return x
    if R % 2 or cos.shape[-1] != R // 2:
        raise ShapeError(
            f"rotate: x has {R} numbers in its last dim and cos has {cos.shape[-1]}, "
            "expected an even number R and R/2"
        )
    if pairing == "interleaved":
        first, second = x.view(*x.shape[:-1], R // 2, 2).unbind(-1)
        turned = (first * cos - second * sin, second * cos + first * sin)
        return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat(turned, dim=-1).to(x.dtype)


def query_position_scale(
    rope: RopeConfig, positions: Tensor, *, dtype: torch.dtype = torch.float32
) -> Tensor | None:
    """Factor on the queries that grows with the position, or None where there is none.

        1 + beta * ln(1 + floor(position / trained context))

    Returns:
        The shape of ``positions``, in ``dtype``.

    Source: Llama 4, used by Mistral-Small-4.
    """
    if not rope.query_scale_beta:
        return None
    compute_dtype = torch.promote_types(dtype, torch.float32)
    turns = torch.floor(positions.to(compute_dtype) / _trained_context(rope))
    return (1 + rope.query_scale_beta * torch.log(1 + turns)).to(dtype)


def _check_width(rope: RopeConfig, R: int) -> None:
    if R < 0 or R % 2:
        raise ShapeError(f"rope: R has value {R}, expected an even number of at least 0")
    for name in ("inv_freq", "short_factor", "long_factor"):
        values = getattr(rope, name)
        if values is not None and len(values) != R // 2:
            raise ShapeError(f"rope: {name} has {len(values)} values, expected R/2 = {R // 2}")


def _trained_context(rope: RopeConfig) -> int:
    trained = rope.original_max_position_embeddings
    assert trained is not None  # RopeConfig checked it
    return trained


def _yarn(rope: RopeConfig, R: int, powers: Tensor) -> Tensor:
    """Short waves keep their frequency, long ones are divided by ``factor``, a ramp between."""
    trained = _trained_context(rope)

    def dim_of(turns: float) -> float:
        return R * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, R - 1)
    if low == high:
        high += 0.001  # transformers' guard against a division by zero
    index = torch.arange(R // 2, dtype=powers.dtype, device=powers.device)
    kept = 1 - ((index - low) / (high - low)).clamp(0, 1)
    return 1.0 / (rope.factor * powers) * (1 - kept) + 1.0 / powers * kept


def _llama3(rope: RopeConfig, inv_freq: Tensor) -> Tensor:
    """As YaRN, with the ramp in turns over the trained context instead of dims."""
    trained, low, high = _trained_context(rope), rope.low_freq_factor, rope.high_freq_factor
    assert low is not None and high is not None  # RopeConfig checked them
    wavelength = 2 * math.pi / inv_freq
    ramp = (trained / wavelength - low) / (high - low)
    blended = (1 - ramp) * inv_freq / rope.factor + ramp * inv_freq
    blended = torch.where(wavelength > trained / low, inv_freq / rope.factor, blended)
    return torch.where(wavelength < trained / high, inv_freq, blended)


def _table_for(rope: RopeConfig, R: int, dtype: torch.dtype, positions: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or type(positions) is not Tensor:
        return _table(rope, R, dtype, positions.device)  # fake tensors must not be kept
    return _kept_table(rope, R, dtype, positions.device)


# Kept, because building it on a GPU costs a dozen launches or a copy from the host that waits.
@lru_cache(maxsize=1024)
def _kept_table(rope: RopeConfig, R: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # On the host first: transformers computes there, and a graph capture that would start here
    # fails aloud instead of recording a table that later eager calls find unwritten.
    return _table(rope, R, dtype, torch.device("cpu")).to(device)


def _table(rope: RopeConfig, R: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[1, R/2]``, or ``[2, R/2]`` short and long for longrope."""
    is_long = (False, True) if rope.scaling == "longrope" else (False,)
    return torch.stack(
        [inverse_frequencies(rope, R, dtype=dtype, device=device, long=long) for long in is_long]
    )
