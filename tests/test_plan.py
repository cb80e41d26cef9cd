"""Costs from sizes: bytes against real caches, multiply-adds against counted ones."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mla import DenseLatentCache, Fp8Codec, Int4Codec, Int8Codec, MLAConfig, PlainCodec, RopeConfig
from mla.absorb import absorb_output, absorb_queries, split_kv_b
from mla.plan import (
    StepCost,
    absorbed_step,
    break_even_intensity,
    bytes_per_token,
    cost_per_million_tokens,
    crossover,
    grouped_bytes_per_token,
    grouped_step,
    sequences_that_fit,
    should_absorb,
)


def layer(**sizes) -> MLAConfig:
    given = {
        "hidden_size": 40,
        "num_attention_heads": 3,
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
        "rope": RopeConfig(),
    }
    return MLAConfig(**{**given, **sizes})


@pytest.mark.parametrize("codec", [PlainCodec(), Fp8Codec(), Int8Codec(), Int4Codec()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_a_cache(codec, dtype):
    cache = DenseLatentCache(layer(), batch_size=3, max_length=50, codec=codec, dtype=dtype)
    assert cache.nbytes == 3 * 50 * bytes_per_token(layer(), codec, dtype=dtype)


def test_bytes_of_published_layers():
    v3 = MLAConfig.preset("deepseek-v3")
    codecs = (None, Fp8Codec(), Int8Codec(), Int4Codec())
    assert [bytes_per_token(v3, codec) for codec in codecs] == [1152, 656, 656, 400]
    assert grouped_bytes_per_token(3, 64) == 768  # SmolLM2-135M


@pytest.mark.parametrize("Q", [None, 20])
def test_multiply_adds_are_those_of_the_matrix_products(Q):
    config, T = layer(q_lora_rank=Q), 17
    H, N, R, V, C = 3, 12, 8, 10, 24
    with FlopCounterMode(display=False) as counter:
        x = torch.zeros(1, 40)
        if Q is None:
            _ = x @ torch.zeros(40, H * (N + R))
        else:
            _ = (x @ torch.zeros(40, Q)) @ torch.zeros(Q, H * (N + R))
        _ = x @ torch.zeros(40, C + R)
        w_uk, w_uv = split_kv_b(torch.zeros(H * (N + V), C), H, N, V)
        absorb_queries(torch.zeros(1, 1, H, N), w_uk)
        rows = torch.zeros(T, C + R)
        scores = torch.zeros(H, C + R) @ rows.T
        out = scores @ rows[:, :C]
        values = absorb_output(out[None, None], w_uv)
        _ = values.reshape(1, H * V) @ torch.zeros(H * V, 40)
    assert counter.get_total_flops() == 2 * absorbed_step(config).at(T)


def test_grouped_attention_counts_projections_scores_and_values():
    D, H, G, d, T = 576, 9, 3, 64, 100
    projections = D * H * d + 2 * D * G * d + H * d * D
    assert grouped_step(D, H, G, d).at(T) == projections + T * H * 2 * d


def test_crossover():
    assert crossover(StepCost(10, 3), StepCost(40, 1)) == 15.0
    assert crossover(StepCost(40, 3), StepCost(10, 1)) is None
    assert crossover(StepCost(10, 1), StepCost(40, 1)) is None


def test_break_even_intensity():
    cheap, dear = StepCost(0, 100), StepCost(0, 400)
    assert break_even_intensity(dear, 50, cheap, 80) == 5.0
    assert break_even_intensity(cheap, 50, dear, 80) == 0.0
    assert break_even_intensity(dear, 80, cheap, 80) is None


@pytest.mark.parametrize(
    ("preset", "limit"),
    [
        ("deepseek-v3", 170),
        ("glm-4.7-flash", 398),
        ("mistral-small-4", 153),
        ("minicpm3-4b", 85),
    ],
)
def test_absorbing_pays_up_to_a_number_of_queries(preset, limit):
    config, T = MLAConfig.preset(preset), 10**9
    assert should_absorb(limit, T, config) and not should_absorb(limit + 1, T, config)
    assert not should_absorb(64, 64, config)  # a cold prefill


def test_a_cold_prefill_never_absorbs_however_narrow_the_latent():
    narrow = layer(kv_lora_rank=8)  # 2 * C < N + V: an absorbed score costs less than an expanded
    assert should_absorb(63, 64, narrow) and not should_absorb(64, 64, narrow)


def test_whole_sequences_fit():
    """100 tokens of 10 bytes are 1000 bytes."""
    assert [sequences_that_fit(memory, 100, 10) for memory in (0, 999, 1000, 2999)] == [0, 0, 1, 2]
    assert sequences_that_fit(1000, 100, 10.5) == 0  # a pool's share of a page
    for arguments in ((-1, 100, 10), (1000, 0, 10), (1000, 100, 0)):
        with pytest.raises(ValueError, match=r"sequences_that_fit: .* has value"):
            sequences_that_fit(*arguments)


def test_a_million_tokens_cost_their_share_of_an_hour():
    """1000 tokens a second make a million in 1000 s, 0.2778 of an hour."""
    assert cost_per_million_tokens(1000.0, 3.6) == pytest.approx(1.0)
    assert cost_per_million_tokens(1000.0, 0.0) == 0.0
    for arguments in ((0.0, 1.0), (1.0, -1.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match=r"cost_per_million_tokens: .* has value"):
            cost_per_million_tokens(*arguments)
