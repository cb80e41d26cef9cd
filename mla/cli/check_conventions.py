"""Conventions of multi-head latent attention: the right ones of a config, and the known wrong ones.

Everything that two implementations can disagree about is one field of `Conventions`. A comparison
that fails is repeated against the oracle under each wrong convention, and the one that makes it
pass is the diagnosis.

The right values are worked out here again, in Python floats and from the papers, not taken from
`mla.rope` or `mla.config`: those are what is checked.

Dims: C latent width, N unrotated width, R rotated width, V value width.
Source: RoFormer, arXiv:2104.09864; YaRN, arXiv:2309.00071; LongRoPE, arXiv:2402.13753; Llama 3.1
and Llama 4 reference code; DeepSeek-V2, arXiv:2405.04434.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from mla.config import MLAConfig, RopeConfig


@dataclass(frozen=True)
class Conventions:
    """One complete way to compute the layer."""

    # rope
    pairing: Literal["interleaved", "half", "none", "interleaved to half"]
    inv_freq: tuple[float, ...]
    inv_freq_long: tuple[float, ...]  # beyond the trained context; the same unless longrope
    trained: float  # context
    amplitude: float
    query_scale_beta: float
    direction: float = 1.0
    first_position: int = 0
    chunks_restart: bool = False
    # norms and factors
    norm: Literal["rms", "none", "row", "mean", "one plus"] = "rms"
    query_norm: Literal["rms", "none", "mean", "one plus"] = "rms"
    latent_norm_eps: float = 1e-6
    query_norm_eps: float = 1e-6
    latent_scale: float = 1.0
    query_scale: float = 1.0
    # scores
    scale: float = 1.0
    query_order: Literal["nope rope", "rope nope"] = "nope rope"
    kv_b_rows: Literal["keys values", "values keys", "all keys", "heads last"] = "keys values"
    mask: Literal["bottom-right", "top-left", "none"] = "bottom-right"
    sees_padding: bool = False
    scores_rope: bool = True
    lse_unit: float = 1.0
    merge: Literal["lse", "base 2", "mean"] = "lse"
    # storage
    row: Literal["latent rope", "rope latent"] = "latent rope"
    ragged_at: Literal["own", "all"] = "own"
    low_nibble_first: bool = True
    rotation: bool = True


def conventions_of(config: MLAConfig) -> Conventions:
    """The right conventions of this layer."""
    rope, R = config.rope, config.qk_rope_head_dim
    m = 1.0
    if rope.scaling != "none" and rope.mscale_all_dim:
        m = _growth(rope.factor, rope.mscale_all_dim)
    scale = m * m / math.sqrt(config.qk_nope_head_dim + R)
    return Conventions(
        pairing=rope.pairing if R else "none",
        inv_freq=tuple(_frequencies(rope, R)),
        inv_freq_long=tuple(_frequencies(rope, R, long=True)),
        trained=float(rope.original_max_position_embeddings or math.inf),
        amplitude=_amplitude(rope),
        query_scale_beta=rope.query_scale_beta or 0.0,
        norm=config.latent_norm,
        latent_norm_eps=config.latent_norm_eps,
        query_norm_eps=config.query_norm_eps,
        latent_scale=config.latent_scale,
        query_scale=config.query_scale,
        scale=scale if config.softmax_scale is None else config.softmax_scale,
    )


def wrong_conventions(config: MLAConfig) -> Iterator[tuple[str, Conventions]]:
    """Mistakes that have been seen, each as words and as the conventions that it amounts to."""
    right = conventions_of(config)
    for words, changes in _mistakes(config, right):
        wrong = replace(right, **changes)
        if wrong != right:
            yield words, wrong


def _mistakes(config: MLAConfig, right: Conventions) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from _rope_mistakes(config, right)
    for eps in (1e-5, 1e-6, 1e-8, 0.0):
        yield f"the latent norm's eps is {eps:g}", {"latent_norm_eps": eps}
        yield f"the query norm's eps is {eps:g}", {"query_norm_eps": eps}
    yield "the latent is not normalised", {"norm": "none"}
    yield "the latent norm covers the shared key too", {"norm": "row"}
    yield "the latent norm subtracts the mean", {"norm": "mean"}
    yield "the latent norm's weight counts from one", {"norm": "one plus"}
    yield "the query latent is not normalised", {"query_norm": "none"}
    yield "the query norm subtracts the mean", {"query_norm": "mean"}
    yield "the query norm's weight counts from one", {"query_norm": "one plus"}
    yield "the latent's factor is left out", {"latent_scale": 1.0}
    yield "the queries' factor is left out", {"query_scale": 1.0}
    yield from _scale_mistakes(config, right)
    yield "the rotated part of a query comes first", {"query_order": "rope nope"}
    yield "kv_b_proj has the value rows of a head before its key rows", {"kv_b_rows": "values keys"}
    yield "kv_b_proj has all key rows before all value rows", {"kv_b_rows": "all keys"}
    yield "kv_b_proj has the heads inside the rows of a head", {"kv_b_rows": "heads last"}
    yield "the causal mask is aligned top-left, not bottom-right", {"mask": "top-left"}
    yield "there is no causal mask", {"mask": "none"}
    yield "padding before the first key is visible", {"sees_padding": True}
    yield "the shared rotated key does not enter the scores", {"scores_rope": False}
    yield "the log-sum-exp is in base 2", {"lse_unit": 1 / math.log(2)}
    yield "parts are merged as if their log-sum-exp were in base 2", {"merge": "base 2"}
    yield "parts are averaged, not weighted by log-sum-exp", {"merge": "mean"}
    yield "rows hold the rotated key before the latent", {"row": "rope latent"}
    yield "ragged rows are written as if all had as many new tokens", {"ragged_at": "all"}
    yield "4-bit values have the even one in the high nibble", {"low_nibble_first": False}
    yield "the codec's rotation is the other way (left out or added)", {"rotation": False}


def _rope_mistakes(config: MLAConfig, right: Conventions) -> Iterator[tuple[str, dict[str, Any]]]:
    rope, R = config.rope, config.qk_rope_head_dim
    yield "pairs are interleaved, (x0, x1), not half-split", {"pairing": "interleaved"}
    yield "pairs are half-split, (x0, x[R/2]), not interleaved", {"pairing": "half"}
    yield (
        "pairs are read interleaved and written half-split",
        {"pairing": "interleaved to half"},
    )
    yield "nothing is rotated", {"pairing": "none"}
    yield "angles have the opposite sign", {"direction": -1.0}
    yield "positions count from 1", {"first_position": 1}
    yield "positions start again at 0 in each chunk", {"chunks_restart": True}
    yield "cos and sin lack their amplitude (attention_factor)", {"amplitude": 1.0}
    beta = {"query_scale_beta": 0.0}
    yield "queries lack their factor by position (query_scale_beta)", beta
    if not R:
        return
    others: dict[str, RopeConfig] = {}
    if rope.scaling != "none":
        others["frequencies are not scaled for the longer context"] = RopeConfig(theta=rope.theta)
        scaled = RopeConfig(theta=rope.theta, scaling="linear", factor=rope.factor)
        others["all frequencies are divided by the factor (linear scaling)"] = scaled
    if rope.scaling == "yarn":
        turned = replace(rope, truncate=not rope.truncate)
        others["YaRN's ramp has the wrong rounding (truncate)"] = turned
        swapped = replace(rope, beta_fast=32.0, beta_slow=1.0)
        others["YaRN's ramp runs from 32 to 1 turns (beta_fast, beta_slow)"] = swapped
    if rope.inv_freq is not None:
        plain = RopeConfig(theta=rope.theta)
        others["given frequencies are ignored"] = plain
    others["theta is 10000"] = replace(rope, theta=10000.0)
    for words, other in others.items():
        inv_freq, long = _frequencies(other, R), _frequencies(other, R, long=True)
        yield words, {"inv_freq": tuple(inv_freq), "inv_freq_long": tuple(long)}
    if rope.scaling == "longrope":
        yield "short factors serve every context", {"inv_freq_long": right.inv_freq}
        yield "long factors serve every context", {"inv_freq": right.inv_freq_long}
    if rope.inv_freq is None:
        wide = config.qk_head_dim
        shorter = tuple(f ** (R / wide) for f in right.inv_freq)
        if rope.scaling == "none":
            words = "exponents of the frequencies run over N+R, not R"
            yield words, {"inv_freq": shorter, "inv_freq_long": shorter}


def _scale_mistakes(config: MLAConfig, right: Conventions) -> Iterator[tuple[str, dict[str, Any]]]:
    N, R = config.qk_nope_head_dim, config.qk_rope_head_dim
    C, V = config.kv_lora_rank, config.v_head_dim
    m = _growth(config.rope.factor, config.rope.mscale_all_dim or 0.0)
    yield "the scale is (N+R)^-0.5 without mscale^2", {"scale": (N + R) ** -0.5}
    yield "the scale has mscale once, not squared", {"scale": (N + R) ** -0.5 * m}
    yield "the scale has mscale^2 where none belongs", {"scale": right.scale * m * m}
    for words, width in (("N", N), ("R", R), ("V", V), ("C+R", C + R), ("C", C)):
        if width:
            yield f"the scale is {words}^-0.5 times mscale^2", {"scale": width**-0.5 * m * m}
            yield f"the scale is {words}^-0.5", {"scale": width**-0.5}
    yield "the scale is 1/(N+R)", {"scale": 1 / (N + R)}
    yield "scores are not scaled", {"scale": 1.0}


def _growth(factor: float, weight: float) -> float:
    return 1.0 + 0.1 * weight * math.log(factor) if factor > 1 else 1.0


def _amplitude(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.scaling == "yarn" and rope.mscale and rope.mscale_all_dim:
        return _growth(rope.factor, rope.mscale) / _growth(rope.factor, rope.mscale_all_dim)
    if rope.scaling == "yarn":
        return _growth(rope.factor, 1.0)
    if rope.scaling == "longrope" and rope.factor > 1:
        return math.sqrt(1 + math.log(rope.factor, rope.original_max_position_embeddings or 2))
    return 1.0


def _frequencies(rope: RopeConfig, R: int, *, long: bool = False) -> Iterator[float]:
    """Angle per position of each of the R/2 pairs."""
    if rope.inv_freq is not None:
        yield from rope.inv_freq
        return
    for pair in range(R // 2):
        frequency = rope.theta ** (-2.0 * pair / R)
        if rope.scaling == "linear":
            frequency /= rope.factor
        elif rope.scaling == "llama3":
            frequency = _llama3(rope, frequency)
        elif rope.scaling == "yarn":
            kept = _yarn_kept(rope, R, pair)
            frequency = kept * frequency + (1 - kept) * frequency / rope.factor
        elif rope.scaling == "longrope":
            factors = rope.long_factor if long else rope.short_factor
            assert factors is not None  # RopeConfig checked it
            frequency /= factors[pair]
        yield frequency


def _yarn_kept(rope: RopeConfig, R: int, pair: int) -> float:
    """Share of the unscaled frequency: 1 for pairs of many turns, 0 for pairs of few."""
    trained = float(rope.original_max_position_embeddings or 0)

    def pair_with(turns: float) -> float:
        return R / 2 * math.log(trained / (2 * math.pi * turns)) / math.log(rope.theta)

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, R - 1.0)
    width = high - low if high != low else 0.001
    return 1 - min(max((pair - low) / width, 0.0), 1.0)


def _llama3(rope: RopeConfig, frequency: float) -> float:
    low, high = rope.low_freq_factor, rope.high_freq_factor
    assert low is not None and high is not None  # RopeConfig checked them
    turns = float(rope.original_max_position_embeddings or 0) * frequency / (2 * math.pi)
    if turns > high:
        return frequency
    if turns < low:
        return frequency / rope.factor
    smooth = (turns - low) / (high - low)
    return (1 - smooth) * frequency / rope.factor + smooth * frequency
