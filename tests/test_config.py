"""Configs: validation, presets, round trips, and agreement with the classes of transformers."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla.checks import ShapeError, UnsupportedError
from mla.config import MLAConfig, RopeConfig
from mla.presets import PRESETS

LAYER = {
    "hidden_size": 48,
    "num_attention_heads": 3,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 9,
}

POSITIVE = st.floats(1e-3, 1e3)
ROPES = st.fixed_dictionaries(
    {
        "pairing": st.sampled_from(["interleaved", "half", "none"]),
        "theta": st.floats(2.0, 1e7),
        "scaling": st.sampled_from(["none", "linear", "llama3", "yarn", "longrope"]),
        "factor": st.floats(1.0, 128.0),
        "original_max_position_embeddings": st.integers(2, 10**6),
        "beta_fast": st.floats(2.0, 64.0),
        "beta_slow": st.floats(0.5, 1.5),
        "truncate": st.booleans(),
        "mscale": st.none() | st.floats(0, 2),
        "mscale_all_dim": st.none() | st.floats(0, 2),
        "attention_factor": st.none() | POSITIVE,
        "low_freq_factor": st.floats(0.5, 1.0),
        "high_freq_factor": st.floats(2.0, 8.0),
        "short_factor": st.tuples(POSITIVE, POSITIVE, POSITIVE),
        "long_factor": st.tuples(POSITIVE, POSITIVE, POSITIVE),
        "query_scale_beta": st.none() | st.floats(0, 1),
    }
).map(lambda values: RopeConfig(**values))
CONFIGS = st.builds(
    MLAConfig,
    hidden_size=st.integers(1, 10**5),
    num_attention_heads=st.integers(1, 256),
    kv_lora_rank=st.integers(1, 2048),
    qk_nope_head_dim=st.integers(0, 512),
    qk_rope_head_dim=st.just(6),
    v_head_dim=st.integers(1, 512),
    q_lora_rank=st.none() | st.integers(1, 4096),
    rope=ROPES | st.tuples(POSITIVE, POSITIVE, POSITIVE).map(lambda f: RopeConfig(inv_freq=f)),
    latent_norm=st.sampled_from(["rms", "none"]),
    latent_norm_eps=st.floats(0, 1e-3),
    query_norm_eps=st.floats(0, 1e-3),
    query_scale=POSITIVE,
    latent_scale=POSITIVE,
    attention_bias=st.booleans(),
    query_bias=st.booleans(),
    softmax_scale=st.none() | POSITIVE,
    attention_dropout=st.floats(0, 0.99),
)


@given(config=CONFIGS)
def test_dict_survives_json(config):
    assert MLAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(MLAConfig.from_dict(config.to_dict())) == hash(config)


@given(config=CONFIGS)
def test_scale_is_the_override_or_the_formula(config):
    if config.softmax_scale is not None:
        assert config.scale == config.softmax_scale
        return
    rope, m = config.rope, 1.0
    if rope.scaling != "none" and rope.mscale_all_dim:
        m = 1 + 0.1 * rope.mscale_all_dim * math.log(rope.factor)
    N, R = config.qk_nope_head_dim, config.qk_rope_head_dim
    assert config.scale == pytest.approx(m**2 / math.sqrt(N + R), rel=1e-14)
    assert (config.qk_head_dim, config.cache_width) == (N + R, config.kv_lora_rank + R)


@pytest.mark.parametrize(
    ("name", "scale"),
    [("deepseek-v3", 0.13523), ("deepseek-r1", 0.13523), ("deepseek-v2-lite", 0.11472)],
)
def test_scale_of_published_models(name, scale):
    config = MLAConfig.preset(name)
    assert config.scale == pytest.approx(scale, abs=5e-6)
    assert config.rope.amplitude == 1.0  # mscale equals mscale_all_dim


def test_mscale_without_scaling_leaves_the_scale_alone():
    rope = RopeConfig(factor=40.0, mscale=1.0, mscale_all_dim=1.0)
    assert (rope.score_mscale, rope.amplitude) == (1.0, 1.0)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_preset_is_complete_and_survives_json(name):
    config = MLAConfig.preset(name)
    assert MLAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.rope.pairing == {"minicpm3-4b": "half", "kimi-linear": "none"}.get(
        name, "interleaved"
    )


def test_preset_of_unknown_name_lists_the_known():
    with pytest.raises(UnsupportedError, match=r"name has value 'gpt-2', expected one of \['deep"):
        MLAConfig.preset("gpt-2")


BAD_LAYERS = [
    ({"hidden_size": 0}, "hidden_size has value 0, expected an integer of at least 1"),
    ({"hidden_size": 4.0}, "hidden_size has value 4.0, expected an integer"),
    ({"num_attention_heads": True}, "num_attention_heads has value True, expected an integer"),
    ({"kv_lora_rank": -1}, "kv_lora_rank has value -1"),
    ({"v_head_dim": None}, "v_head_dim has value None"),
    ({"qk_nope_head_dim": -1}, "qk_nope_head_dim has value -1, expected an integer of at least 0"),
    ({"qk_rope_head_dim": 7}, "qk_rope_head_dim has value 7, expected an even number"),
    ({"qk_nope_head_dim": 0, "qk_rope_head_dim": 0}, "qk_nope_head_dim has value 0, expected at"),
    ({"q_lora_rank": 0}, "q_lora_rank has value 0, expected an integer of at least 1 or None"),
    ({"latent_norm": "layer"}, r"latent_norm has value 'layer', expected one of \['rms', 'none'\]"),
    ({"latent_norm_eps": -1e-6}, "latent_norm_eps has value -1e-06, expected a finite number"),
    ({"query_norm_eps": "1e-6"}, "query_norm_eps has value '1e-6'"),
    ({"query_scale": 0.0}, "query_scale has value 0.0, expected a finite number above 0"),
    ({"latent_scale": math.inf}, "latent_scale has value inf"),
    ({"attention_bias": 1}, "attention_bias has value 1, expected True or False"),
    ({"query_bias": None}, "query_bias has value None"),
    ({"softmax_scale": math.nan}, "softmax_scale has value nan"),
    ({"attention_dropout": 1.0}, "attention_dropout has value 1.0, expected .* and below 1.0"),
    ({"rope": {"theta": 1e4}}, "rope has value .* expected a RopeConfig; from_dict"),
]


@pytest.mark.parametrize(("change", "message"), BAD_LAYERS)
def test_impossible_layer_is_refused(change, message):
    with pytest.raises(ValueError, match=f"MLAConfig: {message}"):
        MLAConfig(**LAYER | change)


BAD_ROPES = [
    ({"pairing": "pairs"}, "pairing has value 'pairs', expected one of"),
    ({"scaling": "dynamic"}, "scaling has value 'dynamic', expected one of"),
    ({"theta": 0}, "theta has value 0, expected a finite number above 0"),
    ({"factor": -1.0}, "factor has value -1.0"),
    ({"truncate": 1}, "truncate has value 1"),
    ({"mscale": -1.0}, "mscale has value -1.0"),
    ({"attention_factor": 0.0}, "attention_factor has value 0.0, expected .* or None"),
    ({"inv_freq": [1.0]}, r"inv_freq has value \[1.0\], expected a tuple of numbers or None"),
    ({"inv_freq": (1.0, -1.0)}, "inv_freq has value .* not -1.0"),
    ({"scaling": "yarn"}, "original_max_position_embeddings has value None, expected a value, bec"),
    ({"query_scale_beta": 0.1}, "original_max_position_embeddings has value None"),
    (
        {"scaling": "longrope", "original_max_position_embeddings": 8, "short_factor": (1.0,)},
        "long_factor has value None",
    ),
    (
        {"scaling": "llama3", "original_max_position_embeddings": 8, "low_freq_factor": 1.0},
        "high_freq_factor has value None",
    ),
    (
        {
            "scaling": "llama3",
            "original_max_position_embeddings": 8,
            "low_freq_factor": 4.0,
            "high_freq_factor": 1.0,
        },
        "low_freq_factor has value 4.0, expected less than high_freq_factor 1.0",
    ),
    (
        {"scaling": "yarn", "original_max_position_embeddings": 8, "beta_fast": 0.5},
        "beta_fast has value 0.5, expected at least beta_slow 1.0",
    ),
    (
        {"scaling": "yarn", "original_max_position_embeddings": 8, "theta": 1.0},
        "theta has value 1.0, expected other than 1",
    ),
    ({"scaling": "linear", "inv_freq": (1.0,)}, "scaling has value 'linear', expected 'none', be"),
]


@pytest.mark.parametrize(("values", "message"), BAD_ROPES)
def test_impossible_rope_is_refused(values, message):
    with pytest.raises(ValueError, match=f"RopeConfig: {message}"):
        RopeConfig(**values)


@pytest.mark.parametrize("name", ["inv_freq", "short_factor", "long_factor"])
def test_frequencies_must_be_half_as_many_as_rotated_numbers(name):
    rope = RopeConfig(**{name: (1.0, 1.0)})
    with pytest.raises(ShapeError, match=rf"rope.{name} has 2 values, expected .* = 3"):
        MLAConfig(**LAYER, rope=rope)


def test_dict_with_unknown_or_missing_fields_is_refused():
    with pytest.raises(ValueError, match=r"unknown fields \['num_heads'\]"):
        MLAConfig.from_dict(LAYER | {"num_heads": 3})
    with pytest.raises(ValueError, match=r"RopeConfig.from_dict: .* unknown fields \['base'\]"):
        MLAConfig.from_dict(LAYER | {"rope": {"base": 1e4}})
    with pytest.raises(ValueError, match=r"has no \['v_head_dim'\]"):
        MLAConfig.from_dict({k: v for k, v in LAYER.items() if k != "v_head_dim"})


@pytest.mark.parametrize("change", [{"qk_nope_head_dim": 0}, {"qk_rope_head_dim": 0}])
def test_one_of_the_two_key_parts_may_be_missing(change):
    assert MLAConfig(**LAYER | change).qk_head_dim > 0
