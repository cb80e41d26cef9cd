"""`coded_rows`: a converted model attends to what a coded cache would give back."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_within_budget
from hf_models import tokens

from mla import DenseLatentCache, Fp8Codec, Int4Codec, Int8Codec, PlainCodec
from mla.checks import UnsupportedError
from mla.convert import token_losses

transformers = pytest.importorskip("transformers")

from test_convert_model import grouped_model  # noqa: E402

from mla.integrations.converted import coded_rows, convert_model  # noqa: E402

CODECS = [PlainCodec(), Fp8Codec(), Int8Codec(rope_bits=8), Int4Codec(group=16)]


def converted_model():
    return convert_model(grouped_model(), tokens(2, 24, seed=1), kv_budget=0.9).model


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.spec)
def test_attention_is_that_of_the_coded_cache(codec):
    """The last token's attention against a layer that decodes the same rows from a coded cache."""
    model = converted_model()
    attention = model.base_model.layers[0].self_attn
    layer, T = attention.mla, 9
    torch.manual_seed(3)
    x = torch.randn(1, T, layer.config.hidden_size, dtype=torch.float64)
    cache = DenseLatentCache(layer.config, batch_size=1, codec=codec, dtype=torch.float64)
    with torch.no_grad(), coded_rows(model, codec):
        cache.reserve(T - 1)
        cache.append(0, *layer.latents(x[:, :-1], torch.arange(T - 1)))
        expected = layer(x[:, -1:], cache=cache)
        found, _ = attention(x, position_ids=torch.arange(T)[None])
    assert_within_budget(found[:, -1:], expected, expected, codec.spec)


def test_losses_change_and_the_model_stays_as_it_was():
    model, windows = converted_model(), tokens(2, 24, seed=2)
    plain = token_losses(model, windows)
    with coded_rows(model, PlainCodec()):
        assert torch.equal(token_losses(model, windows), plain)
    with coded_rows(model, Int4Codec(group=16)):
        coded = token_losses(model, windows)
    assert (coded - plain).abs().max() > 0
    with pytest.raises(RuntimeError, match="inside"), coded_rows(model, Int4Codec()):
        raise RuntimeError("inside")
    assert torch.equal(token_losses(model, windows), plain)


def test_a_model_without_converted_layers_is_refused():
    model = grouped_model()
    message = "model has type LlamaForCausalLM without"
    with pytest.raises(UnsupportedError, match=message), coded_rows(model, Int8Codec()):
        pass
