"""Layers of published models: by name, and from a transformers config.

Everything here is plain data and functions from dict to dict; `mla.config` turns them into objects.
Source: the ``config.json`` of each model, and the attention classes of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from mla.checks import UnsupportedError

_Get: TypeAlias = Callable[[str], Any]


def _layer(
    D: int, H: int, Q: int | None, C: int, N: int, R: int, V: int, **other: Any
) -> dict[str, Any]:
    return {
        "hidden_size": D,
        "num_attention_heads": H,
        "q_lora_rank": Q,
        "kv_lora_rank": C,
        "qk_nope_head_dim": N,
        "qk_rope_head_dim": R,
        "v_head_dim": V,
        **other,
    }


def _yarn(factor: float, trained: int, mscale: float, **other: Any) -> dict[str, Any]:
    return {
        "scaling": "yarn",
        "factor": factor,
        "original_max_position_embeddings": trained,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        **other,
    }


_DEEPSEEK_V3 = _layer(7168, 128, 1536, 512, 128, 64, 128, rope=_yarn(40.0, 4096, 1.0))

# The published long and short factors of MiniCPM3-4B are the same 16 numbers.
_MINICPM3_FACTORS = [
    1.0591234137867171,
    1.1241891283591912,
    1.2596935748670968,
    1.5380380402321725,
    2.093982484148734,
    3.1446935121267696,
    4.937952647693647,
    7.524541999994549,
    10.475458000005451,
    13.062047352306353,
    14.85530648787323,
    15.906017515851266,
    16.461961959767827,
    16.740306425132907,
    16.87581087164081,
    16.940876586213285,
]

PRESETS: dict[str, dict[str, Any]] = {
    "deepseek-v2-lite": _layer(2048, 16, None, 512, 128, 64, 128, rope=_yarn(40.0, 4096, 0.707)),
    "deepseek-v2": _layer(5120, 128, 1536, 512, 128, 64, 128, rope=_yarn(40.0, 4096, 0.707)),
    "deepseek-v3": _DEEPSEEK_V3,
    "deepseek-r1": _DEEPSEEK_V3,
    # The first release; the one of September 2025 has factor 64.
    "kimi-k2": _layer(
        *(7168, 64, 1536, 512, 128, 64, 128),
        rope=_yarn(32.0, 4096, 1.0, theta=50000.0, beta_fast=1.0),
    ),
    "mistral-small-4": _layer(
        *(4096, 32, 1024, 256, 64, 64, 128), rope=_yarn(128.0, 8192, 1.0, query_scale_beta=0.1)
    ),
    "minicpm3-4b": _layer(
        *(2560, 40, 768, 256, 64, 32, 64),
        rope={
            "pairing": "half",
            "scaling": "longrope",
            "original_max_position_embeddings": 32768,
            "short_factor": _MINICPM3_FACTORS,
            "long_factor": _MINICPM3_FACTORS,
        },
    ),
    "youtu-2b": _layer(2048, 16, 1536, 512, 128, 64, 128, rope={"theta": 1600000.0}),
    "glm-4.7-flash": _layer(2048, 20, 768, 512, 192, 64, 256, rope={"theta": 1000000.0}),
    # Without its indexer: the dense attention that the sparse one approximates.
    "glm-5": _layer(6144, 64, 2048, 512, 192, 64, 256, rope={"theta": 1000000.0}),
    "kimi-linear": _layer(2304, 32, None, 512, 128, 64, 128, rope={"pairing": "none"}),
    "longcat-flash": _layer(
        *(6144, 64, 1536, 512, 128, 64, 128),
        rope={"theta": 10000000.0},
        query_scale=(6144 / 1536) ** 0.5,
        latent_scale=(6144 / 512) ** 0.5,
    ),
}

# Classes that MLAConfig describes; None: the config's ``rope_interleave`` names the pairing.
_PAIRING: dict[str, str | None] = {
    "axk1": None,
    "deepseek_v2": "interleaved",
    "deepseek_v3": None,
    "glm4_moe_lite": None,
    "kimi_k2": None,  # the name under which Kimi K2 ships a DeepSeek-V3
    "kimi_linear": "none",
    "longcat_flash": "interleaved",
    "minicpm3": "half",
    "mistral4": None,
    "youtu": None,
}

# Classes that compute something else besides: the field that says so, and what it is.
_BEYOND: dict[str, tuple[str, str]] = {
    "axk2": ("index_topk", "sparse attention by an indexer"),
    "bailing_hybrid": ("model_type", "a gate on the output of each head (g_proj)"),
    "deepseek_v32": ("index_topk", "sparse attention by an indexer"),
    "dots3_note": ("model_type", "a norm on the shared key and a gate on each head (g_proj)"),
    "glm5_next": ("index_topk", "sparse attention by an indexer"),
    "glm_moe_dsa": ("index_topk", "sparse attention by an indexer"),
    "hy_v4": ("learnable_sink_init", "attention sinks and sparse attention by an indexer"),
    "mistral_large4": ("index_topk", "sparse attention by an indexer"),
}

_SCALING_FIELDS: dict[str, tuple[str, ...]] = {
    "linear": ("mscale_all_dim",),
    "llama3": ("mscale_all_dim", "low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"),
    "longrope": ("mscale_all_dim", "attention_factor", "short_factor", "long_factor"),
}


def fields_from_hf(config: Any, layer_idx: int) -> dict[str, Any]:
    """Fields of `MLAConfig` for one layer of a transformers config, see `MLAConfig.from_hf`."""
    get = _getter(config)
    if get("text_config") is not None:  # a model of text and images
        return fields_from_hf(get("text_config"), layer_idx)
    model_type = str(get("model_type")).removesuffix("_text")
    if model_type in _BEYOND:
        name, what = _BEYOND[model_type]
        raise _refuse(name, get(name), f"a model without {what}; this is not implemented")
    if get("kv_lora_rank") is None:
        facts = f"of {type(config).__name__}, model_type {model_type!r}"
        raise _refuse("kv_lora_rank", None, f"the width of a latent; {facts}, has none")
    if model_type not in _PAIRING:
        raise _refuse("model_type", get("model_type"), f"one of {sorted(_PAIRING)}")
    _check_layer(get, layer_idx)
    return _layer_fields(get, model_type)


def _layer_fields(get: _Get, model_type: str) -> dict[str, Any]:
    D, H, Q, C = (
        get(name) for name in ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank")
    )
    N, R, V = (get(name) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    if model_type == "minicpm3" and V is None:
        V = D // H
    num_kv_heads, qk_head_dim = get("num_key_value_heads"), get("qk_head_dim")
    if num_kv_heads not in (None, H):
        raise _refuse("num_key_value_heads", num_kv_heads, f"num_attention_heads = {H}")
    if qk_head_dim not in (None, N + R):
        expected = f"qk_nope_head_dim + qk_rope_head_dim = {N + R}"
        raise _refuse("qk_head_dim", qk_head_dim, expected)
    scales: dict[str, Any] = {}
    if model_type == "longcat_flash":
        scales = {"query_scale": (D / Q) ** 0.5, "latent_scale": (D / C) ** 0.5}
    # All these classes build both norms with their default eps of 1e-6, not with rms_norm_eps.
    return _layer(
        *(D, H, Q, C, N, R, V),
        rope=_rope_fields(get, model_type, N, R),
        attention_bias=bool(get("attention_bias")),
        attention_dropout=float(get("attention_dropout") or 0.0),
        **scales,
    )


def _getter(config: Any) -> _Get:
    if isinstance(config, Mapping):
        return config.get
    return lambda name: getattr(config, name, None)


def _refuse(name: str, value: object, expected: str) -> UnsupportedError:
    return UnsupportedError(
        f"MLAConfig.from_hf: config.{name} has value {value!r}, expected {expected}"
    )


def _check_layer(get: _Get, layer_idx: int) -> None:
    count = get("num_hidden_layers")
    if layer_idx < 0 or (count is not None and layer_idx >= count):
        limit = "" if count is None else f" and below num_hidden_layers = {count}"
        raise ValueError(
            f"MLAConfig.from_hf: layer_idx has value {layer_idx}, expected at least 0{limit}"
        )
    kinds = get("layer_types")
    full = (get("linear_attn_config") or {}).get("full_attn_layers")
    if kinds is None and full is not None:  # a Kimi-Linear config.json; counts layers from 1
        kinds = ["full_attention" if i + 1 in full else "linear_attention" for i in range(count)]
    if kinds is not None and kinds[layer_idx] != "full_attention":
        latent = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
        raise _refuse(
            f"layer_types[{layer_idx}]",
            kinds[layer_idx],
            f"'full_attention'; the layers with latent attention are {latent}",
        )


def _rope_fields(get: _Get, model_type: str, N: int, R: int) -> dict[str, Any]:
    pairing = _PAIRING[model_type]
    if pairing is None:
        pairing = "half" if get("rope_interleave") is False else "interleaved"
    if pairing == "none":
        return {"pairing": "none"}
    given: dict[str, Any] = dict(get("rope_parameters") or get("rope_scaling") or {})
    for name, value in given.items():
        if isinstance(value, Mapping) or name == "mrope_section":
            raise _refuse(f"rope_parameters[{name!r}]", value, "one rotation for all positions")
    kind = given.get("rope_type") or given.get("type") or "default"
    _check_rotated_width(get, given, kind, model_type, N, R)
    default_theta = 10000000.0 if model_type == "longcat_flash" else 10000.0
    rope: dict[str, Any] = {
        "pairing": pairing,
        "theta": given.get("rope_theta") or get("rope_theta") or default_theta,
    }
    if kind != "default":
        rope |= _scaling_fields(get, given, kind)
    beta = given.get("llama_4_scaling_beta")
    if model_type == "mistral4" and beta:
        rope["query_scale_beta"] = beta
        rope.setdefault(
            "original_max_position_embeddings", given.get("original_max_position_embeddings")
        )
    return rope


def _check_rotated_width(
    get: _Get, given: Mapping[str, Any], kind: str, model_type: str, N: int, R: int
) -> None:
    """transformers turns ``int(head_dim * partial_rotary_factor)`` numbers: these must be all R."""
    head_dim = {"mistral4": N + R, "longcat_flash": get("head_dim") or 64}.get(model_type, R)
    share = given.get("partial_rotary_factor")
    if share is None:
        share = R / head_dim if model_type == "mistral4" else get("partial_rotary_factor") or 1.0
    if kind == "default" and model_type != "glm4_moe_lite":
        share = 1.0  # only this class reads it there
    if int(head_dim * share) != R:
        expected = f"{R / head_dim}, that is qk_rope_head_dim {R} of head_dim {head_dim}"
        raise _refuse("rope_parameters['partial_rotary_factor']", share, expected)


def _scaling_fields(get: _Get, given: Mapping[str, Any], kind: str) -> dict[str, Any]:
    if kind not in _SCALING_FIELDS:
        expected = f"one of {['default', *_SCALING_FIELDS]}"
        raise _refuse("rope_parameters['rope_type']", kind, expected)
    rope: dict[str, Any] = {"scaling": kind, "factor": given.get("factor")}
    rope |= {name: given[name] for name in _SCALING_FIELDS[kind] if given.get(name) is not None}
    for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        if rope.get(name) == 0:  # 0 means not given, as in transformers
            del rope[name]
    if kind == "linear":
        return rope
    trained = get("original_max_position_embeddings")
    if trained is None:
        trained = given.get("original_max_position_embeddings", get("max_position_embeddings"))
    rope["original_max_position_embeddings"] = trained
    if rope["factor"] is None and trained:
        rope["factor"] = get("max_position_embeddings") / trained
    return rope
