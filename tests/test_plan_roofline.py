"""Predicted steps: DeepSeek-V3 on one H100 by hand, and what must hold for any sizes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mla.checks import ShapeError, UnsupportedError
from mla.codec import Fp8Codec, Int4Codec, PlainCodec
from mla.config import MLAConfig, RopeConfig
from mla.plan import context_parallel_decode_bytes, sequences_that_fit, tensor_parallel_bytes
from mla.plan.devices import DEVICES, LINKS, device_of, given_device, link_of
from mla.plan.models import NUM_LAYERS, config_layers, preset_layers
from mla.plan.roofline import (
    ALONE,
    Group,
    Load,
    attention_work,
    cache_bytes_per_token,
    decode_step,
    projection_work,
)
from mla.plan.splits import best_split, splits
from mla.presets import PRESETS

V3 = preset_layers("deepseek-v3")
H100 = DEVICES["h100"]
LONG = 131_072
SMALL = MLAConfig(
    hidden_size=40,
    num_attention_heads=12,
    q_lora_rank=20,
    kv_lora_rank=24,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    rope=RopeConfig(),
)
LOADS = st.builds(
    Load,
    context_length=st.integers(3, 5000),
    batch=st.integers(1, 64),
    new_tokens=st.integers(1, 3),
    codec=st.sampled_from([None, PlainCodec(), Fp8Codec(), Int4Codec()]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    weight_bits=st.sampled_from([8, 16]),
)
GROUPS = st.builds(Group, tensor=st.sampled_from([1, 2, 3, 4]), context=st.integers(1, 6))


def test_deepseek_v3_cache_by_hand():
    """576 numbers in each of 61 layers: 2 bytes each, or rows of 656 and 400 bytes."""
    assert [
        cache_bytes_per_token(V3, Load(LONG, codec=codec))
        for codec in (None, Fp8Codec(), Int4Codec())
    ] == [70_272, 40_016, 24_400]
    step = decode_step(V3, Load(LONG, 2), H100)
    assert step.cache_bytes == 2 * 131_072 * 70_272 == 18_421_383_168
    assert sequences_that_fit(80e9, LONG, 70_272) == 8  # 9,210,691,584 bytes each
    assert sequences_that_fit(80e9, LONG, 40_016) == 15
    assert sequences_that_fit(80e9, 32_768, 24_400) == 100


def test_deepseek_v3_step_by_hand():
    """Weights 11,010,048 + 37,748,736 + 4,128,768 + 16,777,216 + 117,440,512 = 187,105,280."""
    load = Load(LONG, codec=Fp8Codec())
    projections = projection_work(V3[0], load)
    assert projections == (2 * 187_105_280 + 2 * 7168 * 2, 2 * 187_105_280)
    attention = attention_work(V3[0], load)
    assert attention == (656 * 131_072 + 128 * (1088 * 2 + 4), 2 * 128 * 1088 * 131_072)
    step = decode_step(V3, load, H100)
    assert (step.projections.limit, step.attention.limit) == ("memory", "arithmetic")
    assert step.projections.seconds == pytest.approx(61 * 374_239_232 / 3.35e12)
    assert step.attention.seconds == pytest.approx(61 * 36_507_222_016 / 989.4e12)
    assert step.seconds == pytest.approx(9.0653e-3, rel=1e-4)
    assert step.tokens_per_second == pytest.approx(110.3, rel=1e-3)
    assert (step.bytes_sent, step.exchange_seconds, step.num_layers) == (0, 0, 61)


def test_deepseek_v3_groups_by_hand():
    """Eight tensor parallel devices repeat the projections onto latents, 15,138,816 weights."""
    load = Load(LONG, codec=Fp8Codec())
    weights = 15_138_816 + 171_966_464 // 8
    assert projection_work(V3[0], load, Group(tensor=8)).num_flops == 2 * weights
    step = decode_step(V3, load, H100, Group(8, 4))
    assert step.cache_bytes == 32_768 * 40_016
    assert step.all_reduce.sent == 61 * 25_088 and step.all_gather.sent == 61 * 24_768
    # Rings of the tensor parallel eight stay in the node; those of the others leave it.
    assert step.exchange_seconds == pytest.approx(61 * (25_088 / 450e9 + 24_768 / 50e9))
    slower = decode_step(V3, load, H100, Group(8, 4), latency=1e-6)
    assert slower.exchange_seconds - step.exchange_seconds == pytest.approx(61 * 17e-6)
    near = decode_step(V3, load, H100, Group(2, 4))
    assert near.exchange_seconds == pytest.approx(61 * (14_336 + 99_072) / 450e9)
    wide = decode_step(V3, load, H100, Group(16), network="ib-800")
    assert wide.exchange_seconds == pytest.approx(61 * 30 * 896 / 100e9)


@given(load=LOADS, group=GROUPS)
def test_more_context_or_sequences_never_take_less(load, group):
    step = decode_step([SMALL] * 3, load, H100, group)
    for more in (
        load._replace(context_length=load.context_length + 7),
        load._replace(batch=load.batch + 1),
    ):
        other = decode_step([SMALL] * 3, more, H100, group)
        assert other.seconds >= step.seconds and other.cache_bytes >= step.cache_bytes
        assert other.bytes_sent >= step.bytes_sent


@given(load=LOADS, tensor=st.sampled_from([2, 3, 4, 6, 12]), context=st.integers(1, 6))
def test_heads_are_shared_and_the_cache_is_not(load, tensor, context):
    one = decode_step([SMALL], load, H100, Group(1, context))
    many = decode_step([SMALL], load, H100, Group(tensor, context))
    assert many.cache_bytes == one.cache_bytes
    assert many.attention.work.num_flops * tensor == one.attention.work.num_flops
    assert many.projections.work.num_flops < one.projections.work.num_flops


@given(load=LOADS, context=st.integers(1, 6), tensor=st.sampled_from([1, 4]))
def test_cached_tokens_are_shared_and_projections_are_not(load, context, tensor):
    whole = load._replace(context_length=load.context_length * context, new_tokens=1)
    one = decode_step([SMALL], whole, H100, Group(tensor))
    many = decode_step([SMALL], whole, H100, Group(tensor, context))
    assert many.cache_bytes * context == one.cache_bytes
    assert many.attention.work.num_flops * context == one.attention.work.num_flops
    assert many.projections == one.projections


@given(load=LOADS)
def test_one_device_is_the_sum_of_its_layers_and_exchanges_nothing(load):
    other = replace(SMALL, num_attention_heads=8, kv_lora_rank=40)
    step = decode_step([SMALL, other, SMALL], load, H100)
    parts = [decode_step([layer], load, H100) for layer in (SMALL, other, SMALL)]
    assert step.seconds == pytest.approx(sum(part.seconds for part in parts))
    assert step.cache_bytes == sum(part.cache_bytes for part in parts)
    assert step.bytes_sent == step.exchange_seconds == 0


@given(load=LOADS, group=GROUPS)
def test_exchange_of_a_step_is_that_of_its_layers(load, group):
    step = decode_step([SMALL] * 5, load, H100, group)
    sizes = {"batch": load.batch, "new_tokens": load.new_tokens, "tensor": group.tensor}
    one = tensor_parallel_bytes(SMALL, dtype=load.dtype, **sizes)
    other = context_parallel_decode_bytes(SMALL, context=group.context, **sizes)
    assert step.all_reduce == tuple(5 * n for n in one)
    assert step.all_gather == tuple(5 * n for n in other)


def test_pairs_of_several_queries_are_causal():
    work = attention_work(SMALL, Load(10, 1, 3))
    assert work.num_flops == 2 * 12 * (2 * 24 + 8) * (8 + 9 + 10)


def test_fewer_bits_of_weights_and_wider_numbers_count():
    halves, wide = Load(100, weight_bits=8), Load(100, dtype=torch.float32)
    plain = projection_work(SMALL, Load(100))
    hidden = 2 * 40 * 2
    assert projection_work(SMALL, halves).num_bytes - hidden == (plain.num_bytes - hidden) // 2
    assert projection_work(SMALL, wide).num_bytes - plain.num_bytes == hidden
    assert attention_work(SMALL, wide).num_bytes > attention_work(SMALL, Load(100)).num_bytes


def test_a_measured_share_scales_attention_alone():
    load = Load(LONG, codec=Fp8Codec())
    bound = decode_step(V3, load, H100)
    half = decode_step(V3, load, H100, share=lambda *_: 0.5)
    assert half.attention.seconds == pytest.approx(2 * bound.attention.seconds)
    assert half.projections == bound.projections


@pytest.mark.parametrize(
    ("load", "group", "options", "message"),
    [
        (Load(0), ALONE, {}, "context_length has value 0"),
        (Load(8, 0), ALONE, {}, "batch has value 0"),
        (Load(8, 1, 9), ALONE, {}, "new_tokens has value 9, expected at most context_length = 8"),
        (Load(8), Group(5), {}, "a divisor of 12 heads"),
        (Load(8), Group(1, 0), {}, "context has value 0"),
        (Load(8), ALONE, {"latency": -1.0}, "latency has value -1.0"),
        (Load(8), ALONE, {"network": "string"}, "name has value 'string', expected one of"),
    ],
)
def test_bad_loads_are_refused(load, group, options, message):
    with pytest.raises(ValueError, match=message):
        decode_step([SMALL], load, H100, group, **options)


def test_a_model_without_layers_is_refused():
    with pytest.raises(ShapeError, match="layers has length 0"):
        decode_step([], Load(8), H100)


# --- splits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_devices", [1, 6, 8, 64, 512])
def test_every_split_uses_all_devices_and_divides(num_devices):
    load = Load(1000, 16)
    found = list(splits(V3, load, num_devices))
    assert found and len(set(found)) == len(found)
    for data, group in found:
        assert data * group.size == num_devices
        assert load.batch % data == 0 and 128 % group.tensor == 0


@given(load=LOADS, num_devices=st.sampled_from([1, 2, 4, 8, 12]))
def test_the_best_split_is_the_shortest_that_fits(load, num_devices):
    memory = 1e6
    best = best_split([SMALL], load, H100, num_devices, memory_for_cache=memory)
    tried = []
    for data, group in splits([SMALL], load, num_devices):
        part = load._replace(batch=load.batch // data)
        step = decode_step([SMALL], part, H100, group)
        if step.cache_bytes <= memory:
            tried.append(step.seconds)
    assert (best is None) == (not tried)
    if best is not None:
        assert best.step.seconds == min(tried) and best.step.cache_bytes <= memory
        assert best.data * best.group.size == num_devices
        expected = load.batch * load.new_tokens / best.step.seconds
        assert best.tokens_per_second == pytest.approx(expected)


def test_a_cache_that_fits_nowhere_has_no_split():
    load = Load(LONG, 64, codec=Fp8Codec())  # 336 GB
    assert best_split(V3, load, H100, 1) is None
    assert best_split(V3, load, H100, 8).step.cache_bytes == 8 * LONG * 40_016
    assert best_split(V3, load, H100, 8, memory_for_cache=40e9) is None
    with pytest.raises(ShapeError, match="num_devices has value 0"):
        best_split(V3, load, H100, 0)


# --- devices and models ------------------------------------------------------------------------


def test_data_sheets_are_plausible_and_say_where_they_are_from():
    for device in DEVICES.values():
        assert device.link in LINKS and device.source and device.driver_name
        assert 1e10 < device.memory < 1e12 and 1e11 < device.bytes_per_second < 1e13
        assert 100 < device.flops_per_second / device.bytes_per_second < 500
    assert all(link.source and 1e10 < link.bytes_per_second < 1e12 for link in LINKS.values())
    h100 = device_of("h100")
    assert (h100.memory, h100.bytes_per_second) == (80e9, 3.35e12)
    assert link_of(h100.link).bytes_per_second == 450e9  # one direction of 900 GB/s


def test_given_limits_are_checked():
    given_limits = {"memory": 1e9, "bytes_per_second": 2e9, "flops_per_second": 3e9}
    device = given_device("mine", **given_limits)
    assert (device.memory, device.node, device.driver_name) == (1e9, 1, "")
    for name in given_limits:
        with pytest.raises(ValueError, match=f"{name} has value 0"):
            given_device("mine", **{**given_limits, name: 0})
    with pytest.raises(UnsupportedError, match="expected one of"):
        given_device("mine", **given_limits, link="rope")
    with pytest.raises(UnsupportedError, match="'h1000', expected one of"):
        device_of("h1000")


def test_every_preset_has_its_number_of_layers():
    assert set(NUM_LAYERS) == set(PRESETS)
    assert len(preset_layers("minicpm3-4b")) == 62
    with pytest.raises(UnsupportedError, match="preset_layers: name has value 'gpt'"):
        preset_layers("gpt")


def test_layers_of_transformers_configs_agree_with_the_presets():
    """Their defaults are the published sizes of these classes."""
    transformers = pytest.importorskip("transformers")
    for preset, name in {
        "deepseek-v3": "DeepseekV3Config",
        "minicpm3-4b": "MiniCPM3Config",
        "glm-4.7-flash": "Glm4MoeLiteConfig",
        "longcat-flash": "LongcatFlashConfig",
        "youtu-2b": "YoutuConfig",
        "mistral-small-4": "Mistral4Config",
    }.items():
        layers = config_layers(getattr(transformers, name)())
        assert len(layers) == NUM_LAYERS[preset], preset
        assert layers[0].cache_width == MLAConfig.preset(preset).cache_width


def kimi_linear(**changes):
    return {
        "model_type": "kimi_linear",
        "hidden_size": 2304,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "num_hidden_layers": 27,
        "linear_attn_config": {"full_attn_layers": [4, 8, 12, 16, 20, 24, 27]},
        **changes,
    }


def test_layers_of_other_kinds_are_left_out():
    assert config_layers(kimi_linear()) == preset_layers("kimi-linear")
    with pytest.raises(UnsupportedError):
        config_layers(kimi_linear(linear_attn_config={"full_attn_layers": []}))
    with pytest.raises(ValueError, match="no num_hidden_layers"):
        config_layers(kimi_linear(num_hidden_layers=None))


def test_layers_of_a_converted_model_may_differ():
    layers = [SMALL, replace(SMALL, kv_lora_rank=30)]
    assert config_layers({"layers": [layer.to_dict() for layer in layers]}) == tuple(layers)
