"""`attend` against the oracle: absorbed, expanded and masked, with gradients and poisoned slots."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from helpers import randn
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

pytest.importorskip("transformers")

from mla import reference
from mla.checks import UnsupportedError
from mla.integrations.transformers.attend import attend, joint_rows
from mla.integrations.transformers.masks import boolean_mask, key_run_mask

H, N, R, V, C = 3, 6, 4, 5, 8
SCALE = 0.3


class Inputs(NamedTuple):
    query: Tensor  # [B, H, L, N+R]
    latent: Tensor  # [B, 1, T, C]
    k_rope: Tensor  # [B, 1, T, R]
    kv_b_proj: nn.Linear


def draw(B: int, L: int, T: int, *, joint: bool = False, seed: int = 0) -> Inputs:
    """Random inputs; ``joint`` makes latents and keys slices of one buffer."""
    rows = randn(B, 1, T, C + R, seed=seed, dtype=torch.float64)
    latent, k_rope = rows[..., :C], rows[..., C:]
    if not joint:
        latent, k_rope = latent.clone(), k_rope.clone()
    layer = nn.Linear(C, H * (N + V), bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(randn(*layer.weight.shape, seed=seed + 1, dtype=torch.float64))
    return Inputs(randn(B, H, L, N + R, seed=seed + 2, dtype=torch.float64), latent, k_rope, layer)


def run(inputs: Inputs, mask: Tensor | None, **options: Any) -> Tensor:
    return attend(*inputs, nope_dim=N, value_dim=V, mask=mask, scale=SCALE, **options)


def oracle(inputs: Inputs, starts: Tensor | None, lengths: Tensor) -> Tensor:
    return reference.expanded_attention(
        inputs.query.transpose(1, 2),
        inputs.latent[:, 0],
        inputs.k_rope[:, 0],
        inputs.kv_b_proj.weight,
        num_heads=H,
        value_dim=V,
        scale=SCALE,
        key_starts=starts,
        key_lengths=lengths,
    ).out


CASES = st.fixed_dictionaries(
    {
        "pads": st.lists(st.integers(0, 12), min_size=1, max_size=3),
        "L": st.integers(1, 9),
        "past": st.integers(0, 20),
        "unfilled": st.sampled_from([0, 0, 1, 30]),
        "joint": st.booleans(),
        "needs_grad": st.booleans(),
        "seed": st.integers(0, 2**31 - 4),
    }
)


@given(case=CASES)
def test_matches_the_oracle(case: dict[str, Any]) -> None:
    L, seen, B = case["L"], case["past"] + case["L"], len(case["pads"])
    T = seen + case["unfilled"]
    inputs = draw(B, L, T, joint=case["joint"], seed=case["seed"])
    pads = torch.tensor(case["pads"]).clamp(max=seen)
    padding = torch.arange(seen) >= pads[:, None]
    mask = key_run_mask(B, L, T, q_offset=torch.tensor(case["past"]), attention_mask=padding)
    lengths = torch.full((B,), seen)
    expected = oracle(inputs, pads, lengths).detach()
    for b, pad in enumerate(case["pads"]):
        inputs.latent[b, :, :pad] = inputs.k_rope[b, :, :pad] = float("nan")
    inputs.latent[:, :, seen:] = inputs.k_rope[:, :, seen:] = float("nan")
    with torch.set_grad_enabled(case["needs_grad"]):
        out = run(inputs, mask)
    assert out.shape == (B, L, H, V)
    torch.testing.assert_close(out.detach(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("L", "T"), [(1, 7), (5, 5), (3, 9)])
def test_without_a_mask_sdpa_of_transformers_decides(L: int, T: int) -> None:
    inputs = draw(2, L, T)
    lengths = torch.full((2,), T if L == 1 else L)
    with torch.no_grad():
        torch.testing.assert_close(run(inputs, None), oracle(inputs, None, lengths))


@given(seed=st.integers(0, 2**31 - 4), additive=st.booleans(), heads=st.sampled_from([1, H]))
def test_any_mask_is_applied_as_it_is(seed: int, additive: bool, heads: int) -> None:
    inputs = draw(2, 4, 7, seed=seed)
    seen = torch.rand(2, heads, 4, 7, generator=torch.Generator().manual_seed(seed)) < 0.6
    seen[..., 3], seen[..., 5] = True, False
    expanded = inputs.kv_b_proj(inputs.latent[:, 0]).unflatten(-1, (H, N + V)).transpose(1, 2)
    key = torch.cat((expanded[..., :N], inputs.k_rope.expand(-1, H, -1, -1)), dim=-1)
    scores = SCALE * inputs.query @ key.transpose(2, 3)
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    expected = (weights @ expanded[..., N:]).transpose(1, 2)
    if additive:
        mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -math.inf)
    else:
        mask = seen
        inputs.latent[:, :, 5] = inputs.k_rope[:, :, 5] = float("nan")  # a slot nobody sees
    torch.testing.assert_close(run(inputs, mask), expected)


def test_gradients_equal_those_of_plain_attention() -> None:
    """Of every input, through runs of keys and through the boolean mask that says the same."""
    padding = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
    packed = key_run_mask(2, 4, 6, q_offset=2, attention_mask=padding)
    grads = []
    for mask in (packed, boolean_mask(packed, 4, 6)):
        inputs = draw(2, 4, 6)
        leaves = (inputs.query, inputs.latent, inputs.k_rope, inputs.kv_b_proj.weight)
        for leaf in leaves:
            leaf.requires_grad_()
        run(inputs, mask).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, plain in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


def test_dropout_is_that_of_sdpa() -> None:
    inputs = draw(2, 6, 6)
    outputs = []
    for mask in (key_run_mask(2, 6, 6), torch.ones(2, 1, 6, 6).tril().bool()):
        torch.manual_seed(3)
        outputs.append(run(inputs, mask, dropout=0.5))
    assert torch.equal(*outputs)
    assert not torch.allclose(outputs[0], run(inputs, mask))


def test_latents_of_another_dtype_follow_the_queries() -> None:
    """As under autocast, where norms stay in float32."""
    inputs = draw(2, 1, 9)
    low = Inputs(inputs.query.bfloat16(), *inputs[1:])
    with torch.no_grad():
        out = run(low, None)
        assert out.dtype == torch.bfloat16
        # Queries in bfloat16, 8 bits, against float64: right dtype and order of size only.
        torch.testing.assert_close(out.double(), run(inputs, None), rtol=0.1, atol=0.1)


def test_rows_are_joined_only_where_they_lie_apart() -> None:
    rows = randn(2, 9, C + R, seed=0)
    latent, k_rope = rows[:, None, 2:7, :C], rows[:, None, 2:7, C:]
    joined = joint_rows(latent, k_rope)
    assert joined.data_ptr() == latent.data_ptr() and torch.equal(joined, rows[:, 2:7])
    apart = [
        (latent.clone(), k_rope),
        (rows[:, None, 2:7, :C], rows[:, None, 3:8, C:]),  # another row
        (rows[:, None, 2:7, R:], rows[:, None, 2:7, :R]),  # the key first
    ]
    for first, second in apart:
        assert torch.equal(joint_rows(first, second), torch.cat((first, second), -1)[:, 0])


def test_a_quantised_layer_is_refused() -> None:
    inputs = draw(1, 1, 4)

    class Packed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    layer = Packed(C, H * (N + V), bias=False, dtype=torch.float64).eval()
    with pytest.raises(UnsupportedError, match="kv_b_proj"):
        run(inputs._replace(kv_b_proj=layer), None)
