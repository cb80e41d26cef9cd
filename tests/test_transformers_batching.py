"""Continuous batching gives each prompt the tokens of generating it alone, in float64."""

from __future__ import annotations

import copy
import functools
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("transformers.generation.continuous_batching.cache_allocators")

from hf_models import STANDARD, tiny_config, tiny_model, tokens
from test_convert_model import grouped_model
from transformers import ContinuousBatchingConfig, GenerationConfig

from mla.checks import UnsupportedError
from mla.codec import Codec, Fp8Codec, Int4Codec, Int8Codec
from mla.integrations.converted import convert_model
from mla.integrations.transformers import paged, replace_attention, restore_attention

NEW = 10  # tokens to generate
LENGTHS = (3, 9, 1, 14, 6)
SMALL = {"page_size": 4, "num_blocks": 64, "max_batch_tokens": 64}
CODECS = {"fp8": Fp8Codec(group=16), "int8": Int8Codec(), "int4": Int4Codec(group=16)}


@pytest.fixture(autouse=True)
def _collect_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers collects garbage twice a session, 0.7 s here."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


@functools.lru_cache
def replaced(model_type: str = "deepseek_v3", codec: Codec | None = None) -> nn.Module:
    """A model with replaced attention; nothing may change it."""
    tiny_config(model_type)  # skips where there is no such model
    model = tiny_model(model_type)
    report = replace_attention(model, codec=codec)
    assert report.replaced and not report.left
    return model


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    return [tokens(1, n, seed=seed + i)[0].tolist() for i, n in enumerate(lengths)]


def alone(model: nn.Module, inputs: list[list[int]], new: int = NEW) -> list[list[int]]:
    """Greedy continuations, one prompt after the other."""
    with torch.no_grad():
        ids = [torch.tensor([prompt]) for prompt in inputs]
        outputs = [model.generate(x, max_new_tokens=new, do_sample=False) for x in ids]
    return [out[0, x.shape[1] :].tolist() for out, x in zip(outputs, ids, strict=True)]


def generation_config(**options: Any) -> GenerationConfig:
    defaults = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    return GenerationConfig(**defaults | options)


def batched(model: nn.Module, inputs: list[list[int]], **options: Any) -> list[list[int]]:
    """Greedy continuations by continuous batching."""
    outputs = model.generate_batch(
        inputs,
        generation_config=generation_config(),
        continuous_batching_config=ContinuousBatchingConfig(**SMALL | options),
    )
    assert [output.error for output in outputs.values()] == [None] * len(inputs)
    return [output.generated_tokens for output in outputs.values()]


@pytest.mark.parametrize("model_type", STANDARD)
def test_ragged_prompts(model_type: str) -> None:
    model, inputs = replaced(model_type), prompts(*LENGTHS)
    expected = alone(model, inputs)
    assert len({token for row in expected for token in row}) > 8, "too dull to tell rows apart"
    assert batched(model, inputs) == expected


def test_log_probabilities() -> None:
    """Of the same tokens: a wrong scale or a leak that no argmax shows."""
    model, inputs = replaced(), prompts(*LENGTHS)
    options = ContinuousBatchingConfig(**SMALL, return_logprobs=True)
    outputs = model.generate_batch(
        inputs, generation_config=generation_config(), continuous_batching_config=options
    )
    for prompt, output in zip(inputs, outputs.values(), strict=True):
        ids = torch.tensor([prompt + output.generated_tokens])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
        # Transformers returns float32 log-probabilities.
        torch.testing.assert_close(torch.tensor(output.logprobs), chosen, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("max_batch_tokens", [5, 8, 11])
def test_chunked_prefill(max_batch_tokens: int) -> None:
    """Prompts longer than a batch, cut where the scheduler likes, beside decoding requests."""
    model, inputs = replaced(), prompts(23, 3, 17, 1, 30)
    assert batched(model, inputs, max_batch_tokens=max_batch_tokens) == alone(model, inputs)


def test_a_converted_model() -> None:
    """Layers of different widths share a pool; each row takes the room of the widest."""
    model = convert_model(grouped_model("llama"), tokens(2, 24, seed=1), kv_budget=0.75).model
    inputs = prompts(*LENGTHS)
    assert batched(model, inputs) == alone(model, inputs)


@pytest.mark.parametrize("name", CODECS)
def test_from_coded_rows(name: str) -> None:
    model, inputs = replaced(codec=CODECS[name]), prompts(*LENGTHS)
    expected = alone(model, inputs)
    assert batched(model, inputs, allow_block_sharing=False) == expected


@pytest.mark.parametrize("codec", [None, *CODECS.values()])
def test_decoding_reads_the_pool_in_place(
    codec: Codec | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every decode step is handed rows of the pool itself, and a token takes one row a layer."""
    model, views, gathered = replaced(codec=codec), [], []
    pools: list[Any] = []
    real_decode, real_hold = paged.mla_decode, paged.PagedLatents.hold_latents_

    def decode(q_latent: Tensor, q_rope: Tensor, view: Any, **options: Any) -> Any:
        views.append(view)
        return real_decode(q_latent, q_rope, view, **options)

    def hold(pool: Any, *arguments: Any) -> None:
        pools.append(pool)
        real_hold(pool, *arguments)

    monkeypatch.setattr(paged, "mla_decode", decode)
    monkeypatch.setattr(paged, "mla_gather", lambda *_, **__: gathered.append(1))
    monkeypatch.setattr(paged.PagedLatents, "hold_latents_", hold)
    batched(model, prompts(*LENGTHS))
    (pool,) = pools
    assert len(views) == 2 * (NEW - 1) and not gathered
    storage = pool.cache_tensor.untyped_storage().data_ptr()
    assert {view.rows.untyped_storage().data_ptr() for view in views} == {storage}
    assert {view.batch_size for view in views} == {len(LENGTHS)}
    (allocator,) = pool.cache_allocators.values()
    row_bytes = (24 + 8) * 8 if codec is None else codec.row_width(24, 8)
    assert allocator.bytes_per_page == SMALL["page_size"] * row_bytes
    assert pool.num_blocks * allocator.bytes_per_block == 64 * 2 * 4 * row_bytes


def test_unused_pages_may_hold_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    real = paged.PagedLatents.hold_latents_

    def hold(pool: Any, *arguments: Any) -> None:
        real(pool, *arguments)
        pool.cache_tensor.fill_(0xFF)  # NaN in float64

    monkeypatch.setattr(paged.PagedLatents, "hold_latents_", hold)
    model, inputs = replaced(), prompts(*LENGTHS, 23)
    assert batched(model, inputs, max_batch_tokens=9) == alone(model, inputs)


def test_a_small_pool_makes_requests_wait() -> None:
    """Requests that do not fit are put off or begun again; nobody's tokens change."""
    model, inputs = replaced(), prompts(7, 12, 3, 9, 15, 5)
    assert batched(model, inputs, num_blocks=9, max_batch_tokens=16) == alone(model, inputs)


def test_requests_join_and_leave() -> None:
    model = replaced()
    first, second = prompts(5, 13, 2), prompts(8, 1, 21, seed=9)
    expected = alone(model, first, 20) + alone(model, second, 7)
    options = {
        "generation_config": generation_config(),
        "continuous_batching_config": ContinuousBatchingConfig(
            **SMALL | {"num_blocks": 400, "max_batch_tokens": 9}
        ),
    }
    with model.continuous_batching_context_manager(**options) as manager:
        ids = manager.add_requests(first, max_new_tokens=20, streaming=True)
        gone = manager.add_request(prompts(6, seed=3)[0], max_new_tokens=1000)
        done: dict[str, list[int]] = {}
        while len(done) < len(first) + len(second):
            result = manager.get_result(timeout=20)
            assert result is not None and result.error is None
            if len(ids) == len(first) and len(result.generated_tokens) == 3:
                ids += manager.add_requests(second, max_new_tokens=7)
                manager.cancel_request(gone)
            if result.is_finished() and result.request_id in ids:
                done[result.request_id] = result.generated_tokens
    assert [done[request] for request in ids] == expected


def test_prefixes_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that begins like an earlier one reads the pages of that one."""
    model, begin = replaced(), prompts(19, seed=4)[0]
    inputs = [begin + tail for tail in ([5, 6], [7], [], [5, 6, 8, 9])]
    expected, found = alone(model, inputs), []
    real = paged.PagedLatents.search_prefix_match

    def search(pool: Any, request_id: str, prompt_ids: list[int]) -> int:
        found.append(real(pool, request_id, prompt_ids))
        return found[-1]

    monkeypatch.setattr(paged.PagedLatents, "search_prefix_match", search)
    options = {
        "generation_config": generation_config(),
        "continuous_batching_config": ContinuousBatchingConfig(**SMALL),
    }
    got = []
    with model.continuous_batching_context_manager(**options) as manager:
        for prompt in inputs:
            request = manager.add_request(prompt)
            result = manager.get_result(request, timeout=10)
            got.append(result.generated_tokens)
    assert got == expected
    assert found[0] == 0 and min(found[1:]) >= 16


def test_several_continuations_of_one_prompt() -> None:
    """Forked requests share full pages and copy the last one."""
    model, inputs = replaced(), prompts(10, 3)
    outputs = model.generate_batch(
        inputs,
        generation_config=generation_config(do_sample=True, top_k=1, num_return_sequences=3),
        continuous_batching_config=ContinuousBatchingConfig(**SMALL),
    )
    got = [output.generated_tokens for output in outputs.values()]
    assert got == [row for row in alone(model, inputs) for _ in range(3)]


def test_a_manager_that_is_kept_goes_on() -> None:
    model = copy.deepcopy(replaced())
    for seed in (0, 1):
        inputs = prompts(4, 11, seed=seed)
        outputs = model.generate_batch(
            inputs,
            generation_config=generation_config(),
            continuous_batching_config=ContinuousBatchingConfig(**SMALL),
            persistent_manager=True,
        )
        assert [x.generated_tokens for x in outputs.values()] == alone(model, inputs)
    restore_attention(model)
    names = ("_cached_continuous_batching_manager", "init_continuous_batching")
    assert not any(name in vars(model) for name in names)


def test_the_config_of_the_model_stays_as_it_is() -> None:
    model = copy.deepcopy(replaced())
    before, eos = model.config.to_dict(), model.generation_config.eos_token_id
    model.generate_batch(
        prompts(4, 2),
        max_new_tokens=3,
        continuous_batching_config=ContinuousBatchingConfig(**SMALL),
    )
    assert model.config.to_dict() == before and model.generation_config.eos_token_id == eos
    assert model.config._attn_implementation == "mla"


ODD = {"kv_lora_rank": 25}


def test_rows_of_odd_width_have_no_halves() -> None:
    model = tiny_model("deepseek_v3", **ODD)
    replace_attention(model)
    with pytest.raises(UnsupportedError, match=r"rows have width C\+R=33, expected an even number"):
        model.generate_batch(prompts(3), max_new_tokens=2)
    replace_attention(model, codec=Int8Codec())
    inputs = prompts(3, 8)
    assert batched(model, inputs, allow_block_sharing=False) == alone(model, inputs)


@pytest.mark.parametrize(
    ("model_type", "fact"),
    [
        ("kimi_linear", r"model has 1 replaced layers and layer types \['full_attention', 'linear"),
        ("dots3_note_text", r"replaced layers and layer types \['full_attention', 'sliding"),
    ],
)
def test_other_layers_are_refused(model_type: str, fact: str) -> None:
    with pytest.raises(UnsupportedError, match=fact):
        replaced(model_type).generate_batch(prompts(3), max_new_tokens=2)


def test_recorded_steps_are_refused() -> None:
    config = ContinuousBatchingConfig(**SMALL, default_compile_level=1)
    with pytest.raises(UnsupportedError, match="asks for compilation, expected neither"):
        replaced().generate_batch(prompts(3), continuous_batching_config=config)


def test_another_layout_of_pages_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = paged.PagedLatents.hold_latents_
    monkeypatch.setattr(paged.PagedLatents, "hold_latents_", lambda *x: real(*x[:2], x[2] + 2))
    fact = r"blocks of transformers .* have \(1024, 2048\) bytes, expected \(1032, 2064\)"
    with pytest.raises(UnsupportedError, match=fact):
        batched(replaced(), prompts(3))


def test_keywords_that_may_change_the_mathematics_are_refused() -> None:
    pool = object.__new__(paged.PagedLatents)
    with pytest.raises(UnsupportedError, match="s_aux has a value of type Tensor"), torch.no_grad():
        replaced()(tokens(1, 3), use_cache=False, cache=pool, s_aux=torch.zeros(4))


@pytest.mark.cuda
@pytest.mark.parametrize("codec", [None, *CODECS.values()])
@pytest.mark.parametrize("use_async_batching", [False, True])
def test_ragged_prompts_on_a_gpu(codec: Codec | None, use_async_batching: bool) -> None:
    model, inputs = replaced(codec=codec), prompts(*LENGTHS)
    options = {"use_async_batching": use_async_batching, "allow_block_sharing": False}
    assert batched(copy.deepcopy(model).cuda(), inputs, **options) == alone(model, inputs)
