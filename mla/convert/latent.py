"""One latent for the unrotated keys and the values: principal components in a metric.

    y = [unrotated keys | values]                        rows of maps on [x | 1]
    minimise  E (y - y~)^T M (y - y~)   over y~ = U latent + mean,   latent of width C
    M^1/2 y = P sqrt(energy) ..          latent = P_C^T M^1/2 (y - mean),   U = M^-1/2 P_C

M is chosen so that the error is that of the layer's output: for keys the second moment of the
queries that meet them (times what a score error costs each head), for values W_o^T W_o. Means cost
nothing: the same number added to all scores of a query changes no softmax, and the mean of the
values passes through attention into the bias of the output projection.

Dims: H heads, G key heads, d head width, D model width, E = D + 1, K unrotated key numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SINGULAR = 1e-12  # a metric's eigenvalues below this share of the largest are taken as this share


class Metric(NamedTuple):
    """Square root and inverse square root of a symmetric positive matrix."""

    root: Tensor
    inverse_root: Tensor


class Latent(NamedTuple):
    """The latent as a map of ``[x | 1]``, what it is expanded to, and what is lost."""

    down: Tensor  # [C, E]; zero mean over the keys seen in calibration
    key_up: Tensor  # [K, C]
    value_up: Tensor  # [G*d, C]
    value_mean: Tensor  # [G*d]
    key_error: float  # in units of the metric
    value_error: float
    energies: Tensor  # [K + G*d] of all directions in the metric, descending


def metric_of(matrix: Tensor) -> Metric:
    """Roots of a symmetric matrix; directions without weight get a tiny one."""
    values, vectors = torch.linalg.eigh(matrix)
    floor = SINGULAR * values.max().clamp_min(torch.finfo(values.dtype).tiny)
    roots = values.clamp_min(floor).sqrt()
    return Metric(vectors * roots @ vectors.mT, vectors / roots @ vectors.mT)


def key_metric(back: Tensor, query: Tensor, query_moment: Tensor, gains: Tensor) -> Tensor:
    """What an error of the unrotated keys costs: queries' second moment, seen through ``back``.

    Args:
        back: ``[G, d, K]`` from unrotated key numbers to each key head.
        query: ``[H, d, E]`` affine maps of the queries that meet them.
        query_moment: ``[E, E]``.
        gains: ``[H]`` cost of a squared score error.

    Returns:
        ``[K, K]``.
    """
    G = back.shape[0]
    costs_Hdd = query @ query_moment @ query.mT * gains[:, None, None]
    costs_Gdd = costs_Hdd.unflatten(0, (G, -1)).sum(1)
    return (back.mT @ costs_Gdd @ back).sum(0)


def value_metric(output: Tensor, num_kv_heads: int) -> Tensor:
    """What an error of the values costs: W_o^T W_o, ``[G*d, G*d]``.

    Heads that attend to different keys add their errors' squares (the diagonal blocks), heads that
    attend to the same keys add the errors themselves. Trained heads are between: half of each.

    Args:
        output: ``[D, H, d]``.
    """
    by_group = output.unflatten(1, (num_kv_heads, -1))  # [D, G, H/G, d]
    apart = torch.einsum("dghi,dghj->gij", by_group, by_group)
    together = by_group.sum(2).flatten(1)
    return 0.5 * torch.block_diag(*apart) + 0.5 * together.mT @ together


def joint_latent(
    keys: Tensor,
    values: Tensor,
    key_weight: Metric,
    value_weight: Metric,
    moment: Tensor,
    latent_dim: int,
) -> Latent:
    """The best latent of ``latent_dim`` numbers for unrotated keys and values together.

    Args:
        keys: ``[K, E]`` maps of the unrotated key numbers, K may be 0.
        values: ``[G*d, E]``.
        key_weight, value_weight: their metrics.
        moment: ``[E, E]`` second moment of ``[x | 1]`` over the keys, last entry 1.
        latent_dim: C.
    """
    K, mean = len(keys), moment[:, -1]
    weighted = torch.cat([key_weight.root @ keys, value_weight.root @ values])
    centered = weighted - torch.outer(weighted @ mean, _unit(mean))
    energies, vectors = torch.linalg.eigh(centered @ moment @ centered.mT)  # ascending
    lost = len(energies) - latent_dim
    taken = vectors[:, lost:].flip(1)
    errors = vectors[:, :lost].square() * energies[:lost].clamp_min(0.0)
    return Latent(
        down=taken.mT @ centered,
        key_up=key_weight.inverse_root @ taken[:K],
        value_up=value_weight.inverse_root @ taken[K:],
        value_mean=values @ mean,
        key_error=float(errors[:K].sum()),
        value_error=float(errors[K:].sum()),
        energies=energies.flip(0),
    )


def _unit(mean: Tensor) -> Tensor:
    """The row that picks the constant 1 of ``[x | 1]``."""
    unit = torch.zeros_like(mean)
    unit[-1] = 1.0
    return unit
