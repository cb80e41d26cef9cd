"""The layer to convert as affine maps, and the checks of everything that a caller gives.

Dims: D model width, E = D + 1, H heads, G key-value heads, d head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mla.checks import ShapeError, bind_dims
from mla.convert.complexes import affine
from mla.convert.statistics import InputMoments

OP = "gqa_to_mla"


class AttentionWeights(NamedTuple):
    """Projections of the layer to convert; head h reads key-value head ``h // (H/G)``.

    Rows of queries and keys pair half-split for RoPE: row l of a head with row ``l + d/2``.
    """

    query: Tensor  # [H*d, D]
    key: Tensor  # [G*d, D]
    value: Tensor  # [G*d, D]
    output: Tensor  # [D, H*d]
    query_bias: Tensor | None = None  # [H*d]
    key_bias: Tensor | None = None  # [G*d]
    value_bias: Tensor | None = None  # [G*d]
    output_bias: Tensor | None = None  # [D]


class AffineHeads(NamedTuple):
    """The layer as maps of ``[x | 1]`` in float64, on the CPU."""

    query: Tensor  # [H, d, E]
    key: Tensor  # [G, d, E]
    value: Tensor  # [G, d, E]
    output: Tensor  # [D, H, d]


def affine_heads(weights: AttentionWeights, H: int, G: int, d: int) -> AffineHeads:
    """Check sizes and values, then join weights and biases."""
    for size_name, size in (("num_heads", H), ("num_kv_heads", G), ("head_dim", d)):
        if size < 1:
            raise ValueError(f"{OP}: {size_name} has value {size}, expected at least 1")
    if H % G:
        raise ShapeError(f"{OP}: num_heads has value {H}, expected a multiple of {G}")
    if d % 2:
        raise ShapeError(f"{OP}: head_dim has value {d}, expected an even number")
    rows = {"query": H * d, "key": G * d, "value": G * d}
    sizes: dict[str, int] = {}
    for field, count in rows.items():
        bind_dims(OP, f"weights.{field}", getattr(weights, field), f"{count} D", sizes)
    bind_dims(OP, "weights.output", weights.output, f"D {H * d}", sizes)
    for field, count in {**rows, "output": sizes["D"]}.items():
        bias = getattr(weights, f"{field}_bias")
        if bias is not None:
            bind_dims(OP, f"weights.{field}_bias", bias, str(count), sizes)
    for field, tensor in weights._asdict().items():
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{OP}: weights.{field} has non-finite values, expected numbers")
    host = AttentionWeights(*(None if x is None else x.detach().cpu() for x in weights))  # type: ignore[arg-type]
    return AffineHeads(
        query=affine(host.query, host.query_bias, H),
        key=affine(host.key, host.key_bias, G),
        value=affine(host.value, host.value_bias, G),
        output=host.output.double().unflatten(1, (H, d)),
    )


def check_statistics(heads: AffineHeads, moments: InputMoments, inv_freq: Tensor) -> None:
    """Check the statistics and frequencies against the layer."""
    E = heads.query.shape[2]
    for field in ("queries", "keys"):
        moment: Tensor = getattr(moments, field)
        bind_dims(OP, f"moments.{field}", moment, f"{E} {E}", {})
        if not bool(torch.isfinite(moment).all()) or abs(float(moment[-1, -1]) - 1.0) > 1e-6:
            raise ValueError(
                f"{OP}: moments.{field} has non-finite values or last entry "
                f"{float(moment[-1, -1])}, expected the second moment of [x | 1]"
            )
    bind_dims(OP, "inv_freq", inv_freq, str(heads.query.shape[1] // 2), {})
    distances = moments.distances
    if distances.ndim != 1 or not bool((distances >= 0).all()) or not float(distances.sum()) > 0:
        raise ValueError(
            f"{OP}: moments.distances has shape {tuple(distances.shape)} and sum "
            f"{float(distances.sum())}, expected one weight for each distance, not all 0"
        )
