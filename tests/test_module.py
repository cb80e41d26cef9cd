"""MultiheadLatentAttention: one function, however it is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_within_budget
from hypothesis import given
from hypothesis import strategies as st
from layers import SMALL, inputs, make_layer
from torch import Tensor

from mla import (
    DenseLatentCache,
    Fp8Codec,
    Int4Codec,
    Int8Codec,
    MLAConfig,
    MultiheadLatentAttention,
    RopeConfig,
    UnsupportedError,
    reference,
)
from mla.ops import supported_impls
from mla.rope import inverse_frequencies

SEEDS = st.integers(0, 2**31 - 1)
CONFIGS = st.builds(
    lambda h, q, c, n, r, v, pairing, norm, scales, bias: MLAConfig(
        hidden_size=20,
        num_attention_heads=h,
        q_lora_rank=q,
        kv_lora_rank=c,
        qk_nope_head_dim=n,
        qk_rope_head_dim=r,
        v_head_dim=v,
        rope=RopeConfig(pairing=pairing),
        latent_norm=norm,
        query_scale=scales[0],
        latent_scale=scales[1],
        attention_bias=bias,
        query_bias=bias,
    ),
    st.sampled_from([1, 3, 9]),
    st.sampled_from([None, 7]),
    st.sampled_from([8, 24, 31]),
    st.sampled_from([5, 12]),
    st.sampled_from([0, 2, 6]),
    st.sampled_from([3, 16, 21]),
    st.sampled_from(["interleaved", "half", "none"]),
    st.sampled_from(["rms", "none"]),
    st.sampled_from([(1.0, 1.0), (1.7, 0.6)]),
    st.booleans(),
)


def oracle(layer: MultiheadLatentAttention, x: Tensor, starts: list[int] | None = None) -> Tensor:
    """The whole layer written out with the functions of `mla.reference`, in the dtype of ``x``."""
    config = layer.config
    weights = {name: value.to(x.dtype) for name, value in layer.state_dict().items()}

    def linear(name: str, inputs: Tensor) -> Tensor:
        return torch.nn.functional.linear(
            inputs, weights[f"{name}.weight"], weights.get(f"{name}.bias")
        )

    H, N, R = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    B, L, _ = x.shape
    starts_B = torch.tensor(starts or [0] * B)
    position = (torch.arange(L) - starts_B[:, None]).clamp(min=0).to(x.dtype)
    frequencies = inverse_frequencies(config.rope, R, dtype=x.dtype).to(x.dtype)
    angles = position[..., None] * frequencies
    if config.q_lora_rank is None:
        query = linear("q_proj", x)
    else:
        low = reference.rms_norm(
            linear("q_a_proj", x), weights["q_a_layernorm.weight"], config.query_norm_eps
        )
        query = linear("q_b_proj", low)
    query = (query * config.query_scale).view(B, L, H, N + R)
    q_nope, q_rope = query.split([N, R], -1)
    pairing = config.rope.pairing
    query = torch.cat([q_nope, reference.rotate(q_rope, angles[:, :, None], pairing)], -1)
    latent, k_rope = linear("kv_a_proj_with_mqa", x).split([config.kv_lora_rank, R], -1)
    if config.latent_norm == "rms":
        latent = reference.rms_norm(
            latent, weights["kv_a_layernorm.weight"], config.latent_norm_eps
        )
    result = reference.expanded_attention(
        query,
        latent * config.latent_scale,
        reference.rotate(k_rope, angles, pairing),
        weights["kv_b_proj.weight"],
        num_heads=H,
        value_dim=config.v_head_dim,
        scale=config.scale,
        key_starts=starts_B,
    )
    return linear("o_proj", result.out.flatten(2))


@given(config=CONFIGS, B=st.integers(1, 3), L=st.integers(1, 17), seed=SEEDS)
def test_matches_the_oracle(config: MLAConfig, B: int, L: int, seed: int) -> None:
    layer, x = make_layer(config, seed), inputs(B, L, seed)
    torch.testing.assert_close(layer(x), oracle(layer, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(config=CONFIGS, L=st.integers(1, 17), seed=SEEDS)
def test_low_precision_stays_within_budget(
    dtype: torch.dtype, config: MLAConfig, L: int, seed: int
) -> None:
    layer = make_layer(config, seed, dtype)
    x = inputs(2, L, seed, dtype)
    assert_within_budget(layer(x), oracle(layer, x.double()), oracle(layer, x), "layer")


@given(config=CONFIGS, splits=st.lists(st.integers(1, 9), min_size=1, max_size=5), seed=SEEDS)
def test_cached_steps_equal_one_pass(config: MLAConfig, splits: list[int], seed: int) -> None:
    layer, x = make_layer(config, seed), inputs(2, sum(splits), seed)
    cache = DenseLatentCache(config, batch_size=2, dtype=torch.float64)
    with torch.no_grad():
        steps = [layer(part, cache=cache) for part in x.split(splits, dim=1)]
        torch.testing.assert_close(torch.cat(steps, 1), layer(x), rtol=1e-9, atol=1e-9)
    assert cache.lengths.tolist() == [sum(splits)] * 2


@given(
    pads=st.lists(st.integers(0, 6), min_size=2, max_size=3),
    splits=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    seed=SEEDS,
)
def test_left_padding_is_invisible(pads: list[int], splits: list[int], seed: int) -> None:
    prompt, B = 7, len(pads)
    layer, x = make_layer(SMALL, seed), inputs(len(pads), prompt + sum(splits), seed)
    mask = torch.arange(x.shape[1]) >= torch.tensor(pads)[:, None]
    x = x.masked_fill(~mask[..., None], 1e4)
    cache = DenseLatentCache(SMALL, batch_size=B, dtype=torch.float64)
    with torch.no_grad():
        whole = layer(x, attn_mask=mask)
        steps = [layer(x[:, :prompt], attn_mask=mask[:, :prompt], cache=cache)]
        steps += [layer(part, cache=cache) for part in x[:, prompt:].split(splits, dim=1)]
        for b, pad in enumerate(pads):
            alone = layer(x[b : b + 1, pad:])[0]
            torch.testing.assert_close(whole[b, pad:], alone, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(torch.cat(steps, 1)[b, pad:], alone, rtol=1e-9, atol=1e-9)
    assert torch.isfinite(whole).all()


@given(
    counts=st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=4),
    seed=SEEDS,
)
def test_ragged_steps_equal_each_row_alone(counts: list[list[int]], seed: int) -> None:
    layer = make_layer(SMALL, seed)
    totals = [sum(step[b] for step in counts) for b in range(3)]
    x = [inputs(1, max(total, 1), seed + b) for b, total in enumerate(totals)]
    cache = DenseLatentCache(SMALL, batch_size=3, dtype=torch.float64)
    done, results = [0, 0, 0], [[], [], []]
    with torch.no_grad():
        for step in counts:
            L = max(max(step), 1)
            chunk = torch.full((3, L, 20), 7.0, dtype=torch.float64)
            for b, count in enumerate(step):
                chunk[b, :count] = x[b][0, done[b] : done[b] + count]
            mask = torch.arange(L) < torch.tensor(step)[:, None]
            out = layer(chunk, attn_mask=mask, cache=cache)
            assert torch.isfinite(out).all()
            for b, count in enumerate(step):
                results[b].append(out[b, :count])
                done[b] += count
        for b, total in enumerate(totals):
            if total:
                expected = layer(x[b])[0, :total]
                torch.testing.assert_close(torch.cat(results[b]), expected, rtol=1e-9, atol=1e-9)


@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4), seed=SEEDS)
def test_packed_sequences_equal_each_alone(lengths: list[int], seed: int) -> None:
    layer, x = make_layer(SMALL, seed), inputs(1, sum(lengths), seed)
    boundaries = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = layer(x, cu_seqlens=boundaries)
    alone = [layer(part) for part in x.split(lengths, dim=1) if part.shape[1]]
    expected = torch.cat(alone, 1) if alone else x[:, :0] @ torch.zeros(20, 20).double()
    torch.testing.assert_close(packed, expected, rtol=1e-9, atol=1e-9)


@given(config=CONFIGS, save=st.sampled_from(["latent", "expanded"]), seed=SEEDS)
def test_gradients_match_the_oracle(config: MLAConfig, save: Any, seed: int) -> None:
    layer = make_layer(config, seed, save=save)
    x = inputs(2, 6, seed).requires_grad_()
    weight = inputs(2, 6, seed + 1)
    (layer(x) * weight).sum().backward()
    got = {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    parameters = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    state_dict = layer.state_dict
    layer.state_dict = lambda: parameters  # type: ignore[method-assign]
    x_oracle = x.detach().clone().requires_grad_()
    (oracle(layer, x_oracle) * weight).sum().backward()
    layer.state_dict = state_dict  # type: ignore[method-assign]
    for name, grad in got.items():
        expected = x_oracle.grad if name == "x" else parameters[name].grad
        torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-8, msg=name)


def test_gradient_of_every_input_by_finite_differences() -> None:
    layer = make_layer(SMALL, 3)
    x = inputs(1, 3, 3).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *layer.parameters()), fast_mode=True)


@pytest.mark.parametrize("codec", [Fp8Codec(), Int8Codec(), Int4Codec()])
def test_coded_cache_stays_near_the_plain_one(codec: Any) -> None:
    layer, x = make_layer(SMALL, 0, torch.float32), inputs(2, 40, 0, torch.float32)
    cache = DenseLatentCache(SMALL, batch_size=2, codec=codec)
    with torch.no_grad():
        exact = layer(x)
        steps = torch.cat([layer(part, cache=cache) for part in x.split([30, 1, 1, 8], 1)], 1)
    # A cold prefill sees its own latents, not the stored ones.
    torch.testing.assert_close(steps[:, :30], exact[:, :30])
    error = (steps - exact).norm() / exact.norm()
    assert 0 < error < (0.2 if codec.kind == "int4" else 0.03)
    chunked = DenseLatentCache(SMALL, batch_size=2, codec=codec)
    long = MultiheadLatentAttention(SMALL)
    long.load_state_dict(layer.state_dict())
    y = inputs(2, 90, 1, torch.float32)
    with torch.no_grad():  # 60 new queries expand: fresh latents as they are, old ones as stored
        parts = torch.cat([long(part, cache=chunked) for part in y.split([30, 60], 1)], 1)
        assert (parts - long(y)).norm() / long(y).norm() < error + 0.1


def test_later_tokens_change_nothing_before_them() -> None:
    layer, x = make_layer(SMALL, 5), inputs(1, 12, 5)
    changed = x.clone()
    changed[:, 7:] += 1
    torch.testing.assert_close(layer(x)[:, :7], layer(changed)[:, :7], rtol=0, atol=1e-14)


def test_explicit_positions_shift_nothing_by_a_constant() -> None:
    layer, x = make_layer(SMALL, 6), inputs(2, 9, 6)
    moved = layer(x, positions=torch.arange(9) + 1000)
    torch.testing.assert_close(moved, layer(x), rtol=1e-9, atol=1e-9)
    stretched = layer(x, positions=torch.arange(9) * 3)
    assert (stretched - layer(x)).abs().max() > 1e-3


def test_weights_may_change_at_any_time() -> None:
    layer, x = make_layer(SMALL, 7), inputs(1, 8, 7)
    cache = DenseLatentCache(SMALL, batch_size=1, dtype=torch.float64)
    with torch.no_grad():
        layer(x[:, :7], cache=cache)
        before = layer(x[:, 7:], cache=cache)
        cache.truncate([7])
        layer.kv_b_proj.weight.mul_(1.5)
        after = layer(x[:, 7:], cache=cache)
        expected = layer(x)[:, 7:]
    assert (before - after).abs().max() > 1e-3
    torch.testing.assert_close(after, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("impl", ["cpp", "torch"])
def test_a_named_implementation_leaves_ops_it_lacks_to_auto(impl: Any) -> None:
    if dict(supported_impls("mla_decode"))[impl] is not None:
        pytest.skip(f"{impl} is not available")
    layer, x = make_layer(SMALL, 21, torch.float32, impl=impl), inputs(1, 90, 21, torch.float32)
    cache = DenseLatentCache(SMALL, batch_size=1)
    with torch.no_grad():  # cold prefill, absorbed step, warm prefill
        steps = [layer(part, cache=cache) for part in x.split([29, 1, 60], 1)]
        expected = layer(x)
    # Float32 through three forms of the layer: sums in another order.
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=1e-4)


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="impl='fast' does not exist"):
        make_layer(SMALL, 22, impl="fast")(inputs(1, 2, 22))
