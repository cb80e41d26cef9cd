"""Mix the pairs of equal frequency across key heads, so that few of them carry the energy.

    k'_l = w_l * k_l        one complex number for each key head, weighted by its queries' energy
    E[k'_l k'_l^H] = U_l diag(energy_l) U_l^H
    c_l = U_l^H k'_l        components; k_l = (U_l c_l) / w_l is exact

RoPE multiplies all G numbers of one frequency by the same unit complex number, so it commutes with
any unitary U_l, not only with a real rotation.

Dims: H heads, G key heads, d head width, E = D + 1, J = G * d/2 components of a layer.
Source: extends the real rotation of TransMLA, arXiv:2502.07864.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mla.convert.complexes import as_complex

TINY = 1e-12  # energies below this share of the largest are taken as this share


class KeyComponents(NamedTuple):
    """All J components of the keys of one layer, those of the lowest frequency index first."""

    maps: Tensor  # [J, E] complex: from [x | 1] to the component
    back: Tensor  # [G, J] complex: component -> its part of each head's pair
    frequency: Tensor  # [J] int64, index of the pair l
    energy: Tensor  # [J] mean square of what it adds to the scores, times gains, over all phases


def rotate_keys(
    query: Tensor,
    key: Tensor,
    query_moment: Tensor,
    key_moment: Tensor,
    gains: Tensor,
) -> KeyComponents:
    """Hermitian principal components of the keys, frequency by frequency.

    Args:
        query: ``[H, d, E]`` affine maps, half-split pairs.
        key: ``[G, d, E]``; head h reads key head ``h // (H/G)``.
        query_moment: ``[E, E]`` second moment of ``[x | 1]`` over queries.
        key_moment: ``[E, E]`` the same over keys, weighted by the attention they receive.
        gains: ``[H]`` how much a squared error of a head's scores matters.
    """
    H, G = query.shape[0], key.shape[0]
    pairs_HlE, pairs_GlE = as_complex(query), as_complex(key)
    moment_q = query_moment.to(torch.complex128)
    moment_k = key_moment.to(torch.complex128)
    energy_Hl = ((pairs_HlE @ moment_q) * pairs_HlE.conj()).sum(-1).real * gains[:, None]
    energy_Gl = energy_Hl.unflatten(0, (G, H // G)).sum(1)
    mean_l = energy_Gl.mean(0).clamp_min(torch.finfo(torch.float64).tiny)
    weight_Gl = (energy_Gl / mean_l).clamp_min(TINY).sqrt()
    weighted_lGE = (pairs_GlE * weight_Gl[..., None]).transpose(0, 1)
    values_lj, vectors_lGj = torch.linalg.eigh(weighted_lGE @ moment_k @ weighted_lGE.mH)
    energy_lj = 0.5 * values_lj.clamp_min(0.0) * mean_l[:, None]  # E Re(z)^2 = E |z|^2 / 2
    maps_ljE = vectors_lGj.mH @ weighted_lGE
    back_lGj = vectors_lGj / weight_Gl.T[..., None]
    return KeyComponents(
        maps=maps_ljE.flatten(0, 1),
        back=back_lGj.transpose(0, 1).flatten(1),
        frequency=torch.arange(len(mean_l)).repeat_interleave(G),
        energy=energy_lj.flatten(),
    )


def kept_query(query: Tensor, components: KeyComponents, kept: Tensor) -> Tensor:
    """Each head's queries for the components ``kept``, complex ``[H, kept, E]``.

    q_l conj(k_l) = sum_j (q_l conj(back_j)) conj(c_j)
    """
    H, G = query.shape[0], components.back.shape[0]
    back_HJ = components.back[:, kept].repeat_interleave(H // G, dim=0)
    pairs_HJE = as_complex(query)[:, components.frequency[kept]]
    return pairs_HJE * back_HJ.conj()[..., None]


def dropped_back(components: KeyComponents, dropped: Tensor, num_pairs: int) -> Tensor:
    """From the components ``dropped`` to each key head's pairs, complex ``[G, d/2, dropped]``."""
    G = components.back.shape[0]
    back = torch.zeros(G, num_pairs, len(dropped), dtype=torch.complex128)
    back[:, components.frequency[dropped], torch.arange(len(dropped))] = components.back[:, dropped]
    return back
