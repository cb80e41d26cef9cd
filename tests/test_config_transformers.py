"""Layers of transformers as configs: every class we describe, and every one we refuse."""

import dataclasses
import importlib
from typing import Any

import pytest
import torch
from hf_models import SIZES, YARN, tiny_config
from hypothesis import given
from hypothesis import strategies as st

from mla.checks import UnsupportedError
from mla.config import MLAConfig

transformers = pytest.importorskip("transformers")


# Where the defaults of a transformers class are its published model, the preset is those defaults,
# up to the rotary embedding, which the classes of transformers leave out.
@pytest.mark.parametrize(
    ("name", "model_type", "layer_idx"),
    [
        ("deepseek-v3", "deepseek_v3", 0),
        ("mistral-small-4", "mistral4", 0),
        ("minicpm3-4b", "minicpm3", 0),
        ("youtu-2b", "youtu", 0),
        ("glm-4.7-flash", "glm4_moe_lite", 0),
        ("kimi-linear", "kimi_linear", 4),
        ("longcat-flash", "longcat_flash", 0),
    ],
)
def test_preset_is_the_default_of_its_transformers_class(name, model_type, layer_idx):
    mapping = transformers.CONFIG_MAPPING
    if model_type not in mapping:
        pytest.skip(f"this transformers has no {model_type}")
    preset, config = MLAConfig.preset(name), MLAConfig.from_hf(mapping[model_type](), layer_idx)
    if name in ("mistral-small-4", "longcat-flash", "kimi-linear"):
        assert preset == config
    assert dataclasses.replace(preset, rope=config.rope) == config
    assert preset.rope.pairing == config.rope.pairing


ATTENTION_CLASS = {
    "axk1": "AXK1Attention",
    "deepseek_v2": "DeepseekV2Attention",
    "deepseek_v3": "DeepseekV3Attention",
    "glm4_moe_lite": "Glm4MoeLiteAttention",
    "kimi_linear": "KimiLinearAttention",
    "longcat_flash": "LongcatFlashMLA",
    "minicpm3": "MiniCPM3Attention",
    "mistral4": "Mistral4Attention",
    "youtu": "YoutuAttention",
}


def host_attention(model_type: str, config: Any, layer_idx: int) -> torch.nn.Module:
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    with torch.device("meta"):
        return getattr(module, ATTENTION_CLASS[model_type])(config, layer_idx)


@pytest.mark.parametrize("model_type", sorted(ATTENTION_CLASS))
@given(bias=st.booleans(), m=st.sampled_from([0.0, 0.4, 1.0]), rank=st.sampled_from([None, 20]))
def test_from_hf_describes_what_transformers_builds(model_type, bias, m, rank):
    if model_type in ("axk1", "longcat_flash"):
        rank = rank or 12  # these classes have no full-rank queries
    rope = YARN | {"mscale_all_dim": m}
    if model_type == "mistral4":
        rope |= {"llama_4_scaling_beta": 0.3, "partial_rotary_factor": 0.4}
    host_config = tiny_config(
        model_type, attention_bias=bias, q_lora_rank=rank, rope_parameters=rope
    )
    host_config.q_lora_rank = rank  # tiny_config drops None
    layer_idx = 1 if model_type == "kimi_linear" else 0
    host = host_attention(model_type, host_config, layer_idx)
    config = MLAConfig.from_hf(host_config, layer_idx)

    H, N, V = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    assert config.scale == host.scaling
    assert config.query_scale == getattr(host, "mla_scale_q_lora", 1.0)
    assert config.latent_scale == getattr(host, "mla_scale_kv_lora", 1.0)
    assert config.latent_norm_eps == host.kv_a_layernorm.variance_epsilon
    assert host.kv_a_proj_with_mqa.weight.shape == (config.cache_width, config.hidden_size)
    assert host.kv_b_proj.weight.shape == (H * (N + V), config.kv_lora_rank)
    assert host.o_proj.weight.shape == (config.hidden_size, H * V)
    assert config.attention_bias == bias == (host.kv_a_proj_with_mqa.bias is not None)
    assert (host.o_proj.bias is not None) == bias
    if config.q_lora_rank is None:
        assert host.q_proj.weight.shape == (H * config.qk_head_dim, config.hidden_size)
    else:
        assert host.q_b_proj.weight.shape == (H * config.qk_head_dim, config.q_lora_rank)
        assert config.query_norm_eps == host.q_a_layernorm.variance_epsilon
        assert (host.q_a_proj.bias is not None) == bias
    assert MLAConfig.from_hf(host_config.to_dict(), layer_idx) == config


@pytest.mark.parametrize("model_type", ["deepseek_v3", "youtu", "glm4_moe_lite", "mistral4"])
def test_rope_interleave_names_the_pairing(model_type):
    for is_interleaved in (True, False):
        config = MLAConfig.from_hf(tiny_config(model_type, rope_interleave=is_interleaved))
        assert config.rope.pairing == ("interleaved" if is_interleaved else "half")


def test_position_scale_of_queries_is_taken_from_mistral4_alone():
    rope = YARN | {"llama_4_scaling_beta": 0.3}
    mistral = tiny_config("mistral4", rope_parameters=rope | {"partial_rotary_factor": 0.4})
    assert MLAConfig.from_hf(mistral).rope.query_scale_beta == 0.3
    deepseek = {**tiny_config("deepseek_v3").to_dict(), "rope_parameters": rope}
    assert MLAConfig.from_hf(deepseek).rope.query_scale_beta is None


RAW = {**SIZES, "model_type": "deepseek_v3", "qk_rope_head_dim": 8}


def test_old_and_new_spelling_of_rope_give_the_same_layer():
    old = {
        "type": "yarn",
        **{k: v for k, v in YARN.items() if k not in ("rope_type", "rope_theta")},
    }
    new = MLAConfig.from_hf(RAW | {"rope_parameters": YARN})
    assert MLAConfig.from_hf(RAW | {"rope_scaling": old, "rope_theta": 10000.0}) == new
    assert new.rope.scaling == "yarn"


def test_missing_factor_is_the_ratio_of_contexts():
    rope = {"rope_type": "yarn", "original_max_position_embeddings": 32}
    config = MLAConfig.from_hf(RAW | {"max_position_embeddings": 128, "rope_scaling": rope})
    assert config.rope.factor == 4.0


def test_zero_means_not_given_where_transformers_reads_it_so():
    rope = {"rope_type": "yarn", "factor": 2.0, "beta_fast": 0, "mscale": 0}
    config = MLAConfig.from_hf(RAW | {"rope_scaling": rope})
    assert (config.rope.beta_fast, config.rope.mscale) == (32.0, None)


BEYOND = {
    "axk2": "index_topk",
    "bailing_hybrid": "g_proj",
    "deepseek_v32": "index_topk",
    "dots3_note": "g_proj",
    "glm5_next": "index_topk",
    "glm_moe_dsa": "index_topk",
    "hy_v4": "learnable_sink_init",
    "llama": "kv_lora_rank has value None.*LlamaConfig",
    "mistral_large4": "index_topk",
    "qwen3": "kv_lora_rank",
}


@pytest.mark.parametrize("model_type", sorted(BEYOND))
def test_layers_we_cannot_describe_are_refused_by_field(model_type):
    mapping = transformers.CONFIG_MAPPING
    if model_type not in mapping:
        pytest.skip(f"this transformers has no {model_type}")
    with pytest.raises(UnsupportedError, match=BEYOND[model_type]):
        MLAConfig.from_hf(mapping[model_type]())


REFUSED = [
    ({}, "kv_lora_rank has value None"),
    ({**RAW, "model_type": "mystery"}, r"model_type has value 'mystery', expected one of \['axk1'"),
    ({**RAW, "model_type": None}, "model_type has value None"),
    ({**RAW, "num_key_value_heads": 2}, "num_key_value_heads has value 2, expected .* = 4"),
    ({**RAW, "qk_head_dim": 16}, "qk_head_dim has value 16, expected .* = 20"),
    ({**RAW, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'rope_type'.* 'dynamic'"),
    ({**RAW, "rope_parameters": {"mrope_section": [1, 2, 1]}}, "mrope_section"),
    ({**RAW, "rope_parameters": {"full_attention": {}}}, r"rope_parameters\['full_attention'\]"),
    (
        {**RAW, "rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
        r"partial_rotary_factor'\] has value 0.5, expected 1.0",
    ),
    (
        {**RAW, "model_type": "longcat_flash", "head_dim": 64},
        "qk_rope_head_dim 8 of head_dim 64",
    ),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_config_with_other_mathematics_is_refused(config, message):
    with pytest.raises(UnsupportedError, match=message):
        MLAConfig.from_hf(config)


def test_layer_with_linear_attention_is_refused_and_the_others_are_named():
    config = tiny_config("kimi_linear")
    with pytest.raises(UnsupportedError, match=r"layer_types\[0\].*latent attention are \[1\]"):
        MLAConfig.from_hf(config)
    raw = {**RAW, "model_type": "kimi_linear", "linear_attn_config": {"full_attn_layers": [2]}}
    assert MLAConfig.from_hf(raw, 1).rope.pairing == "none"
    with pytest.raises(UnsupportedError, match=r"latent attention are \[1\]"):
        MLAConfig.from_hf(raw, 0)


@pytest.mark.parametrize("layer_idx", [-1, 2])
def test_layer_beyond_the_model_is_refused(layer_idx):
    with pytest.raises(ValueError, match=f"layer_idx has value {layer_idx}, expected .*below .* 2"):
        MLAConfig.from_hf(RAW, layer_idx)


def test_text_part_of_a_mixed_model_is_read():
    assert MLAConfig.from_hf({"model_type": "kimi_vl", "text_config": RAW}) == MLAConfig.from_hf(
        RAW
    )
