"""Rotary embedding against the modules of transformers: the same bits in float32 and below."""

import importlib
from functools import lru_cache
from typing import Any

import pytest
import torch
from helpers import randn
from hypothesis import given
from hypothesis import strategies as st

from mla.config import MLAConfig, RopeConfig
from mla.rope import cos_sin, query_position_scale, rotate

transformers = pytest.importorskip("transformers")

POSITIONS = st.lists(st.integers(0, 10_000), min_size=1, max_size=20).map(
    lambda p: torch.tensor([p])
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
SIZES = st.integers(1, 3), st.integers(1, 4), st.integers(1, 20).map(lambda n: 2 * n)
CASES = st.tuples(*SIZES, st.integers(0, 2**31 - 1))  # B, L, R, seed

SHORT = [1.0 + 0.1 * i for i in range(8)]
LONG = [1.5 + 0.7 * i for i in range(8)]
# Rope parameters as transformers spells them, for R = 16 and a model of 8192 positions.
HOST_ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096},
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 0.707,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn-flat": {  # both ends of the ramp fall together
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 1.0,
        "rope_theta": 50000.0,
        "attention_factor": 1.25,
    },
    "yarn-wide": {  # the ramp ends beyond the last pair
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 4096,
        "rope_theta": 50.0,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": SHORT,
        "long_factor": LONG,
        "original_max_position_embeddings": 2048,
    },
}


@lru_cache
def host_config(kind: str) -> Any:
    return transformers.DeepseekV3Config(
        hidden_size=48,
        num_attention_heads=3,
        num_key_value_heads=3,
        q_lora_rank=None,
        kv_lora_rank=24,
        qk_nope_head_dim=10,
        qk_rope_head_dim=16,
        v_head_dim=12,
        max_position_embeddings=8192,
        rope_parameters=dict(HOST_ROPES[kind]),
    )


def host_modeling(name: str) -> Any:
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


@pytest.mark.parametrize("kind", sorted(HOST_ROPES))
@given(positions=POSITIONS, dtype=DTYPES)
def test_float32_angles_are_the_bits_of_transformers(kind, positions, dtype):
    config = host_config(kind)
    rotary = host_modeling("deepseek_v3").DeepseekV3RotaryEmbedding(config)
    wanted = rotary(torch.zeros(1, dtype=dtype), positions)
    found = cos_sin(MLAConfig.from_hf(config).rope, 16, positions, dtype=dtype)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b[..., :8])


@given(positions=POSITIONS)
def test_float32_angles_are_those_of_deepseek_v2(positions):
    config = host_config("yarn-mscale")
    wanted = host_modeling("deepseek_v2").DeepseekV2RotaryEmbedding(config)(
        torch.zeros(1), positions
    )
    cos, sin = cos_sin(MLAConfig.from_hf(config).rope, 16, positions)
    torch.testing.assert_close(cos, wanted.real, rtol=0, atol=1.2e-7)  # one rounding: polar()
    torch.testing.assert_close(sin, wanted.imag, rtol=0, atol=1.2e-7)


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@given(case=CASES, dtype=DTYPES)
def test_rotation_gives_the_bits_of_transformers(pairing, case, dtype):
    B, L, R, seed = case
    modeling = host_modeling("deepseek_v3")
    queries, keys = (randn(B, n, L, R, seed=seed + n, dtype=dtype) for n in (3, 1))
    angles = 100 * randn(B, L, R // 2, seed=seed + 9, dtype=torch.float64)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    tables = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    if pairing == "interleaved":
        wanted = modeling.apply_rotary_pos_emb_interleave(queries, keys, *tables)
    else:
        wanted = modeling.apply_rotary_pos_emb(queries, keys, *tables)
    for x, y in zip((queries, keys), wanted, strict=True):
        found = rotate(x, cos.unsqueeze(1), sin.unsqueeze(1), pairing)
        if pairing == "interleaved":  # transformers returns all first, then all second numbers
            found = torch.cat([found[..., ::2], found[..., 1::2]], -1)
        assert torch.equal(found, y)


@given(case=CASES, dtype=DTYPES)
def test_rotation_with_float32_tables_is_that_of_deepseek_v2(case, dtype):
    B, L, R, seed = case
    queries, keys = (randn(B, n, L, R, seed=seed + n, dtype=dtype) for n in (3, 1))
    angles = 100 * randn(B, L, R // 2, seed=seed + 9, dtype=torch.float64)
    cos, sin = angles.cos().float(), angles.sin().float()
    wanted = host_modeling("deepseek_v2").apply_rotary_emb(queries, keys, torch.complex(cos, sin))
    for x, y in zip((queries, keys), wanted, strict=True):
        found = rotate(x, cos.unsqueeze(1), sin.unsqueeze(1), "interleaved")
        # Products and their sum are rounded in another order.
        torch.testing.assert_close(found, y, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@given(positions=POSITIONS, beta=st.floats(0.01, 1.0), trained=st.integers(1, 3000))
def test_position_scale_of_queries_is_the_bits_of_mistral4(positions, beta, trained):
    rope = RopeConfig(query_scale_beta=beta, original_max_position_embeddings=trained)
    wanted = host_modeling("mistral4").get_llama_4_attn_scale(positions, beta, trained)
    found = query_position_scale(rope, positions)
    assert found is not None
    assert torch.equal(found, wanted[:, 0, :, 0])
