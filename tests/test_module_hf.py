"""The layer against the attention layers of transformers, weights loaded with ``strict=True``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import randn
from torch import Tensor, nn

from mla import DenseLatentCache, MLAConfig, MultiheadLatentAttention
from mla.rope import cos_sin

pytest.importorskip("transformers")
from hf_models import STANDARD, tiny_model

MODELS = (*STANDARD, "kimi_linear")
LENGTH = 23


def mla_layer(model: nn.Module) -> tuple[nn.Module, int]:
    """The first MLA layer of a model and its index."""
    for module in model.modules():
        if hasattr(module, "expand_kv"):
            return module, module.layer_idx
    raise AssertionError(f"{type(model).__name__} has no MLA layer")


def our_layer(host: nn.Module, layer_idx: int, dtype: torch.dtype) -> MultiheadLatentAttention:
    config = MLAConfig.from_hf(host.config, layer_idx=layer_idx)
    layer = MultiheadLatentAttention(config, dtype=dtype)
    layer.load_state_dict(host.state_dict(), strict=True)
    return layer.eval()


def run_host(host: nn.Module, hidden_states: Tensor, positions: Tensor, embeddings: Any) -> Tensor:
    """The stock layer, causal, without a cache."""
    L = hidden_states.shape[1]
    mask = torch.full((L, L), float("-inf"), dtype=hidden_states.dtype).triu(1)[None, None]
    arguments: dict[str, Any] = {"attention_mask": mask, "position_ids": positions}
    if embeddings is not None:
        arguments["position_embeddings"] = embeddings
    with torch.no_grad():
        return host(hidden_states, **arguments)[0]


def rotary_of(model: nn.Module) -> nn.Module | None:
    return next((m for name, m in model.named_modules() if name.endswith("rotary_emb")), None)


def float64_embeddings(host: nn.Module, config: MLAConfig, positions: Tensor) -> Any:
    """What the host's rotary module returns, in float64; the angles are tested in test_rope."""
    if config.rope.pairing == "none":
        return None
    cos, sin = cos_sin(config.rope, config.qk_rope_head_dim, positions, dtype=torch.float64)
    if type(host).__name__ == "DeepseekV2Attention":
        return torch.complex(cos, sin)
    return torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)


def rotate_complex(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """DeepSeek-V2's complex rotation without its float32 detour."""

    def turn(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * freqs_cis.unsqueeze(1)).flatten(3)

    return turn(xq), turn(xk)


def position_scale(positions: Tensor, beta: float, trained: int) -> Tensor:
    """Mistral-4's factor on the queries without its float32 logarithm."""
    scale = 1 + beta * torch.log(1 + torch.floor(positions.double() / trained))
    return scale[:, None, :, None]


@pytest.fixture
def float64_norms(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a host's RMSNorm and rotation in the dtype of their input instead of float32."""
    from transformers.models.deepseek_v2 import modeling_deepseek_v2
    from transformers.models.mistral4 import modeling_mistral4

    monkeypatch.setattr(modeling_deepseek_v2, "apply_rotary_emb", rotate_complex)
    monkeypatch.setattr(modeling_mistral4, "get_llama_4_attn_scale", position_scale)

    def forward(self: Any, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon))

    def patch(model: nn.Module) -> None:
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):
                monkeypatch.setattr(type(module), "forward", forward)

    return patch


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("model_type", MODELS)
def test_agrees_in_float64(model_type: str, bias: bool, float64_norms: Any) -> None:
    model = tiny_model(model_type, attention_bias=bias)
    float64_norms(model)
    host, layer_idx = mla_layer(model)
    layer = our_layer(host, layer_idx, torch.float64)
    x = randn(2, LENGTH, layer.config.hidden_size, seed=1, dtype=torch.float64)
    positions = (torch.arange(LENGTH) * 400).expand(2, -1)  # up to 8,800
    expected = run_host(host, x, positions, float64_embeddings(host, layer.config, positions))
    with torch.no_grad():
        torch.testing.assert_close(layer(x, positions=positions), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("model_type", MODELS)
def test_agrees_unpatched_in_float32_at_far_positions(model_type: str) -> None:
    model = tiny_model(model_type, dtype=torch.float32, max_position_embeddings=16384)
    host, layer_idx = mla_layer(model)
    layer = our_layer(host, layer_idx, torch.float32)
    x = randn(2, LENGTH, layer.config.hidden_size, seed=2)
    positions = torch.linspace(0, 10_000, LENGTH).long().expand(2, -1)
    rotary = rotary_of(model)
    embeddings = None if layer.config.rope.pairing == "none" else rotary(x, positions)
    expected = run_host(host, x, positions, embeddings)
    with torch.no_grad():
        actual = layer(x, positions=positions)
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < 1e-5, f"relative error {error:.1e}"


@pytest.mark.parametrize("model_type", MODELS)
def test_decoding_from_the_cache_agrees(model_type: str, float64_norms: Any) -> None:
    model = tiny_model(model_type)
    float64_norms(model)
    host, layer_idx = mla_layer(model)
    layer = our_layer(host, layer_idx, torch.float64)
    x = randn(2, LENGTH, layer.config.hidden_size, seed=3, dtype=torch.float64)
    positions = torch.arange(LENGTH).expand(2, -1)
    expected = run_host(host, x, positions, float64_embeddings(host, layer.config, positions))
    cache = DenseLatentCache(layer.config, batch_size=2, dtype=torch.float64)
    with torch.no_grad():
        steps = [layer(part, cache=cache) for part in x.split([9, 1, 1, 3, 9], dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-10, atol=1e-10)
