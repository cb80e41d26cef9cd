"""Models with replaced attention give the tokens of stock transformers, in float64."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from hf_models import HYBRID, STANDARD, left_padded, tiny_config, tiny_model, tokens
from transformers import DynamicCache, StaticCache

from mla.integrations.transformers import (
    LatentCache,
    LatentCacheLayer,
    attend,
    replace_attention,
)

DEEPSEEK = ("deepseek_v3",)
NEW = 16  # tokens to generate


@functools.lru_cache
def pair(model_type: str, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """The stock model and a copy with replaced attention; nothing may change them."""
    tiny_config(model_type)  # skips where there is no such model
    stock = tiny_model(model_type, seed=seed)
    ours = copy.deepcopy(stock)
    report = replace_attention(ours)
    assert report.replaced and not report.left
    return stock, ours


def generate(model: nn.Module, **options: Any) -> Any:
    torch.manual_seed(5)
    defaults = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(output_logits=True, **defaults | options)


def assert_same(model_type: str, **options: Any) -> Any:
    """Same tokens and, to float64 rounding, same logits at every step; returns our output."""
    stock, ours = pair(model_type)
    expected, got = generate(stock, **copy.deepcopy(options)), generate(ours, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert got.sequences.unique().numel() > 8, "the continuation is too dull to tell models apart"
    for ours_step, stock_step in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours_step, stock_step, rtol=1e-7, atol=1e-7)
    return got


@pytest.mark.parametrize("model_type", STANDARD + HYBRID)
def test_greedy_uses_a_latent_cache(model_type: str) -> None:
    output = assert_same(model_type, input_ids=tokens(2, 7))
    cache = output.past_key_values
    assert isinstance(cache, LatentCache)
    latent = [layer for layer in cache.layers if isinstance(layer, LatentCacheLayer)]
    assert latent and all(layer.get_seq_length() == 7 + NEW - 1 for layer in latent)


def test_decoding_is_absorbed_and_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode steps read the rows of the cache where they lie, and no step expands it."""
    calls: list[str] = []

    def spy(name: str) -> None:
        real = getattr(attend, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            result = real(*args, **kwargs)
            is_copy = name == "joint_rows" and result.data_ptr() != args[0].data_ptr()
            calls.append("copy" if is_copy else name)
            return result

        monkeypatch.setattr(attend, name, called)

    for name in ("mla_decode", "mla_prefill", "joint_rows", "_attend_masked"):
        spy(name)
    generate(pair("deepseek_v3")[1], **left_padded([3, 9]))
    steps = 2 * (NEW - 1)  # in two layers
    assert sorted(calls) == ["joint_rows"] * steps + ["mla_decode"] * steps + ["mla_prefill"] * 2


@pytest.mark.parametrize("model_type", STANDARD + HYBRID)
def test_left_padded_batch(model_type: str) -> None:
    assert_same(model_type, **left_padded([3, 9, 1, 6]))


@pytest.mark.parametrize("model_type", STANDARD)
def test_static_cache(model_type: str) -> None:
    assert_same(model_type, **left_padded([3, 9, 6]), cache_implementation="static")


@pytest.mark.parametrize("model_type", DEEPSEEK + HYBRID)
def test_beams(model_type: str) -> None:
    assert_same(model_type, **left_padded([4, 8]), num_beams=3, num_return_sequences=2)


@pytest.mark.parametrize("model_type", DEEPSEEK + HYBRID)
def test_sampling_with_several_returns(model_type: str) -> None:
    options = {"do_sample": True, "num_return_sequences": 3, "top_k": 20, "temperature": 1.5}
    assert_same(model_type, **left_padded([4, 8]), **options)


def test_sampled_beams() -> None:
    assert_same("deepseek_v3", input_ids=tokens(2, 6), do_sample=True, num_beams=2)


@pytest.mark.parametrize("chunk", [1, 3, 4])
def test_chunked_prefill(chunk: int) -> None:
    assert_same("deepseek_v3", input_ids=tokens(2, 11), prefill_chunk_size=chunk)


@pytest.mark.parametrize("cache_implementation", [None, "static"])
def test_chunked_prefill_of_a_padded_batch(cache_implementation: str | None) -> None:
    options = {"prefill_chunk_size": 4, "cache_implementation": cache_implementation}
    assert_same("deepseek_v3", **left_padded([2, 11, 7]), **options)


def test_assisted_decoding() -> None:
    # The assistant shares most weights, so that some candidates are accepted and some are not.
    assistant = tiny_model("deepseek_v3")
    with torch.no_grad():
        assistant.lm_head.weight[:20] += 0.3
    options = {"input_ids": tokens(1, 8), "assistant_model": assistant}
    assert_same("deepseek_v3", **options)
    replace_attention(assistant)
    assert_same("deepseek_v3", **options)


def test_prompt_lookup() -> None:
    ids = tokens(1, 5).repeat(1, 4)
    assert_same("deepseek_v3", input_ids=ids, prompt_lookup_num_tokens=4, max_new_tokens=30)


def test_without_a_cache() -> None:
    assert_same("deepseek_v3", **left_padded([3, 9, 6]), use_cache=False)


def test_input_embeddings() -> None:
    stock, _ = pair("deepseek_v3")
    assert_same("deepseek_v3", inputs_embeds=stock.get_input_embeddings()(tokens(2, 7)).detach())


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_the_callers_choice_of_cache_is_kept(implementation: str) -> None:
    output = assert_same("deepseek_v3", input_ids=tokens(2, 7), cache_implementation=implementation)
    assert type(output.past_key_values) in (DynamicCache, StaticCache)


@pytest.mark.parametrize("kind", [LatentCache, DynamicCache])
def test_a_cache_goes_on_over_turns(kind: type) -> None:
    """A second call with the cache of the first: several new queries over cached tokens."""
    sequences = []
    for model in pair("deepseek_v3"):
        cache = kind(config=model.config)
        first = generate(model, input_ids=tokens(2, 6), past_key_values=cache).sequences
        ids = torch.cat((first, tokens(2, 5, seed=1)), dim=1)
        sequences.append(generate(model, input_ids=ids, past_key_values=cache).sequences)
    assert torch.equal(*sequences)


@pytest.mark.parametrize("kind", [LatentCache, DynamicCache])
@pytest.mark.parametrize("removed", [1, 4])
def test_crop_then_go_on(kind: type, removed: int) -> None:
    logits = []
    for model in pair("deepseek_v3"):
        cache = kind(config=model.config)
        with torch.no_grad():
            model(tokens(2, 9), past_key_values=cache)
            cache.crop(-removed)
            logits.append(model(tokens(2, 3, seed=1), past_key_values=cache).logits)
    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-9)


def test_rows_of_a_cache_can_be_repeated_and_chosen() -> None:
    """A shared prompt is read once, then continued by several rows."""
    logits = []
    for model in pair("deepseek_v3"):
        cache = LatentCache(model.config)
        with torch.no_grad():
            model(tokens(2, 5), past_key_values=cache)
            cache.batch_repeat_interleave(3)
            cache.batch_select_indices(torch.tensor([5, 0, 2, 3]))
            logits.append(model(tokens(4, 2, seed=1), past_key_values=cache).logits)
    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-9)
