"""Cache layers of coded rows: their bytes, what they hand out, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_within_budget, randn

pytest.importorskip("transformers")

from hf_models import tokens
from test_transformers_codecs import CODECS, KINDS, C, R, read_back, replaced

from mla.checks import ShapeError
from mla.codec import Int4Codec, Int8Codec
from mla.integrations.transformers import (
    LatentCache,
    LatentCacheLayer,
    StaticLatentCache,
    StaticLatentLayer,
)


@pytest.mark.parametrize("name", CODECS)
def test_bytes_held_are_those_of_the_codec(name: str) -> None:
    codec, width = CODECS[name], CODECS[name].row_width(C, R)
    ours = replaced("deepseek_v3", name)
    cache = StaticLatentCache(ours.config, 32, codec=codec)
    with torch.no_grad():
        ours(tokens(3, 5), past_key_values=cache)
    assert cache.nbytes == 2 * 3 * 32 * width
    dynamic = LatentCache(ours.config, codec=codec)
    with torch.no_grad():
        ours(tokens(3, 5), past_key_values=dynamic)
    assert dynamic.nbytes == 2 * 3 * 5 * width


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_rows_are_coded_once(name: str) -> None:
    """Bytes of a token never change again, whatever happens to the batch."""
    layer, codec = LatentCacheLayer(CODECS[name]), CODECS[name]
    states = [randn(2, 1, n, C + R, seed=n).split([C, R], dim=-1) for n in (4, 1, 1, 1, 2)]
    for latent, k_rope in states:
        layer.update(latent, k_rope)
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.batch_repeat_interleave(2)
    layer.crop(-1)
    latent, k_rope = (torch.cat(parts, dim=2)[:, 0, :8] for parts in zip(*states, strict=True))
    expected = codec.encode(latent, k_rope)[torch.tensor([1, 1, 0, 0])]
    assert torch.equal(layer.rows[:, :8], expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "layer", [LatentCacheLayer(Int4Codec()), StaticLatentLayer(9, Int4Codec())]
)
def test_keys_and_values_are_the_decoded_rows(layer: Any) -> None:
    latent, k_rope = randn(2, 1, 5, C, seed=0), randn(2, 1, 5, R, seed=1)
    assert layer.keys is None and layer.values is None and layer.nbytes == 0
    layer.update(latent, k_rope)
    expected = read_back(layer.codec, latent[:, 0], k_rope[:, 0])
    assert_within_budget(layer.keys[:, 0, :5], expected[0], expected[0].float(), "latent")
    assert_within_budget(layer.values[:, 0, :5], expected[1], expected[1].float(), "k_rope")
    assert layer.keys.shape[2] == layer.values.shape[2] == layer.rows.shape[1]
    assert (layer.keys[:, :, 5:] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize(
    "layer", [LatentCacheLayer(Int8Codec()), StaticLatentLayer(8, Int8Codec())]
)
def test_wrong_shapes_raise_and_change_nothing(layer: Any) -> None:
    layer.update(torch.ones(2, 1, 3, C), torch.ones(2, 1, 3, R))
    before = layer.rows.clone()
    for wrong in (
        (torch.zeros(2, 1, 1, C + R), torch.zeros(2, 1, 1, 0)),
        (torch.zeros(1, 1, 1, C), torch.zeros(1, 1, 1, R)),
    ):
        with pytest.raises(ShapeError, match="key_states has shape"):
            layer.update(*wrong)
    assert torch.equal(layer.rows, before) and int(layer.get_seq_length()) == 3


@torch.no_grad()
def test_a_static_layer_can_be_used_again() -> None:
    layer = StaticLatentLayer(6, Int8Codec())
    layer.update(torch.ones(2, 1, 6, C), torch.ones(2, 1, 6, R))
    address = layer.rows.data_ptr()
    layer.reset()
    assert int(layer.get_seq_length()) == 0 and (layer.rows == 0).all()
    layer.update(torch.ones(2, 1, 2, C), torch.ones(2, 1, 2, R))
    assert layer.rows.data_ptr() == address and (layer.keys[:, :, 2:] == 0).all()


@torch.no_grad()
def test_rows_from_inference_mode_can_be_extended_outside() -> None:
    layer = LatentCacheLayer(Int8Codec())
    with torch.inference_mode():
        layer.update(torch.ones(2, 1, 3, C), torch.ones(2, 1, 3, R))
    layer.update(torch.ones(2, 1, 1, C), torch.ones(2, 1, 1, R))
    assert layer.keys.shape == (2, 1, 4, C)
    torch.testing.assert_close(layer.keys, torch.ones(2, 1, 4, C))
