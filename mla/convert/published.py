"""The published objective, for comparison: real rotations, one rope key, balanced joint PCA.

    k_l in R^2 of each key head and frequency l; F neighbouring frequencies are folded into a group
    E[sum over real and imaginary part of  k k^T] = U diag(energy) U^T      U real, [G*F, G*F]
    component j of a group turns with frequency  j mod F  of the group; exact only for F = 1
    the leading components of every group   -> one rope key of width R
    the others, as if at distance 0         -> one latent with the values:  PCA of [k / alpha | v]
    alpha = mean rms of those keys / mean rms of the values

Everything is measured over all calibration tokens alike: nothing is known of queries, of where
attention goes or of the output projection. `mla.convert.gqa` differs in each of these points.

Dims: D model width, E = D + 1, H heads, G key-value heads, d head width, F fold, J components of a
layer, C latent and R rotated width.
Source: TransMLA, arXiv:2502.07864, section 4: RoRoPE, FreqFold and balanced key-value PCA.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mla.checks import ShapeError
from mla.config import MLAConfig, RopeConfig
from mla.convert.complexes import as_complex, as_real, real_matrix
from mla.convert.gqa import ConvertedLayer, FitReport
from mla.convert.statistics import InputMoments
from mla.convert.weights import AffineHeads, AttentionWeights, affine_heads, check_statistics

OP = "published_layer"
ROUNDING = 1e-6  # keys smaller than this share of the values are rounding errors: not blown up


class FoldedKeys(NamedTuple):
    """All components of the keys, the leading ones of every group first."""

    maps: Tensor  # [J, E] complex: from [x | 1] to the component
    back: Tensor  # [G, d/2, J] real: component -> its part of each head's pairs
    frequency: Tensor  # [J] int64, index of the pair whose frequency it takes
    energy: Tensor  # [J] mean square over the tokens


class JointLatent(NamedTuple):
    """Principal components of balanced keys and values; the mean is not taken out."""

    down: Tensor  # [C, E]
    up: Tensor  # [K + G*d, C]
    key_error: float  # mean square that is lost of the unrotated keys
    value_error: float


def published_layer(
    weights: AttentionWeights,
    moments: InputMoments,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    inv_freq: Tensor,
    softmax_scale: float | None = None,
    kv_budget: float | tuple[int, int] = 0.75,
    fold: int = 1,
) -> ConvertedLayer:
    """Convert one attention layer as published elsewhere; the input tensors are read only.

    Args:
        weights: any floating dtype and device; the result has those of ``weights.query``.
        moments: statistics of the layer's inputs, of which only ``queries`` is read.
        num_heads, num_kv_heads, head_dim: H, G, d.
        inv_freq: ``[d/2]`` frequencies of the original rotary embedding.
        softmax_scale: of the original scores, None: ``1 / sqrt(d)``.
        kv_budget: share of the 2*G*d cached numbers to keep, R = d of them in the rope key; or
            (R, C). 1.0 is (G*d, G*d), which is exact without folding.
        fold: F, a divisor of d/2.

    Returns:
        Config, weights under the layer's own names, and errors: of the keys and values
        themselves, those of folding and of rotations that are dropped not included.

    Raises:
        ShapeError: a size does not fit.
        ValueError: a value is out of range or not finite.
    """
    heads = affine_heads(weights, num_heads, num_kv_heads, head_dim)
    check_statistics(heads, moments, inv_freq)
    rope_dim, latent_dim = published_sizes(kv_budget, num_kv_heads, head_dim, fold)
    components = fold_keys(heads.key, moments.queries, fold)
    kept, dropped = (components.maps[: rope_dim // 2], components.maps[rope_dim // 2 :])
    values = heads.value.flatten(0, 1)
    latent = balanced_latent(as_real(dropped), values, moments.queries, latent_dim)
    frequencies = components.frequency[: rope_dim // 2]
    config = MLAConfig(
        hidden_size=heads.query.shape[2] - 1,
        num_attention_heads=num_heads,
        kv_lora_rank=len(latent.down),
        qk_nope_head_dim=head_dim if len(dropped) else 0,
        qk_rope_head_dim=rope_dim,
        v_head_dim=head_dim,
        rope=RopeConfig(
            pairing="half", inv_freq=tuple(inv_freq.double().cpu()[frequencies].tolist())
        ),
        latent_norm="none",
        attention_bias=True,
        query_bias=weights.query_bias is not None,
        softmax_scale=head_dim**-0.5 if softmax_scale is None else softmax_scale,
    )
    state_dict = _state_dict(weights, heads, components, as_real(kept), latent, config)
    value_energy = float(((values @ moments.queries) * values).sum())
    return ConvertedLayer(
        config, state_dict, _report(components, latent, rope_dim, len(values), value_energy)
    )


def published_sizes(
    kv_budget: float | tuple[int, int], num_kv_heads: int, head_dim: int, fold: int
) -> tuple[int, int]:
    """R and C; every group of frequencies must give the rope key the same number of components."""
    G, d = num_kv_heads, head_dim
    if fold < 1 or (d // 2) % fold:
        raise ShapeError(f"{OP}: fold has value {fold}, expected a divisor of {d // 2}")
    if isinstance(kv_budget, tuple):
        R, C = kv_budget
    elif kv_budget == 1.0:
        R, C = G * d, G * d
    else:
        R, C = d, int(kv_budget * 2 * G * d) - d
    step = d // fold
    if not 0 < R <= G * d or R % step or C < 1:
        raise ShapeError(
            f"{OP}: kv_budget has value {kv_budget} with R = {R} and C = {C}, expected a multiple "
            f"of {step} up to {G * d} and at least 1"
        )
    return R, C


def fold_keys(key: Tensor, moment: Tensor, fold: int) -> FoldedKeys:
    """Principal components across key heads and ``fold`` neighbouring frequencies.

    Args:
        key: ``[G, d, E]`` affine maps, half-split pairs.
        moment: ``[E, E]`` second moment of ``[x | 1]``.
        fold: F.
    """
    pairs_GlE = as_complex(key)
    G, num_pairs, E = pairs_GlE.shape
    groups = num_pairs // fold
    grouped = pairs_GlE.unflatten(1, (groups, fold)).transpose(0, 1).flatten(1, 2)  # [l/F, G*F, E]
    covariance = (grouped @ moment.to(grouped) @ grouped.mH).real
    energies, vectors = (x.flip(-1) for x in torch.linalg.eigh(covariance))
    maps = vectors.mT.to(grouped) @ grouped
    back = torch.zeros(groups, fold, G, fold * G, groups, dtype=torch.float64)
    at = torch.arange(groups)
    back[at, ..., at] = vectors.unflatten(1, (G, fold)).transpose(1, 2)
    turns = torch.arange(fold * G)[:, None] % fold + fold * at
    return FoldedKeys(
        maps=maps.transpose(0, 1).reshape(-1, E),
        back=back.permute(2, 0, 1, 3, 4).reshape(G, num_pairs, -1),
        frequency=turns.flatten(),
        energy=energies.clamp_min(0.0).T.flatten(),
    )


def balanced_latent(keys: Tensor, values: Tensor, moment: Tensor, latent_dim: int) -> JointLatent:
    """Joint PCA of keys and values after the keys were scaled to the size of the values.

    Args:
        keys: ``[K, E]`` maps of the unrotated key numbers, K may be 0.
        values: ``[G*d, E]``.
        moment: ``[E, E]`` second moment of ``[x | 1]``.
        latent_dim: C.
    """
    K = len(keys)
    alpha = _size(keys, moment) / max(_size(values, moment), 1e-300) if K else 1.0
    alpha = max(alpha, ROUNDING)
    joined = torch.cat([keys / alpha, values])
    energies, vectors = torch.linalg.eigh(joined @ moment @ joined.mT)  # ascending
    lost = max(len(energies) - latent_dim, 0)
    taken = vectors[:, lost:].flip(1)
    errors = vectors[:, :lost].square() * energies[:lost].clamp_min(0.0)
    return JointLatent(
        down=taken.mT @ joined,
        up=torch.cat([alpha * taken[:K], taken[K:]]),
        key_error=alpha**2 * float(errors[:K].sum()),
        value_error=float(errors[K:].sum()),
    )


def _size(maps: Tensor, moment: Tensor) -> float:
    """Mean over the rows of their rms."""
    return float(((maps @ moment) * maps).sum(1).clamp_min(0.0).sqrt().mean())


def _state_dict(
    weights: AttentionWeights,
    heads: AffineHeads,
    components: FoldedKeys,
    rotated_key: Tensor,
    latent: JointLatent,
    config: MLAConfig,
) -> dict[str, Tensor]:
    H, G, N = config.num_attention_heads, heads.key.shape[0], config.qk_nope_head_dim
    kept, K = config.qk_rope_head_dim // 2, len(latent.up) - G * config.v_head_dim
    back = components.back.to(torch.complex128)
    # q . k = Re sum_l q_l conj(sum_j back_lj c_j) = Re sum_j (sum_l q_l back_lj) conj(c_j)
    per_head = back[..., :kept].mT.repeat_interleave(H // G, dim=0)
    rotated_query = as_real(per_head @ as_complex(heads.query))
    query = torch.cat([heads.query[:, :N], rotated_query], dim=1).flatten(0, 1)
    down = torch.cat([latent.down, rotated_key])
    key_up = (real_matrix(back[..., kept:]) @ latent.up[:K])[:, :N]  # [G, N, C]
    value_up = latent.up[K:].unflatten(0, (G, -1))
    up = torch.cat([key_up, value_up], dim=1).repeat_interleave(H // G, dim=0)
    bias = weights.output_bias
    tensors = {
        "q_proj.weight": query[:, :-1],
        "kv_a_proj_with_mqa.weight": down[:, :-1],
        "kv_a_proj_with_mqa.bias": down[:, -1],
        "kv_b_proj.weight": up.flatten(0, 1),
        "o_proj.weight": weights.output,
        "o_proj.bias": weights.output.new_zeros(len(weights.output)) if bias is None else bias,
    }
    if config.query_bias:
        tensors["q_proj.bias"] = query[:, -1]
    return {name: x.to(weights.query).contiguous() for name, x in tensors.items()}


def _report(
    components: FoldedKeys, latent: JointLatent, rope_dim: int, width: int, value_energy: float
) -> FitReport:
    key_energy = max(float(components.energy.sum()), 1e-300)
    value_energy = max(value_energy, 1e-300)
    score_error = latent.key_error / key_energy
    value_error = latent.value_error / value_energy
    return FitReport(
        rope_dim=rope_dim,
        latent_dim=len(latent.down),
        cached_numbers=rope_dim + len(latent.down),
        original_numbers=2 * width,
        rotated_frequencies=tuple(components.frequency[: rope_dim // 2].tolist()),
        rotated_energy=float(components.energy[: rope_dim // 2].sum()) / key_energy,
        score_error=math.sqrt(score_error),
        value_error=math.sqrt(value_error),
        output_error=math.sqrt(score_error + value_error),
    )
