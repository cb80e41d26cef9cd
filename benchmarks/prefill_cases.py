"""Set-up that the CPU and the GPU benchmark of prefill share: sizes, inputs, expansion, oracle.

Dims: L tokens of one sequence, H heads, C latent, N unrotated, R rotated, V value width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mla import reference

SCALE = 192**-0.5


class Sizes(NamedTuple):
    """Those of DeepSeek-V2-Lite."""

    H: int = 16
    C: int = 512
    N: int = 128
    R: int = 64
    V: int = 128


class Inputs(NamedTuple):
    """What gradients are taken of."""

    query: Tensor  # [1, L, H, N+R]
    latent: Tensor  # [1, L, C]
    k_rope: Tensor  # [1, L, R]
    weight: Tensor  # [H*(N+V), C]


def draw(L: int, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Random leaves that require gradients."""
    H, C, N, R, V = sizes
    generator = torch.Generator(device).manual_seed(4)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()

    weight = (torch.randn(H * (N + V), C, generator=generator, device=device) / C**0.5).to(dtype)
    return Inputs(drawn(1, L, H, N + R), drawn(1, L, C), drawn(1, L, R), weight.requires_grad_())


def expand(inputs: Inputs, sizes: Sizes, padded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """query, keys and values ``[1, H, L, *]``; values padded to the width of keys."""
    H, _, N, R, V = sizes
    kv = F.linear(inputs.latent, inputs.weight).unflatten(-1, (H, N + V))
    rope = inputs.k_rope[:, :, None].expand(-1, -1, H, -1)
    keys = torch.cat([kv[..., :N], rope], dim=-1)
    values = kv[..., N:]
    if padded:
        values = F.pad(values, (0, N + R - V))
    return inputs.query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)


def truth(inputs: Inputs, sizes: Sizes, *, gradients: bool) -> dict[str, Tensor]:
    """The oracle in float64 on the CPU: ``out``, or the gradients for a gradient of ones."""
    leaves = Inputs(*(x.detach().cpu().double().requires_grad_(gradients) for x in inputs))
    out = reference.expanded_attention(
        *leaves, num_heads=sizes.H, value_dim=sizes.V, scale=SCALE, causal=True
    ).out
    if not gradients:
        return {"out": out}
    found = torch.autograd.grad(out, leaves, torch.ones_like(out))
    return dict(zip(Inputs._fields, found, strict=True))
