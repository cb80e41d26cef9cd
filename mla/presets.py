"""Layers of published models: by name, and from a transformers config.

Everything here is plain data and functions from dict to dict; `mla.config` turns them into objects.
Source: the ``config.json`` of each model, and the attention classes of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mla.checks import UnsupportedError


def _layer(D: int, H: int, Q: int | None, C: int, N: int, R: int, V: int, **other: Any) -> dict[str, Any]:
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

PRESETS: dict[str, dict[str, Any]] = {
    "deepseek-v2-lite": _layer(2048, 16, None, 512, 128, 64, 128, rope=_yarn(40.0, 4096, 0.707)),
    "deepseek-v2": _layer(5120, 128, 1536, 512, 128, 64, 128, rope=_yarn(40.0, 4096, 1.0)),
    "deepseek-v3": _DEEPSEEK_V3,
    "deepseek-r1": _DEEPSEEK_V3,
    "kimi-k2": _layer(
        7168,
        64,
        1536,
        512,
        128,
        64,
        128,
        rope=_yarn(32.0, 4096, 1.0, theta=50000.0, beta_fast=1.0),
    ),
    "mistral-small-4": _layer(
        4096, 32, 1024, 256, 64, 64, 128, rope=_yarn(128.0, 8192, 1.0, query_scale_beta=0.1)
    ),
    "minicpm3-4b": _layer(2560, 40, 768, 256, 64, 32, 64, rope={"pairing": "half"}),
    "youtu-2b": _layer(2048, 16, 1536, 512, 128, 64, 128),
    "glm-4.7-flash": _layer(2048, 20, 768, 512, 192, 64, 256, rope={"theta": 1000000.0}),
    "glm-5": _layer(6144, 64, 2048, 512, 192, 64, 256, rope={"theta": 1000000.0}),
    "kimi-linear": _layer(2304, 32, None, 512, 128, 64, 128, rope={"pairing": "none"}),
    "longcat-flash": _layer(
        6144,
        64,
        1536,
        512,
        128,
        64,
        128,
        rope={"theta": 10000000.0},
        query_scale=(6144 / 1536) ** 0.5,
        latent_scale=(6144 / 512) ** 0.5,
    ),
}

# pairing of the class; None: the config's ``rope_interleave`` decides
_PAIRING: dict[str, str | None] = {
    "deepseek_v2": "interleaved",
    "deepseek_v3": None,
    "kimi_k2": None,
    "youtu": None,
    "glm4_moe_lite": None,
    "mistral4": None,
    "axk1": None,
    "longcat_flash": "interleaved",
    "minicpm3": "half",
    "kimi_linear": "none",
}

# classes whose attention computes something that MLAConfig cannot say: the field and what it does
_BEYOND: dict[str, tuple[str, str]] = {
    "deepseek_v32": ("index_topk", "sparse attention by an indexer"),
    "glm_moe_dsa": ("index_topk", "sparse attention by an indexer"),
    "glm5_next": ("index_topk", "sparse attention by an indexer"),
    "axk2": ("index_topk", "sparse attention by an indexer"),
    "mistral_large4": ("index_topk", "sparse attention by an indexer"),
    "hy_v4": ("learnable_sink_init", "an attention sink for each head"),
    "bailing_hybrid": ("layer_group_size", "a gate on the output of each head (g_proj)"),
    "dots3_note": ("layer_types", "a gate on the output of each head (g_proj)"),
}


def fields_from_hf(config: Any, layer_idx: int) -> dict[str, Any]:
    """Fields of `MLAConfig` for one layer of a transformers config, see `MLAConfig.from_hf`."""
    get = _getter(config)
    if get("kv_lora_rank") is None and get("text_config") is not None:
        return fields_from_hf(get("text_config"), layer_idx)
    model_type = _check_kind(config, get)
    _check_layer(get, layer_idx)
    D, H, Q, C = (
        get(name)
        for name in ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank")
    )
    N, R, V = (get(name) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    other: dict[str, Any] = {}
    if model_type == "longcat_flash":
        other = {"query_scale": (D / Q) ** 0.5, "latent_scale": (D / C) ** 0.5}
    return _layer(
        D,
        H,
        Q,
        C,
        N,
        R,
        V if V is not None else D // H,  # MiniCPM3 may leave it out
        rope=_rope_fields(get, model_type, N, R),
        attention_bias=bool(get("attention_bias", False)),
        attention_dropout=float(get("attention_dropout") or 0.0),
        **other,
    )


def _getter(config: Any) -> Any:
    if isinstance(config, Mapping):
        return lambda name, default=None: config.get(name, default)
    return lambda name, default=None: getattr(config, name, default)


def _refuse(field: str, value: object, expected: str) -> UnsupportedError:
    return UnsupportedError(
        f"MLAConfig.from_hf: config.{field} has value {value!r}, expected {expected}"
    )


def _check_kind(config: Any, get: Any) -> str:
    model_type = get("model_type")
    if get("kv_lora_rank") is None:
        raise _refuse(
            "kv_lora_rank",
            None,
            f"a latent width; {type(config).__name__} of model_type {model_type!r} has no multi-head "
            "latent attention",
        )
    base_type = str(model_type).removesuffix("_text")
    if base_type in _BEYOND:
        field, what = _BEYOND[base_type]
        raise _refuse(field, get(field), f"a model without {what}, which is not implemented")
    if base_type not in _PAIRING:
        raise _refuse("model_type", model_type, f"one of {sorted(_PAIRING)}")
    H, heads = get("num_attention_heads"), get("num_key_value_heads")
    if heads is not None and heads != H:
        raise _refuse("num_key_value_heads", heads, f"num_attention_heads {H}")
    return base_type


def _check_layer(get: Any, layer_idx: int) -> None:
    count = get("num_hidden_layers")
    if not 0 <= layer_idx < (count or layer_idx + 1):
        raise ValueError(
            f"MLAConfig.from_hf: layer_idx has value {layer_idx}, expected 0 to {count - 1}"
        )
    kinds = get("layer_types")
    if kinds is not None and kinds[layer_idx] != "full_attention":
        raise _refuse(f"layer_types[{layer_idx}]", kinds[layer_idx], "'full_attention'")


def _rope_fields(get: Any, model_type: str, N: int, R: int) -> dict[str, Any]:
    pairing = _PAIRING[model_type]
    if pairing is None:
        pairing = "interleaved" if get("rope_interleave", True) else "half"
    if pairing == "none":
        return {"pairing": "none"}
    given: dict[str, Any] = dict(get("rope_parameters") or get("rope_scaling") or {})
    kind = given.get("rope_type", given.get("type", "default"))
    _check_rotated_width(get, given, kind, model_type, N, R)
    rope: dict[str, Any] = {
        "pairing": pairing,
        "theta": float(given.get("rope_theta") or get("rope_theta") or _default_theta(get, model_type)),
    }
    if given.get("llama_4_scaling_beta") is not None:
        rope["query_scale_beta"] = given["llama_4_scaling_beta"]
        rope["original_max_position_embeddings"] = given.get("original_max_position_embeddings")
    if kind != "default":
        rope |= _scaling_fields(get, given, kind)
    return rope


def _default_theta(get: Any, model_type: str) -> float:
    return get("default_theta") or (10000000.0 if model_type == "longcat_flash" else 10000.0)


def _check_rotated_width(
    get: Any, given: Mapping[str, Any], kind: str, model_type: str, N: int, R: int
) -> None:
    """transformers turns int(head_dim * partial_rotary_factor) numbers; the layer needs R of them."""
    share = given.get("partial_rotary_factor", 1.0)
    head_dim = {"mistral4": N + R, "longcat_flash": get("head_dim", 64)}.get(model_type, R)
    if kind == "default" and model_type != "glm4_moe_lite":
        share = 1.0  # the default type of these classes does not read it
    if int(head_dim * share) != R:
        raise _refuse("rope_parameters['partial_rotary_factor']", share, f"{R} / {head_dim}")


def _scaling_fields(get: Any, given: Mapping[str, Any], kind: str) -> dict[str, Any]:
    names = {
        "linear": ("mscale_all_dim",),
        "llama3": ("mscale_all_dim", "low_freq_factor", "high_freq_factor"),
        "yarn": (
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "attention_factor",
            "truncate",
        ),
        "longrope": ("mscale_all_dim", "attention_factor", "short_factor", "long_factor"),
    }
    if kind not in names:
        raise _refuse("rope_parameters['rope_type']", kind, f"one of {['default', *names]}")
    rope: dict[str, Any] = {"scaling": kind}
    rope |= {name: given[name] for name in names[kind] if given.get(name) is not None}
    if kind != "linear":
        trained = get("original_max_position_embeddings") or given.get(
            "original_max_position_embeddings", get("max_position_embeddings")
        )
        rope["original_max_position_embeddings"] = trained
    factor = given.get("factor")
    if factor is None and kind != "linear":
        factor = get("max_position_embeddings") / rope["original_max_position_embeddings"]
    rope["factor"] = factor
    for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        if not rope.get(name, 1):  # 0 means not given, as in transformers
            del rope[name]
    return rope
