"""Convert one grouped-query (or multi-head) attention layer to multi-head latent attention.

    1. rotate.py   complex principal components of the keys, frequency by frequency
    2. choose.py   R/2 of them stay rotated: one key shared by all heads, own frequencies per layer
    3. here        the others take the mean of their rotation, folded into the queries
    4. latent.py   they share one latent of C numbers with the values, best for the layer's output

    score_h = scale * (q_rope_h . k_rope + q_nope_h . W_UK_h latent)     q_nope_h = mu * q_h

With R = G*d, C = G*d nothing is lost. Nothing here reads a model, a file or a global.

Dims: D model width, H heads, G key-value heads, d head width, E = D + 1, C latent, R rotated and N
unrotated width; V = d.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mla.config import MLAConfig, RopeConfig
from mla.convert.choose import (
    Choice,
    best_split,
    check_frequencies,
    choose_rotated,
    split_candidates,
)
from mla.convert.complexes import as_complex, as_real, mean_rotation, real_matrix
from mla.convert.latent import Latent, Metric, joint_latent, key_metric, metric_of, value_metric
from mla.convert.rotate import KeyComponents, dropped_back, kept_query, rotate_keys
from mla.convert.statistics import InputMoments
from mla.convert.weights import AffineHeads, AttentionWeights, affine_heads, check_statistics


class FitReport(NamedTuple):
    """What the conversion of one layer keeps, estimated from its moments.

    Errors are relative and root-mean-square over the calibration tokens: 0 is exact.
    """

    rope_dim: int  # R
    latent_dim: int  # C
    cached_numbers: int  # R + C, for one token
    original_numbers: int  # 2 * G * d
    rotated_frequencies: tuple[int, ...]  # index of the original pair, one for each rotated pair
    rotated_energy: float  # share of the keys' energy that keeps its rotation
    score_error: float  # of the scores before softmax
    value_error: float  # of the values, as the output projection sees them
    output_error: float  # both together, relative to the attention output
    spectrum: tuple[float, ...] = ()  # energies of the latent's directions, kept or not, sum 1


class ConvertedLayer(NamedTuple):
    """A layer for `mla.MultiheadLatentAttention`."""

    config: MLAConfig
    state_dict: dict[str, Tensor]
    report: FitReport


class _Fit(NamedTuple):
    """One choice of R and C, carried out."""

    choice: Choice
    back: Tensor  # [G, d, K] from unrotated key numbers to the key heads
    latent: Latent

    @property
    def error(self) -> float:
        """Expected squared error of the output, up to a factor common to all choices."""
        return self.choice.lost_energy + self.latent.key_error + self.latent.value_error


class PreparedLayer(NamedTuple):
    """What every choice of R and C of one layer has in common; `prepare_layer` makes it."""

    weights: AttentionWeights
    heads: AffineHeads
    moments: InputMoments
    inv_freq: Tensor
    softmax_scale: float
    gains: Tensor  # [H] cost of a squared error of the scores
    components: KeyComponents
    rotation: Tensor  # mu, complex [d/2]
    unrotated_query: Tensor  # [H, d, E] mu folded in
    value_cost: Tensor  # [G*d, G*d]
    value_weight: Metric  # its roots

    def convert(
        self, rope_dim: int, latent_dim: int, rotated_frequencies: Sequence[int] | None = None
    ) -> ConvertedLayer:
        """The layer with R = ``rope_dim`` and C = ``latent_dim``; both must be possible."""
        return self._finish(self._fit(rope_dim, latent_dim, rotated_frequencies))

    def convert_best(
        self, sizes: Sequence[tuple[int, int]], rotated_frequencies: Sequence[int] | None = None
    ) -> ConvertedLayer:
        """The layer with the pair of ``sizes`` that has the smallest estimated error."""

        def fit(rope_dim: int, latent_dim: int) -> _Fit:
            return self._fit(rope_dim, latent_dim, rotated_frequencies)

        return self._finish(best_split(sizes, fit, lambda candidate: candidate.error))

    def _fit(self, rope_dim: int, latent_dim: int, frequencies: Sequence[int] | None) -> _Fit:
        heads, components, keys_moment = self.heads, self.components, self.moments.keys
        choice = choose_rotated(components, self.rotation, rope_dim, frequencies)
        num_pairs = heads.query.shape[1] // 2
        back = real_matrix(dropped_back(components, choice.dropped, num_pairs))
        keys = as_real(components.maps[choice.dropped])
        key_cost = key_metric(back, self.unrotated_query, self.moments.queries, self.gains)
        key_weight = metric_of(key_cost) if len(keys) else Metric(key_cost, key_cost)
        values = heads.value.flatten(0, 1)
        latent_dim = min(latent_dim, len(keys) + len(values))
        latent = joint_latent(keys, values, key_weight, self.value_weight, keys_moment, latent_dim)
        return _Fit(choice, back, latent)

    def _finish(self, fit: _Fit) -> ConvertedLayer:
        config = _config(self, fit)
        return ConvertedLayer(config, _state_dict(self, fit, config), _report(self, fit))


def gqa_to_mla(
    weights: AttentionWeights,
    moments: InputMoments,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    inv_freq: Tensor,
    softmax_scale: float | None = None,
    kv_budget: float | tuple[int, int] = 0.75,
    rotated_frequencies: Sequence[int] | None = None,
) -> ConvertedLayer:
    """Convert one attention layer; the input tensors are read only.

    Args:
        weights: any floating dtype and device; the result has those of ``weights.query``.
        moments: statistics of the layer's inputs.
        num_heads, num_kv_heads, head_dim: H, G, d.
        inv_freq: ``[d/2]`` frequencies of the original rotary embedding.
        softmax_scale: of the original scores, None: ``1 / sqrt(d)``.
        kv_budget: share of the 2*G*d cached numbers to keep, the split between rope and latent
            being the one with the smallest estimated error; or (R, C).
        rotated_frequencies: R/2 indices of original pairs, at most G times each; None: chosen for
            this layer. Needs ``kv_budget`` (R, C).

    Returns:
        Config, weights under the layer's own names, and what it costs.

    Raises:
        ShapeError: a size does not fit.
        ValueError: a value is out of range or not finite.
    """
    sizes = split_candidates(kv_budget, num_kv_heads, head_dim)
    if rotated_frequencies is not None:
        check_frequencies(rotated_frequencies, sizes, num_kv_heads, head_dim)
    prepared = prepare_layer(
        weights,
        moments,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        inv_freq=inv_freq,
        softmax_scale=softmax_scale,
    )
    return prepared.convert_best(sizes, rotated_frequencies)


def prepare_layer(
    weights: AttentionWeights,
    moments: InputMoments,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    inv_freq: Tensor,
    softmax_scale: float | None = None,
) -> PreparedLayer:
    """What `gqa_to_mla` does before it knows the budget; arguments and errors as there."""
    heads = affine_heads(weights, num_heads, num_kv_heads, head_dim)
    check_statistics(heads, moments, inv_freq)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    gains = score_gains(heads, moments.keys, scale)
    rotation = mean_rotation(inv_freq.cpu(), moments.distances.cpu())
    value_cost = value_metric(heads.output, num_kv_heads)
    return PreparedLayer(
        weights=weights,
        heads=heads,
        moments=moments,
        inv_freq=inv_freq,
        softmax_scale=scale,
        gains=gains,
        components=rotate_keys(heads.query, heads.key, moments.queries, moments.keys, gains),
        rotation=rotation,
        unrotated_query=as_real(as_complex(heads.query) * rotation[:, None]),
        value_cost=value_cost,
        value_weight=metric_of(value_cost),
    )


def score_gains(heads: AffineHeads, moment: Tensor, scale: float) -> Tensor:
    """``[H]``: what a squared error of a head's (unscaled) scores does to the squared output.

    An error of one score moves its head's output towards or away from that value, so the spread of
    the values as the output projection sees them is the gain.
    """
    G, H = heads.key.shape[0], heads.query.shape[0]
    mean = moment[:, -1]
    spread_Gdd = heads.value @ (moment - torch.outer(mean, mean)) @ heads.value.mT
    cost_Hdd = torch.einsum("dhi,dhj->hij", heads.output, heads.output)
    spread_Hdd = spread_Gdd.repeat_interleave(H // G, dim=0)
    return scale**2 * (cost_Hdd * spread_Hdd).sum((1, 2)).clamp_min(0.0)


def _config(layer: PreparedLayer, fit: _Fit) -> MLAConfig:
    H, d, E = layer.heads.query.shape
    kept = layer.components.frequency[fit.choice.kept]
    frequencies = layer.inv_freq.double().cpu()[kept].tolist()
    rope = RopeConfig(pairing="half", inv_freq=tuple(frequencies))
    return MLAConfig(
        hidden_size=E - 1,
        num_attention_heads=H,
        kv_lora_rank=len(fit.latent.down),
        qk_nope_head_dim=d if len(fit.choice.dropped) else 0,
        qk_rope_head_dim=2 * len(frequencies),
        v_head_dim=d,
        rope=rope if frequencies else RopeConfig(pairing="none"),
        latent_norm="none",
        attention_bias=True,
        query_bias=layer.weights.query_bias is not None,
        softmax_scale=layer.softmax_scale,
    )


def _state_dict(layer: PreparedLayer, fit: _Fit, config: MLAConfig) -> dict[str, Tensor]:
    heads, components, weights = layer.heads, layer.components, layer.weights
    H, G, N = config.num_attention_heads, heads.key.shape[0], config.qk_nope_head_dim
    rotated_query = as_real(kept_query(heads.query, components, fit.choice.kept))
    query = torch.cat([layer.unrotated_query[:, :N], rotated_query], dim=1).flatten(0, 1)
    rotated_key = as_real(components.maps[fit.choice.kept])
    down = torch.cat([fit.latent.down, rotated_key])
    key_up = (fit.back @ fit.latent.key_up)[:, :N]  # [G, N, C]
    value_up = fit.latent.value_up.unflatten(0, (G, -1))  # [G, d, C]
    up = torch.cat([key_up, value_up], dim=1).repeat_interleave(H // G, dim=0)
    mean_H = fit.latent.value_mean.unflatten(0, (G, -1)).repeat_interleave(H // G, dim=0)
    output_bias = torch.einsum("dhi,hi->d", heads.output, mean_H)
    if weights.output_bias is not None:
        output_bias = output_bias + weights.output_bias.to(output_bias)
    tensors = {
        "q_proj.weight": query[:, :-1],
        "kv_a_proj_with_mqa.weight": down[:, :-1],
        "kv_a_proj_with_mqa.bias": down[:, -1],
        "kv_b_proj.weight": up.flatten(0, 1),
        "o_proj.weight": weights.output,
        "o_proj.bias": output_bias,
    }
    if config.query_bias:
        tensors["q_proj.bias"] = query[:, -1]
    return {name: x.to(weights.query).contiguous() for name, x in tensors.items()}


def _report(layer: PreparedLayer, fit: _Fit) -> FitReport:
    components, value_cost, moment = layer.components, layer.value_cost, layer.moments.keys
    mean, values = moment[:, -1], layer.heads.value.flatten(0, 1)
    value_spread = values @ (moment - torch.outer(mean, mean)) @ values.mT
    value_energy = max(float((value_cost * value_spread).sum()), 1e-300)
    score_energy = max(float(components.energy.sum()), 1e-300)
    R, C = 2 * len(fit.choice.kept), len(fit.latent.down)
    return FitReport(
        rope_dim=R,
        latent_dim=C,
        cached_numbers=R + C,
        original_numbers=2 * len(values),
        rotated_frequencies=tuple(components.frequency[fit.choice.kept].tolist()),
        rotated_energy=float(components.energy[fit.choice.kept].sum()) / score_energy,
        score_error=math.sqrt((fit.choice.lost_energy + fit.latent.key_error) / score_energy),
        value_error=math.sqrt(fit.latent.value_error / value_energy),
        output_error=math.sqrt(fit.error / value_energy),
        spectrum=_shares(fit.latent.energies),
    )


def _shares(energies: Tensor) -> tuple[float, ...]:
    """Parts of the sum, to three digits."""
    parts = energies.clamp_min(0.0) / energies.clamp_min(0.0).sum().clamp_min(1e-300)
    return tuple(float(f"{part:.3g}") for part in parts.tolist())
