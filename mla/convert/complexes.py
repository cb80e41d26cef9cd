"""RoPE pairs as complex numbers, and affine maps as matrices.

A head's pair l, ``(x[l], x[l + d/2])``, is the complex number ``z_l = x[l] + i x[l + d/2]``. RoPE
multiplies it by ``exp(i position theta_l)``, and the score of a query and a key is

    q . k = Re sum_l q_l conj(k_l) exp(i distance theta_l)        distance = position_q - position_k

A biased projection ``W x + b`` is the matrix ``[W | b]`` on ``[x | 1]``: all maps here have
E = D + 1 columns, and one second moment of ``[x | 1]`` holds covariances and means of everything.

Dims: D model width, E = D + 1, d head width, T distances.
"""

from __future__ import annotations

import torch
from torch import Tensor


def as_complex(rows: Tensor) -> Tensor:
    """Pairs of real rows ``[.., d, E]``, half-split, as complex rows ``[.., d/2, E]``."""
    real, imag = rows.chunk(2, dim=-2)
    return torch.complex(real, imag)


def as_real(rows: Tensor) -> Tensor:
    """Inverse of `as_complex`."""
    return torch.cat([rows.real, rows.imag], dim=-2)


def real_matrix(matrix: Tensor) -> Tensor:
    """A complex-linear map ``[.., m, n]`` as it acts on half-split pairs, ``[.., 2m, 2n]``."""
    upper = torch.cat([matrix.real, -matrix.imag], dim=-1)
    lower = torch.cat([matrix.imag, matrix.real], dim=-1)
    return torch.cat([upper, lower], dim=-2)


def affine(weight: Tensor, bias: Tensor | None, num_heads: int) -> Tensor:
    """``[W | b]`` in float64, one block of rows for each head: ``[num_heads, rows, E]``."""
    column = weight.new_zeros(weight.shape[0]) if bias is None else bias
    joined = torch.cat([weight.double(), column.double()[:, None]], dim=1)
    return joined.unflatten(0, (num_heads, -1))


def mean_rotation(inv_freq: Tensor, distances: Tensor) -> Tensor:
    """mu_l = mean of ``exp(i distance theta_l)``, complex ``[d/2]``.

    What a rotation amounts to where it can no longer be applied: the best constant in its place.

    Args:
        inv_freq: ``[d/2]``.
        distances: ``[T]`` weights of the distances 0 .. T-1.
    """
    weights = distances.double() / distances.double().sum()
    angles = torch.arange(len(weights), dtype=torch.float64)[:, None] * inv_freq.double()
    return weights.to(torch.complex128) @ torch.polar(torch.ones_like(angles), angles)
