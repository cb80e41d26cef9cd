"""MultiheadLatentAttention refuses bad input by name and leaves the cache as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import SMALL, inputs, make_layer

from mla import CacheFull, DenseLatentCache, MLAConfig, ShapeError, UnsupportedError


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"hidden_states": torch.zeros(2, 3, 21)}, ShapeError, r"hidden_states has shape .*D=20"),
        ({"positions": torch.zeros(4).long()}, ShapeError, r"positions has shape \(4,\).*L=3"),
        ({"positions": torch.zeros(3)}, ShapeError, "positions has dtype torch.float32"),
        ({"attn_mask": torch.ones(2, 3)}, ShapeError, "attn_mask has shape .*bool"),
        ({"attn_mask": torch.ones(2, 4).bool()}, ShapeError, r"attn_mask has shape \(2, 4\)"),
        (
            {"attn_mask": torch.tensor([[1, 0, 1], [1, 1, 1]]).bool()},
            ShapeError,
            "attn_mask has a row with gaps",
        ),
        ({"cu_seqlens": torch.tensor([0, 3]).int()}, UnsupportedError, "cu_seqlens .*batch 2"),
        (
            {
                "hidden_states": torch.zeros(1, 3, 20),
                "cu_seqlens": torch.tensor([0, 2]).int(),
            },
            ShapeError,
            r"cu_seqlens has values \[0, 2\].*3, the number of tokens",
        ),
        (
            {"cache": DenseLatentCache(SMALL, batch_size=5)},
            ShapeError,
            "cache has 5 rows .*expected B=2",
        ),
        (
            {
                "cache": DenseLatentCache(
                    MLAConfig(
                        hidden_size=20,
                        num_attention_heads=3,
                        kv_lora_rank=16,
                        qk_nope_head_dim=10,
                        qk_rope_head_dim=6,
                        v_head_dim=14,
                    ),
                    batch_size=2,
                )
            },
            ShapeError,
            "cache has C=16, R=6 in layer 0, expected C=24, R=6",
        ),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    layer = make_layer(SMALL, 17, torch.float32)
    cache = arguments.get("cache")
    with pytest.raises(error, match=match):
        layer(**{"hidden_states": torch.zeros(2, 3, 20), **arguments})
    assert cache is None or cache.max_length == 0


def test_full_cache_is_left_as_it_was() -> None:
    layer, x = make_layer(SMALL, 18), inputs(1, 9, 18)
    cache = DenseLatentCache(SMALL, batch_size=1, max_length=8, dtype=torch.float64)
    with torch.no_grad():
        layer(x[:, :6], cache=cache)
        held = cache.view(0).rows[:, :6].clone()
        with pytest.raises(CacheFull, match="max_length has value 8, expected at least 9"):
            layer(x[:, 6:], cache=cache)
        assert cache.lengths.tolist() == [6] and torch.equal(cache.view(0).rows[:, :6], held)
        layer(x[:, 6:8], cache=cache)


def test_attention_dropout_in_training_is_refused() -> None:
    config = MLAConfig.from_dict({**SMALL.to_dict(), "attention_dropout": 0.1})
    layer = make_layer(config, 19)
    with pytest.raises(UnsupportedError, match=r"attention_dropout has value 0\.1"):
        layer.train()(inputs(1, 2, 19))
    layer.eval()(inputs(1, 2, 19))


def test_weight_of_other_heads_is_refused() -> None:
    """Half of the rows would pass for heads with smaller values."""
    layer = make_layer(SMALL, 21)
    layer.kv_b_proj.weight = torch.nn.Parameter(layer.kv_b_proj.weight[:36].detach())
    with pytest.raises(ShapeError, match=r"kv_b_proj has 36 rows here, expected H\*\(N\+V\)=72"):
        layer(inputs(1, 2, 21))


def test_left_padding_into_a_filled_cache_is_refused() -> None:
    layer, x = make_layer(SMALL, 20), inputs(2, 3, 20)
    cache = DenseLatentCache(SMALL, batch_size=2, dtype=torch.float64)
    mask = torch.tensor([[True] * 3, [False, True, True]])
    with torch.no_grad():
        layer(x, cache=cache)
        with pytest.raises(UnsupportedError, match="left padding"):
            layer(x, cache=cache, attn_mask=mask)
    assert cache.lengths.tolist() == [3, 3]
