"""`generate()` from coded rows: what a stock model says whose cached rows lost what coding loses.

The oracle is stock transformers over `StockCodedLayer`, which keeps float64 rows and codes each new
one with the codec, reads it back by `mla.reference`, and never touches it again. New tokens of a
chunk are unquantised to each other where the chunk is expanded, and quantised where it is absorbed,
which is the rule of `mla.plan.should_absorb`.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from helpers import oracle_row, poison_, randn
from torch import Tensor, nn

pytest.importorskip("transformers")

from hf_models import HYBRID, STANDARD, attention, left_padded, tiny_config, tiny_model, tokens
from test_convert_model import grouped_model
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mla.cache import DenseLatentCache
from mla.checks import UnsupportedError
from mla.codec import Codec, Fp8Codec, Int4Codec, Int8Codec
from mla.integrations.converted import convert_model
from mla.integrations.transformers import (
    LatentCache,
    StaticLatentCache,
    StaticLatentLayer,
    attend,
    replace_attention,
)
from mla.integrations.transformers.attend import Sizes
from mla.plan import should_absorb

NEW = 12  # tokens to generate
CODECS: dict[str, Codec] = {
    "fp8": Fp8Codec(group=16),
    "int8": Int8Codec(group=32),
    "int8 rope": Int8Codec(group=16, rope_bits=8),
    "int4": Int4Codec(group=16),
    "int4 plain": Int4Codec(group=32, rotation=False, rope_bits=8),
}
KINDS = ("fp8", "int8", "int4")
C, R = 24, 8  # of the tiny models
TINY: Any = Sizes(C, 12, 10)


class StockCodedLayer(DynamicLayer):
    """transformers' own layer, handing out earlier rows as the codec leaves them."""

    def __init__(self, codec: Codec, sizes: Sizes) -> None:
        super().__init__()
        self.codec, self.sizes = codec, sizes
        self.may_absorb = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any) -> Any:
        past, L = self.get_seq_length(), key_states.shape[2]
        coded = [
            x.double()[:, None].to(key_states.dtype)
            for x in read_back(self.codec, key_states[:, 0], value_states[:, 0])
        ]
        keys, values = super().update(*coded)
        if self.may_absorb and should_absorb(L, past + L, self.sizes):
            return keys, values
        keys, values = keys.clone(), values.clone()
        keys[:, :, past:], values[:, :, past:] = key_states, value_states
        return keys, values


def read_back(codec: Codec, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
    """``[B, L, C]`` and ``[B, L, R]`` float64 of what the oracle reads in coded rows."""
    C, R = latent.shape[-1], k_rope.shape[-1]
    rows = codec.encode(latent, k_rope)
    read = [oracle_row(codec, row, C, R) for row in rows.flatten(0, 1)]
    joint = torch.stack(read).unflatten(0, latent.shape[:2])
    return joint.split([C, R], dim=-1)


def stock_cache(model: nn.Module, codec: Codec) -> DynamicCache:
    """A cache for the stock model whose full-attention layers lose what the codec loses."""
    cache = DynamicCache(config=model.config)
    layer = attention(
        model, 1 if model.config.model_type in ("kimi_linear", "bailing_hybrid") else 0
    )
    layer = layer[0] if isinstance(layer, nn.ModuleList) else layer
    sizes = Sizes(layer.kv_lora_rank, layer.qk_nope_head_dim, layer.v_head_dim)
    cache.layers = [
        StockCodedLayer(codec, sizes) if type(held) is DynamicLayer else held
        for held in cache.layers
    ]
    return cache


@functools.lru_cache
def stock_model(model_type: str) -> nn.Module:
    tiny_config(model_type)  # skips where there is no such model
    return tiny_model(model_type)


@functools.lru_cache
def replaced(model_type: str, name: str) -> nn.Module:
    """A copy with replaced attention that caches rows of `CODECS`; nothing may change it."""
    model = copy.deepcopy(stock_model(model_type))
    assert replace_attention(model, codec=CODECS[name]).replaced
    return model


def generate(model: nn.Module, **options: Any) -> Any:
    torch.manual_seed(5)
    defaults = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(output_logits=True, **defaults | options)


def assert_same(model_type: str, name: str, **options: Any) -> Any:
    """Same tokens and logits as the oracle, at every step; returns our output."""
    stock, ours = stock_model(model_type), replaced(model_type, name)
    cache = stock_cache(stock, CODECS[name])
    stock_options = {k: v for k, v in options.items() if k != "cache_implementation"}
    expected = generate(stock, past_key_values=cache, **copy.deepcopy(stock_options))
    got = generate(ours, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert got.sequences.unique().numel() > 8, "the continuation is too dull to tell models apart"
    for ours_step, stock_step in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours_step, stock_step, rtol=1e-6, atol=1e-6)
    return got


@pytest.mark.parametrize("name", CODECS)
def test_greedy_from_every_codec(name: str) -> None:
    cache = assert_same("deepseek_v3", name, input_ids=tokens(2, 7)).past_key_values
    assert isinstance(cache, LatentCache)
    for layer in cache.layers:
        assert layer.rows.dtype == torch.uint8 and layer.get_seq_length() == 7 + NEW - 1


@pytest.mark.parametrize("model_type", STANDARD + HYBRID)
def test_greedy_of_every_class(model_type: str) -> None:
    assert_same(model_type, "int8", **left_padded([3, 9, 6]))


@pytest.mark.parametrize("name", KINDS)
def test_codes_change_what_the_model_says(name: str) -> None:
    """Guards the tests here: rows that were never coded would pass none of them."""
    plain = generate(stock_model("deepseek_v3"), input_ids=tokens(2, 7)).logits[-1]
    coded = generate(replaced("deepseek_v3", name), input_ids=tokens(2, 7)).logits[-1]
    assert (plain - coded).abs().max() > 1e-4


@pytest.mark.parametrize("name", KINDS)
def test_left_padded_batch(name: str) -> None:
    assert_same("deepseek_v3", name, **left_padded([3, 9, 1, 6]))


@pytest.mark.parametrize("name", KINDS)
def test_static_cache(name: str) -> None:
    batch = left_padded([3, 9, 6])
    output = assert_same("deepseek_v3", name, **batch, cache_implementation="static")
    cache = output.past_key_values
    assert all(type(layer) is StaticLatentLayer for layer in cache.layers)
    assert all(layer.rows.dtype == torch.uint8 for layer in cache.layers)


@pytest.mark.parametrize("name", KINDS)
def test_beams(name: str) -> None:
    assert_same("deepseek_v3", name, **left_padded([4, 8]), num_beams=3, num_return_sequences=2)


@pytest.mark.parametrize("chunk", [1, 4, 13])
@pytest.mark.parametrize("name", KINDS)
def test_chunked_prefill(name: str, chunk: int) -> None:
    """Chunks of 1 and 4 are absorbed, those of 13 expanded together with what is stored."""
    assert should_absorb(chunk, 26, TINY) == (chunk < 13)
    assert_same("deepseek_v3", name, **left_padded([2, 31, 7]), prefill_chunk_size=chunk)


@pytest.mark.parametrize("chunk", [4, 13])
def test_chunked_prefill_into_a_static_cache(chunk: int) -> None:
    batch = left_padded([2, 31, 7]) | {"prefill_chunk_size": chunk}
    assert_same("deepseek_v3", "int4", **batch, cache_implementation="static")


def test_prompt_lookup_crops_rejected_tokens() -> None:
    ids = tokens(1, 5).repeat(1, 4)
    options = {"prompt_lookup_num_tokens": 4, "max_new_tokens": 30}
    assert_same("deepseek_v3", "int8", input_ids=ids, **options)


def test_assisted_decoding() -> None:
    assistant = tiny_model("deepseek_v3")
    with torch.no_grad():
        assistant.lm_head.weight[:20] += 0.3
    assert_same("deepseek_v3", "int4", input_ids=tokens(1, 8), assistant_model=assistant)


@pytest.mark.parametrize("removed", [1, 4])
def test_crop_then_go_on(removed: int) -> None:
    stock, ours = stock_model("deepseek_v3"), replaced("deepseek_v3", "int4")
    logits = []
    for model, cache in (
        (stock, stock_cache(stock, CODECS["int4"])),
        (ours, LatentCache(ours.config, codec=CODECS["int4"])),
    ):
        with torch.no_grad():
            model(tokens(2, 9), past_key_values=cache)
            cache.crop(-removed)
            logits.append(model(tokens(2, 3, seed=1), past_key_values=cache).logits)
    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-9)


def test_rows_with_holes_in_their_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under any other mask every step expands: a new token is unquantised to itself."""
    monkeypatch.setitem(globals(), "should_absorb", lambda *sizes: False)  # of the oracle
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 3] = mask[1, 5] = 0
    for options in ({}, {"prefill_chunk_size": 4}):
        batch = {"input_ids": tokens(2, 9), "attention_mask": mask} | options
        assert_same("deepseek_v3", "int8", **batch)
        static = batch | {"cache_implementation": "static"}
        assert_same("deepseek_v3", "int4", **static)


def test_a_cache_goes_on_over_turns() -> None:
    sequences = []
    stock, ours = stock_model("deepseek_v3"), replaced("deepseek_v3", "fp8")
    for model, cache in (
        (stock, stock_cache(stock, CODECS["fp8"])),
        (ours, LatentCache(ours.config, codec=CODECS["fp8"])),
    ):
        first = generate(model, input_ids=tokens(2, 6), past_key_values=cache).sequences
        ids = torch.cat((first, tokens(2, 5, seed=1)), dim=1)
        sequences.append(generate(model, input_ids=ids, past_key_values=cache).sequences)
    assert torch.equal(*sequences)


def test_the_cache_says_how_its_rows_are_read() -> None:
    """A model replaced with one codec reads a cache of another, and a plain one, as they are."""
    fp8, int8 = replaced("deepseek_v3", "fp8"), replaced("deepseek_v3", "int8")
    expected = generate(int8, input_ids=tokens(2, 7)).logits
    cache = LatentCache(fp8.config, codec=CODECS["int8"])
    got = generate(fp8, input_ids=tokens(2, 7), past_key_values=cache).logits
    assert torch.equal(torch.stack(got), torch.stack(expected))
    plain = generate(stock_model("deepseek_v3"), input_ids=tokens(2, 7))
    chosen = generate(fp8, input_ids=tokens(2, 7), past_key_values=DynamicCache(config=fp8.config))
    assert torch.equal(chosen.sequences, plain.sequences)


@torch.no_grad()
def test_unfilled_rows_may_hold_anything() -> None:
    ours = replaced("deepseek_v3", "int8")
    logits = []
    for poison in (False, True):
        cache = StaticLatentCache(ours.config, 16, codec=CODECS["int8"])
        batch = left_padded([3, 9])
        ours(**batch, past_key_values=cache)
        for layer in cache.layers:
            if poison:
                poison_(layer.rows[:, 9:])
                poison_(layer.rows[0, :6])
        mask = torch.cat((batch["attention_mask"], torch.ones(2, 2, dtype=torch.long)), dim=1)
        inputs = {"input_ids": tokens(2, 2, seed=1), "attention_mask": mask}
        logits.append(ours(**inputs, past_key_values=cache).logits)
    assert torch.isfinite(logits[1]).all() and torch.equal(*logits)


def test_decoding_is_absorbed_from_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode steps hand the op the rows of the cache where they lie, and nothing is decoded."""
    seen: list[Any] = []
    real = attend.mla_decode

    def spy(q_latent: Tensor, q_rope: Tensor, view: Any, **options: Any) -> Any:
        seen.append(view)
        return real(q_latent, q_rope, view, **options)

    monkeypatch.setattr(attend, "mla_decode", spy)
    monkeypatch.setattr(attend, "mla_gather", None)
    monkeypatch.setattr(attend, "_attend_masked", None)
    output = generate(replaced("deepseek_v3", "int4"), **left_padded([3, 9]))
    assert len(seen) == 2 * (NEW - 1)
    rows = [layer.rows for layer in output.past_key_values.layers]
    for view, held in zip(seen[-2:], rows, strict=True):
        assert view.rows.dtype == torch.uint8 and view.rows.data_ptr() == held.data_ptr()


def test_a_gradient_through_coded_rows_is_refused() -> None:
    ours = copy.deepcopy(replaced("deepseek_v3", "int8"))
    for cache in (
        LatentCache(ours.config, codec=Int8Codec()),
        StaticLatentCache(ours.config, 9, codec=Int8Codec()),
    ):
        with pytest.raises(UnsupportedError, match=r"requires_grad=True, .*torch.no_grad\(\)"):
            ours(tokens(1, 3), past_key_values=cache)
        assert cache.nbytes == 0 and int(cache.get_seq_length()) == 0
    loss = ours(tokens(1, 3), labels=tokens(1, 3), use_cache=False).loss
    loss.backward()
    assert attention(ours).kv_b_proj.weight.grad.abs().max() > 0


def test_queries_alone_may_be_trained_against_coded_rows() -> None:
    """With frozen latents the cached tokens are constants, and the gradient is that of stock."""
    stock, ours = (
        copy.deepcopy(x) for x in (stock_model("deepseek_v3"), replaced("deepseek_v3", "int8"))
    )
    grads = []
    for model, cache in (
        (stock, stock_cache(stock, CODECS["int8"])),
        (ours, LatentCache(ours.config, codec=CODECS["int8"])),
    ):
        model.requires_grad_(False)
        weight = attention(model, 1).q_b_proj.weight
        with torch.no_grad():
            model(tokens(2, 6), past_key_values=cache)
        cache.layers[1].may_absorb = False  # of the oracle: where autograd records, keys expand
        weight.requires_grad_(True)
        model(tokens(2, 6, seed=1), past_key_values=cache).logits.square().sum().backward()
        grads.append(weight.grad)
    assert grads[0].abs().max() > 1e-3
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CODECS)
def test_a_layer_says_what_our_own_module_says(name: str) -> None:
    """A converted layer holds a `MultiheadLatentAttention`: the same steps from its own cache."""
    model = convert_model(grouped_model(), tokens(2, 24, seed=1), kv_budget=(8, 24)).model
    replace_attention(model, codec=CODECS[name])
    layer, config = model.model.layers[0].self_attn, model.model.layers[0].self_attn.mla.config
    assert (config.kv_lora_rank, config.qk_rope_head_dim) == (24, 8)
    ours = LatentCache(model.config, codec=CODECS[name])
    causal = torch.empty(2, 1, 1, 0, dtype=torch.int32)  # of `key_run_mask`, without padding
    own = DenseLatentCache(config, batch_size=2, codec=CODECS[name], dtype=torch.float64)
    with torch.no_grad():
        for seed, length in enumerate((6, 1, 1, 3, 40, 1)):
            hidden = randn(2, length, 48, seed=seed, dtype=torch.float64)
            expected = layer.mla(hidden, cache=own)
            got, _ = layer(hidden, attention_mask=causal, past_key_values=ours)
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(ours.layers[0].rows[:, :52], own.view(0).rows[:, :52])


@pytest.mark.cuda
@pytest.mark.parametrize("name", KINDS)
def test_greedy_on_a_gpu(name: str) -> None:
    ours = replaced("deepseek_v3", name)
    expected = generate(ours, **left_padded([3, 9]))
    device = copy.deepcopy(ours).cuda()
    batch = {key: x.cuda() for key, x in left_padded([3, 9]).items()}
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        got = generate(device, **batch, **options)
        assert torch.equal(got.sequences.cpu(), expected.sequences)
