"""Converted layers in the layout of DeepSeek-V3, which many programs can load.

Such a layer differs from a converted one in what it fixes, not in what it computes:

    one list of rotated frequencies and one (R, C) for all layers    `shared_layout`
    scores scaled by (N + R)^-0.5                                    the rest goes into the queries
    interleaved pairs                                                rows reordered
    an RMS norm on the latent                                        a constant K beside it
    no bias on the queries                                           a norm with a constant as well

With a channel that always holds K the norm hardly depends on the other channels c:

    rms([c | K]) = sqrt((|c|^2 + K^2) / C)
    w [c | K] / rms([c | K]) = w sqrt(C) / K * [c | K] * (1 - |c|^2 / (2 K^2) + ..)

so the matrix behind the norm undoes the factor. K is 2^14 in every layer, exact in all dtypes and
in range of float16; c is scaled by a power of two until no input of the layer can take it beyond
|c| = 2^3, which leaves a relative error of 2^-23. The weight w is a power of two, so that it adds
no rounding, and 0 for the constant of the latent. That channel is cached, so C here counts it.

Dims: D model width, E = D + 1, H heads, G key heads, d head width, C latent with the constant, R
rotated, N unrotated, V value width, Q query latent.
Source: sizes and names of DeepSeek-V3, arXiv:2412.19437, as transformers stores them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mla.checks import UnsupportedError
from mla.config import MLAConfig
from mla.convert.choose import best_split, rotation_losses, split_candidates
from mla.convert.complexes import mean_rotation
from mla.convert.gqa import gqa_to_mla, score_gains
from mla.convert.rotate import KeyComponents, rotate_keys
from mla.convert.statistics import InputMoments
from mla.convert.weights import AttentionWeights, affine_heads, check_statistics

CONSTANT = 2.0**14  # K: float16 ends at 65504
LARGEST = 2.0**3  # of the latent beside it
QUERY_PADDING = 16  # Q = D + 16: a constant, and a width that matrix units like


class SharedLayout(NamedTuple):
    """What all layers of a model agree on; C does not count the constant yet."""

    sizes: tuple[int, int]  # (R, C) of `gqa_to_mla`
    rotated_frequencies: tuple[int, ...]  # R/2 indices of original pairs, ascending
    error: float  # sum over layers of squared relative output errors


def shared_layout(
    layers: Sequence[tuple[AttentionWeights, InputMoments]],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    inv_freq: Tensor,
    softmax_scale: float | None = None,
    kv_budget: float | tuple[int, int] = 0.75,
    progress: Callable[[int, int], None] | None = None,
) -> SharedLayout:
    """The list of frequencies, and the split of a budget, that cost all layers together least.

    Layer by layer, the components of one frequency are ordered by what they lose unrotated; these
    losses are summed over layers and the R/2 largest sums stay rotated. So each layer gives its own
    best components to a list that is the same everywhere.

    Args:
        layers: weights and statistics, as for `gqa_to_mla`.
        num_heads, num_kv_heads, head_dim, inv_freq, softmax_scale: as for `gqa_to_mla`.
        kv_budget: share of the 2*G*d cached numbers to keep, the constant counted, or (R, C) with
            it. 1.0 loses nothing and takes one number more than the original.
        progress: called after each fit with their number and how many there are at most.

    Raises:
        ValueError: the budget has no room for a rotated pair and two latent numbers.
    """
    sizes = layout_candidates(kv_budget, num_kv_heads, head_dim)
    shape: dict[str, Any] = {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "inv_freq": inv_freq,
        "softmax_scale": head_dim**-0.5 if softmax_scale is None else softmax_scale,
    }
    losses_lG = sum((_layer_losses(*layer, **shape) for layer in layers), torch.zeros(()))
    fitted = 0

    def fit(rope_dim: int, latent_dim: int) -> SharedLayout:
        nonlocal fitted
        listed, error = most_lost(losses_lG, rope_dim // 2), 0.0
        for weights, moments in layers:
            report = gqa_to_mla(
                weights,
                moments,
                kv_budget=(rope_dim, latent_dim),
                rotated_frequencies=listed,
                **shape,
            ).report
            error += report.output_error**2
            fitted += 1
            if progress is not None:
                progress(fitted, len(layers) * len(sizes))
        return SharedLayout((rope_dim, latent_dim), listed, error)

    if len(sizes) == 1:
        return SharedLayout(sizes[0], most_lost(losses_lG, sizes[0][0] // 2), math.nan)
    return best_split(sizes, fit, lambda layout: layout.error)


def layout_candidates(
    kv_budget: float | tuple[int, int], num_kv_heads: int, head_dim: int
) -> list[tuple[int, int]]:
    """Pairs (R, C), C without the constant, that a budget allows."""
    half = num_kv_heads * head_dim
    if kv_budget == 1.0:
        return [(half, half)]
    pairs = split_candidates(kv_budget, num_kv_heads, head_dim)
    sizes = [(R, C - 1) for R, C in pairs if R >= 2 and C >= 2]
    if not sizes:
        raise ValueError(
            f"shared_layout: kv_budget has value {kv_budget}, expected room for a rotated pair, "
            "a constant and a latent"
        )
    return sizes


def _layer_losses(
    weights: AttentionWeights,
    moments: InputMoments,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    inv_freq: Tensor,
    softmax_scale: float,
) -> Tensor:
    """`losses_by_frequency` of one layer."""
    heads = affine_heads(weights, num_heads, num_kv_heads, head_dim)
    check_statistics(heads, moments, inv_freq)
    gains = score_gains(heads, moments.keys, softmax_scale)
    components = rotate_keys(heads.query, heads.key, moments.queries, moments.keys, gains)
    rotation = mean_rotation(inv_freq.cpu(), moments.distances.cpu())
    return losses_by_frequency(components, rotation)


def losses_by_frequency(components: KeyComponents, rotation: Tensor) -> Tensor:
    """``[d/2, G]``: what each component loses unrotated, the largest of each frequency first.

    Args:
        components: of one layer's keys, G of each frequency.
        rotation: mu, complex ``[d/2]``.
    """
    loss = rotation_losses(components, rotation)
    by_frequency = loss[components.frequency.argsort(stable=True)].unflatten(0, (len(rotation), -1))
    return by_frequency.sort(1, descending=True).values


def most_lost(losses: Tensor, count: int) -> tuple[int, ...]:
    """Frequencies of the ``count`` largest entries of ``[d/2, G]``, ascending, with repeats."""
    taken = losses.flatten().argsort(descending=True, stable=True)[:count]
    return tuple((taken // losses.shape[1]).sort().values.tolist())


def common_config(configs: Sequence[MLAConfig]) -> MLAConfig:
    """The one config of all layers.

    Raises:
        UnsupportedError: they differ, or are not those of converted layers.
    """
    config = configs[0]
    if config.rope.pairing != "half" or config.rope.inv_freq is None:
        fact, expected = f"rope {config.rope.pairing!r}", "'half' with given frequencies"
    elif config.latent_norm != "none" or config.q_lora_rank is not None:
        fact, expected = f"latent_norm {config.latent_norm!r}", "'none' and a full-rank query"
    elif set(configs) != {config}:
        fact, expected = "another config in each layer", "one list of frequencies and one (R, C)"
    else:
        return config
    raise UnsupportedError(
        f"export_deepseek_v3: model has {fact}, expected {expected}; convert with "
        "layout='deepseek_v3'"
    )


def longrope_parameters(inv_freq: Sequence[float], theta: float, context: int) -> dict[str, Any]:
    """``rope_parameters`` of a transformers config that give a list of frequencies.

    Args:
        inv_freq: R/2 frequencies above 0, to be met to about an ulp of float32.
        theta: base of the frequencies that the factors divide.
        context: the trained one.
    """
    R = 2 * len(inv_freq)
    exponents = torch.arange(0, R, 2, dtype=torch.int64).float() / R
    standard = theta**exponents  # in float32, as transformers has it
    wanted = torch.tensor(inv_freq, dtype=torch.float64)
    if not bool((wanted > 0).all()):
        raise UnsupportedError(
            f"export_deepseek_v3: inv_freq has smallest value {float(wanted.min())}, expected > 0"
        )
    factors = (1.0 / (standard.double() * wanted)).tolist()
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": context,
    }


def deepseek_layer(
    config: MLAConfig, tensors: Mapping[str, Tensor], input_weight: Tensor
) -> dict[str, Tensor]:
    """Weights of one converted layer under the names and in the layout of DeepSeek-V3.

    Args:
        config: of the converted layer.
        tensors: its state dict; any floating dtype, which the result has too.
        input_weight: ``[D]`` of the RMS norm in front of the layer: it bounds the inputs.
    """
    H, N, R = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    C = config.kv_lora_rank
    weight = tensors["q_proj.weight"]
    wide = {name: x.detach().cpu().double() for name, x in tensors.items()}
    inputs = input_weight.detach().cpu().double()
    scale = config.scale * (N + R) ** 0.5

    query = interleave(wide["q_proj.weight"].unflatten(0, (H, N + R)), R).flatten(0, 1) * scale
    down, bias = wide["kv_a_proj_with_mqa.weight"], wide["kv_a_proj_with_mqa.bias"][:, None]
    latent = beside_constant(down[:C], bias[:C, 0], _bound(down[:C] * inputs, bias[:C, 0]), C + 1)
    up = torch.nn.functional.pad(wide["kv_b_proj.weight"] * latent.undo, (0, 1))
    result = {
        "kv_a_proj_with_mqa.weight": torch.cat([latent.weight, interleave(down[C:], R)]),
        "kv_a_proj_with_mqa.bias": torch.cat([latent.bias, interleave(bias[C:], R)[:, 0]]),
        "kv_a_layernorm.weight": latent.norm,
        "kv_b_proj.weight": up,
        "o_proj.weight": wide["o_proj.weight"],
        "o_proj.bias": wide["o_proj.bias"],
    }
    if config.query_bias:
        by_head = wide["q_proj.bias"].unflatten(0, (H, N + R, 1))
        query_bias = interleave(by_head, R).flatten(0, 1) * scale
        result |= _biased_query(query, query_bias, inputs)
    else:
        result["q_proj.weight"] = query
    return {name: x.to(weight).contiguous() for name, x in result.items()}


def _biased_query(query: Tensor, bias: Tensor, input_weight: Tensor) -> dict[str, Tensor]:
    """The inputs themselves as the query latent, a constant beside them that carries the bias."""
    D = query.shape[1]
    Q = D + QUERY_PADDING
    largest = float(input_weight.abs().max()) * D**0.5
    inputs = beside_constant(query.new_ones(D).diag(), query.new_zeros(D), largest, Q)
    norm = inputs.norm.clone()
    norm[-1] = 1.0  # the constant leaves the norm as sqrt(Q)
    gap = query.new_zeros(len(query), Q - D - 1)
    return {
        "q_a_proj.weight": inputs.weight,
        "q_a_proj.bias": inputs.bias,
        "q_a_layernorm.weight": norm,
        "q_b_proj.weight": torch.cat([query * inputs.undo, gap, bias / Q**0.5], dim=1),
    }


class BesideConstant(NamedTuple):
    """An affine map whose result passes an RMS norm unharmed, in ``width`` channels."""

    weight: Tensor  # [width, D]
    bias: Tensor  # [width], K last
    norm: Tensor  # [width] weight of the norm, 0 for the constant
    undo: float  # what multiplies the matrix behind the norm


def beside_constant(weight: Tensor, bias: Tensor, largest: float, width: int) -> BesideConstant:
    """Put a constant beside ``c = weight x + bias``, so that an RMS norm hardly changes c.

    Args:
        weight: ``[C, D]``.
        bias: ``[C]``.
        largest: bound of ``|c|``.
        width: more than C; what is between c and the constant is 0.
    """
    C = len(weight)
    scale = 2.0 ** math.floor(math.log2(LARGEST / max(largest, 1e-30)))
    gain = 2.0 ** round(math.log2(CONSTANT / width**0.5))
    wide_weight = weight.new_zeros(width, weight.shape[1])
    wide_bias = bias.new_zeros(width)
    wide_weight[:C], wide_bias[:C] = scale * weight, scale * bias
    wide_bias[-1] = CONSTANT
    norm = bias.new_full((width,), gain)
    norm[C:] = 0.0
    return BesideConstant(wide_weight, wide_bias, norm, CONSTANT / (scale * gain * width**0.5))


def _bound(weight: Tensor, bias: Tensor) -> float:
    """The largest ``|weight u + bias|`` over all u of mean square 1."""
    square = torch.linalg.eigvalsh(weight @ weight.mT)[-1].clamp_min(0.0)
    return float((square * weight.shape[1]).sqrt() + bias.norm())


def interleave(rows: Tensor, rope_dim: int) -> Tensor:
    """The last R rows of ``[.., rows, E]`` from half-split pairs to interleaved ones."""
    before, rotated = rows.split([rows.shape[-2] - rope_dim, rope_dim], dim=-2)
    first, second = rotated.chunk(2, dim=-2)
    pairs = torch.stack([first, second], dim=-2).flatten(-3, -2)
    return torch.cat([before, pairs], dim=-2)
