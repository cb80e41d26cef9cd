"""Sizes and conventions of one multi-head latent attention layer, validated on construction.

    scale     = (N + R)^-0.5 * m^2        m = 0.1 * mscale_all_dim * ln(factor) + 1
    amplitude = attention_factor, or what YaRN and LongRoPE prescribe where it is None

Dims: D hidden_size, H heads, Q query latent, C key-value latent, N unrotated and R rotated width of
a query or key, V value width. Fields carry the names of the DeepSeek configs in transformers.

Source: DeepSeek-V2, arXiv:2405.04434, section 2.1; YaRN, arXiv:2309.00071; LongRoPE,
arXiv:2402.13753.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from mla.checks import ShapeError, UnsupportedError
from mla.presets import PRESETS, fields_from_hf

Pairing = Literal["interleaved", "half", "none"]
Scaling = Literal["none", "linear", "llama3", "yarn", "longrope"]
LatentNorm = Literal["rms", "none"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding of the R rotated numbers: which pairs turn, and how fast.

    Args:
        pairing: ``"interleaved"`` turns (x0, x1), (x2, x3), ..; ``"half"`` turns (x0, x[R/2]), ..;
            ``"none"`` keeps the shared R-wide key but turns nothing.
        theta: base of the frequencies, ``theta ** (-2 i / R)``.
        scaling: how frequencies are stretched beyond the trained context.
        factor: stretch of the context.
        original_max_position_embeddings: trained context; required by llama3, yarn, longrope and
            ``query_scale_beta``.
        beta_fast, beta_slow, truncate: limits of YaRN's ramp in turns over the trained context, and
            whether they are rounded outwards to whole dims.
        mscale, mscale_all_dim: YaRN's amplitude and softmax corrections, see `amplitude` and
            `score_mscale`.
        attention_factor: multiplies cos and sin; None takes what the scaling prescribes.
        low_freq_factor, high_freq_factor: limits of the llama3 ramp.
        short_factor, long_factor: longrope's divisors, R/2 each.
        inv_freq: R/2 frequencies given by the caller, repeats allowed, instead of ``theta`` and
            ``scaling``.
        query_scale_beta: scale queries by ``1 + beta * ln(1 + floor(position / trained context))``.

    Raises:
        ValueError: a field is of the wrong type, out of range, or missing for this scaling.
    """

    pairing: Pairing = "interleaved"
    theta: float = 10000.0
    scaling: Scaling = "none"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    inv_freq: tuple[float, ...] | None = None
    query_scale_beta: float | None = None

    def __post_init__(self) -> None:
        _check_choice(self, "pairing", Pairing)
        _check_choice(self, "scaling", Scaling)
        _check_number(self, "theta", above=0.0)
        _check_number(self, "factor", above=0.0)
        _check_number(self, "beta_fast", above=0.0)
        _check_number(self, "beta_slow", above=0.0)
        _check_bool(self, "truncate")
        _check_integer(self, "original_max_position_embeddings", at_least=1, optional=True)
        for name in ("mscale", "mscale_all_dim", "query_scale_beta"):
            _check_number(self, name, at_least=0.0, optional=True)
        for name in ("attention_factor", "low_freq_factor", "high_freq_factor"):
            _check_number(self, name, above=0.0, optional=True)
        _check_numbers(self, "short_factor", above=0.0)
        _check_numbers(self, "long_factor", above=0.0)
        _check_numbers(self, "inv_freq", at_least=0.0)
        self._check_scaling()

    def _check_scaling(self) -> None:
        needed = {
            "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
            "yarn": ("original_max_position_embeddings",),
            "longrope": ("original_max_position_embeddings", "short_factor", "long_factor"),
        }
        for name in needed.get(self.scaling, ()):
            if getattr(self, name) is None:
                raise _error(self, name, f"a value, because scaling is {self.scaling!r}")
        if self.query_scale_beta and self.original_max_position_embeddings is None:
            raise _error(
                self,
                "original_max_position_embeddings",
                f"a value, because query_scale_beta is {self.query_scale_beta}",
            )
        if self.scaling == "llama3" and self.low_freq_factor >= self.high_freq_factor:  # type: ignore[operator]
            raise _error(
                self, "low_freq_factor", f"less than high_freq_factor {self.high_freq_factor}"
            )
        if self.scaling == "yarn" and self.beta_fast < self.beta_slow:
            raise _error(self, "beta_fast", f"at least beta_slow {self.beta_slow}")
        if self.scaling == "yarn" and self.theta == 1.0:
            raise _error(self, "theta", "other than 1, because YaRN divides by its logarithm")
        if self.inv_freq is not None and self.scaling != "none":
            raise _error(
                self,
                "scaling",
                "'none', because inv_freq gives the frequencies",
                "state YaRN's amplitude as attention_factor and its softmax scale as softmax_scale",
            )

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied with."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.scaling == "yarn":
            if self.mscale and self.mscale_all_dim:
                return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
            return _mscale(self.factor, 1.0)
        if self.scaling == "longrope" and self.factor > 1.0:
            assert self.original_max_position_embeddings is not None  # checked on construction
            return math.sqrt(
                1 + math.log(self.factor) / math.log(self.original_max_position_embeddings)
            )
        return 1.0

    @property
    def score_mscale(self) -> float:
        """m, whose square is the part of the softmax scale that comes from a stretched context."""
        if self.scaling == "none" or not self.mscale_all_dim:
            return 1.0
        return _mscale(self.factor, self.mscale_all_dim)


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """One attention layer: sizes, rotary embedding, norms, scales and biases.

    Args:
        hidden_size, num_attention_heads, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim,
            v_head_dim: D, H, C, N, R, V. N may be 0 where R is not, and the other way round.
        q_lora_rank: Q, or None for one full-rank query projection.
        rope: how the R rotated numbers turn.
        latent_norm: ``"rms"`` norms the latent before it is cached, ``"none"`` has no such norm.
        latent_norm_eps, query_norm_eps: transformers uses 1e-6 for both, not ``rms_norm_eps``.
        query_scale: multiplies queries after their last projection.
        latent_scale: multiplies the latent after its norm.
        attention_bias: biases on ``q_a_proj``, ``kv_a_proj_with_mqa`` and ``o_proj``.
        query_bias: bias on ``q_proj`` or ``q_b_proj``.
        softmax_scale: overrides `scale`.
        attention_dropout: probability, in training only.

    Raises:
        ValueError: a field is of the wrong type or out of range.
        ShapeError: a list of frequencies is not R/2 long.
    """

    hidden_size: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    rope: RopeConfig = field(default_factory=RopeConfig)
    latent_norm: LatentNorm = "rms"
    latent_norm_eps: float = 1e-6
    query_norm_eps: float = 1e-6
    query_scale: float = 1.0
    latent_scale: float = 1.0
    attention_bias: bool = False
    query_bias: bool = False
    softmax_scale: float | None = None
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_attention_heads", "kv_lora_rank", "v_head_dim"):
            _check_integer(self, name, at_least=1)
        _check_integer(self, "qk_nope_head_dim", at_least=0)
        _check_integer(self, "qk_rope_head_dim", at_least=0)
        _check_integer(self, "q_lora_rank", at_least=1, optional=True)
        _check_choice(self, "latent_norm", LatentNorm)
        for name in ("latent_norm_eps", "query_norm_eps"):
            _check_number(self, name, at_least=0.0)
        for name in ("query_scale", "latent_scale"):
            _check_number(self, name, above=0.0)
        _check_bool(self, "attention_bias")
        _check_bool(self, "query_bias")
        _check_number(self, "softmax_scale", above=0.0, optional=True)
        _check_number(self, "attention_dropout", at_least=0.0, below=1.0)
        if not isinstance(self.rope, RopeConfig):
            raise _error(self, "rope", "a RopeConfig", "from_dict also takes a dict")
        self._check_widths()

    def _check_widths(self) -> None:
        R = self.qk_rope_head_dim
        if R % 2:
            raise _error(self, "qk_rope_head_dim", "an even number, because RoPE turns pairs")
        if self.qk_head_dim == 0:
            raise _error(self, "qk_nope_head_dim", "at least 1 where qk_rope_head_dim is 0")
        for name in ("inv_freq", "short_factor", "long_factor"):
            values = getattr(self.rope, name)
            if values is not None and len(values) != R // 2:
                raise ShapeError(
                    f"MLAConfig: rope.{name} has {len(values)} values, "
                    f"expected qk_rope_head_dim / 2 = {R // 2}"
                )

    @property
    def qk_head_dim(self) -> int:
        """N + R, the width of a query or key of one head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """C + R, the numbers cached for one token."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def scale(self) -> float:
        """What scores are multiplied with before softmax."""
        if self.softmax_scale is not None:
            return self.softmax_scale
        m = self.rope.score_mscale
        return float(self.qk_head_dim**-0.5 * m * m)

    @classmethod
    def preset(cls, name: str) -> MLAConfig:
        """The layer of a published model, ``MLAConfig.preset("deepseek-v3")``.

        Raises:
            UnsupportedError: no such preset; the message lists those that exist.
        """
        if name not in PRESETS:
            raise UnsupportedError(
                f"MLAConfig.preset: name has value {name!r}, expected one of {sorted(PRESETS)}"
            )
        return cls.from_dict(PRESETS[name])

    @classmethod
    def from_hf(cls, config: Any, layer_idx: int = 0) -> MLAConfig:
        """The layer that transformers builds from its own ``config`` at ``layer_idx``.

        Args:
            config: a transformers config object, or the dict of its ``config.json``.
            layer_idx: which layer; matters where a model mixes attention kinds.

        Raises:
            UnsupportedError: the layer is not MLA, or needs mathematics this package lacks; the
                message names the field that says so.
        """
        return cls.from_dict(fields_from_hf(config, layer_idx))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MLAConfig:
        """Inverse of `to_dict`; fields left out take their defaults.

        Raises:
            ValueError: a field is unknown, or a size is missing.
        """
        _check_keys(cls, values)
        rope = values.get("rope", RopeConfig())
        if isinstance(rope, Mapping):
            _check_keys(RopeConfig, rope)
            given: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in rope.items()
            }
            rope = RopeConfig(**given)
        return cls(**{**values, "rope": rope})

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain dicts, lists, numbers and strings, fit for JSON."""
        values = asdict(self)
        values["rope"] = {
            name: list(v) if isinstance(v, tuple) else v for name, v in values["rope"].items()
        }
        return values


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def _error(owner: object, name: str, expected: str, advice: str = "") -> ValueError:
    text = f"{type(owner).__name__}: {name} has value {getattr(owner, name)!r}, expected {expected}"
    return ValueError(f"{text}; {advice}" if advice else text)


def _check_choice(owner: object, name: str, choices: Any) -> None:
    if getattr(owner, name) not in get_args(choices):
        raise _error(owner, name, f"one of {list(get_args(choices))}")


def _check_bool(owner: object, name: str) -> None:
    if not isinstance(getattr(owner, name), bool):
        raise _error(owner, name, "True or False")


def _check_integer(owner: object, name: str, *, at_least: int, optional: bool = False) -> None:
    value = getattr(owner, name)
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise _error(owner, name, f"an integer of at least {at_least}{' or None' * optional}")


def _check_number(
    owner: object,
    name: str,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    optional: bool = False,
) -> None:
    value = getattr(owner, name)
    if optional and value is None:
        return
    if not _is_number(value) or value < at_least or not above < value < below:
        limits = [f"of at least {at_least}"] if at_least > -math.inf else []
        limits += [f"above {above}"] if above > -math.inf else []
        limits += [f"below {below}"] if below < math.inf else []
        raise _error(owner, name, f"a finite number {' and '.join(limits)}{' or None' * optional}")


def _check_numbers(
    owner: object, name: str, *, at_least: float = -math.inf, above: float = -math.inf
) -> None:
    values = getattr(owner, name)
    if values is None:
        return
    if not isinstance(values, tuple):
        raise _error(owner, name, "a tuple of numbers or None")
    for value in values:
        if not _is_number(value) or value < at_least or value <= above:
            limit = f"above {above}" if above > -math.inf else f"of at least {at_least}"
            raise _error(owner, name, f"a tuple of finite numbers {limit}, not {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_keys(owner: type[RopeConfig] | type[MLAConfig], values: Mapping[str, Any]) -> None:
    known = [f.name for f in fields(owner)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(
            f"{owner.__name__}.from_dict: values has unknown fields {unknown}, "
            f"expected fields among {known}"
        )
    missing = [
        f.name
        for f in fields(owner)
        if f.default is MISSING and f.default_factory is MISSING and f.name not in values
    ]
    if missing:
        raise ValueError(f"{owner.__name__}.from_dict: values has no {missing}, expected them all")
