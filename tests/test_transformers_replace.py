"""Replacing attention: what changes, what does not, how it is undone, and what is refused."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from hf_models import (
    HYBRID,
    SPARSE,
    STANDARD,
    assert_equal_logits,
    attention,
    draw_weights_,
    left_padded,
    logits,
    model_from_config,
    tiny_config,
    tiny_model,
)
from hf_models import tokens as random_tokens
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache

from mla.checks import UnsupportedError
from mla.codec import Int8Codec, PlainCodec
from mla.integrations.transformers import (
    LatentCache,
    continuous,
    replace_attention,
    restore_attention,
)
from mla.integrations.transformers.masks import key_run_mask


def fingerprint(model: nn.Module) -> list[Any]:
    """Everything of a model that replacing may touch, by identity."""
    state = [(name, tensor.data_ptr()) for name, tensor in model.state_dict().items()]
    buffers = [(name, id(buffer)) for name, buffer in model.named_buffers()]
    attributes = [(id(module), sorted(vars(module))) for module in model.modules()]
    configs = [id(getattr(module, "config", None)) for module in model.modules()]
    return [state, buffers, attributes, configs, model.config.to_dict()]


# --- what it does, and undoes


@pytest.mark.parametrize("model_type", STANDARD + HYBRID)
def test_restoring_gives_back_exactly_the_stock_model(model_type: str) -> None:
    model = tiny_model(model_type)
    before, stock_implementation = fingerprint(model), model.config._attn_implementation
    report = replace_attention(model)
    layers = {name for name, module in model.named_modules() if hasattr(module, "expand_kv")}
    assert set(report.replaced) == layers and report.left == {}
    state, buffers = fingerprint(model)[:2]
    assert state == before[0] and buffers == before[1]  # nothing added, nothing copied
    restore_attention(model)
    assert fingerprint(model) == before
    assert model.config._attn_implementation == stock_implementation
    cache = model.generate(
        random_tokens(1, 3), max_new_tokens=2, return_dict_in_generate=True
    ).past_key_values
    assert type(cache) is DynamicCache
    restore_attention(model)  # harmless


def test_replacing_twice_is_replacing_once() -> None:
    model, once = tiny_model("deepseek_v3"), tiny_model("deepseek_v3")
    before = fingerprint(model)
    first, _ = replace_attention(model), replace_attention(once)
    assert replace_attention(model, codec=PlainCodec(), impl="torch") == first
    assert_equal_logits(model, once)
    restore_attention(model)
    assert fingerprint(model) == before


def test_the_report_reads_well() -> None:
    assert str(replace_attention(tiny_model("youtu"))) == "replaced attention in 2 MLA layers"
    text = str(replace_attention(tiny_model("deepseek_v32")))
    assert "left model.layers.0.self_attn: its attention is sparse" in text


def test_changes_to_the_config_survive_restoring() -> None:
    model = tiny_model("deepseek_v3")
    replace_attention(model)
    model.resize_token_embeddings(70)
    model.config.use_cache = False
    restore_attention(model)
    assert model.config.vocab_size == 70 and model.config.use_cache is False
    assert model.config is model.model.config is attention(model).config


def test_copies_and_pickles_stay_replaced() -> None:
    model = tiny_model("deepseek_v3")
    replace_attention(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        output = twin.generate(random_tokens(2, 6), max_new_tokens=3, return_dict_in_generate=True)
        assert isinstance(output.past_key_values, LatentCache)
        with torch.no_grad():
            attention(twin).kv_b_proj.weight.zero_()  # its own weights, read at every call
        assert not torch.allclose(logits(twin), logits(model))
        restore_attention(twin)
        assert type(twin._prepare_cache_for_generation.__self__) is type(twin)


def test_saved_folder_reloads_in_stock_transformers(tmp_path: Path) -> None:
    stock = tiny_model("deepseek_v3")
    model = copy.deepcopy(stock)
    replace_attention(model)
    model.save_pretrained(tmp_path)
    assert "mla" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, experts_implementation="eager"
    )
    assert loaded.state_dict().keys() == stock.state_dict().keys()
    assert loaded.config._attn_implementation == "sdpa"
    assert_equal_logits(loaded.eval(), stock)


# --- other models, other settings


def test_two_models_of_one_config_do_not_meet() -> None:
    config = tiny_config("deepseek_v3")
    model, other = model_from_config(config), model_from_config(config, seed=1)
    assert model.config is other.config
    stock = copy.deepcopy(other)
    replace_attention(model)
    assert_equal_logits(other, stock)
    ours = logits(model)
    other.set_attn_implementation("eager")  # writes the config that both were built from
    torch.testing.assert_close(logits(model), ours)
    model.set_attn_implementation("eager")
    other.set_attn_implementation("sdpa")
    assert_equal_logits(other, stock)
    replace_attention(other)
    restore_attention(model)
    assert_equal_logits(other, stock)
    assert_equal_logits(model, model_from_config(config))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_another_implementation_set_afterwards_changes_no_result(implementation: str) -> None:
    """Masks then have other forms; replaced layers still read them right, only slower."""
    model, stock = tiny_model("deepseek_v3"), tiny_model("deepseek_v3")
    replace_attention(model)
    model.set_attn_implementation(implementation)
    batch = left_padded([2, 6])
    seen = batch["attention_mask"].bool()[..., None]
    torch.testing.assert_close(logits(model, **batch) * seen, logits(stock, **batch) * seen)
    replace_attention(model)
    assert model.config._attn_implementation == "mla"
    assert_equal_logits(model, stock, **batch)


def test_masks_that_cannot_be_read_are_refused() -> None:
    model = tiny_model("deepseek_v3")
    replace_attention(model)
    model.config._attn_implementation = "flash_attention_2"  # not installed, so not through set_...
    with pytest.raises(UnsupportedError, match=r"'flash_attention_2', expected one of \('mla'"):
        logits(model)
    replace_attention(model)
    assert_equal_logits(model, tiny_model("deepseek_v3"))


def test_a_model_built_from_a_replaced_models_config_is_stock() -> None:
    model = tiny_model("deepseek_v3")
    replace_attention(model)
    from transformers import DeepseekV3ForCausalLM

    twin = DeepseekV3ForCausalLM(model.config).double().eval()
    twin.load_state_dict(model.state_dict())
    assert twin.config._attn_implementation == "mla"
    assert_equal_logits(twin, model)
    assert_equal_logits(twin, model, **left_padded([2, 6]))
    output = twin.generate(**left_padded([2, 6]), max_new_tokens=5)
    assert torch.equal(output, model.generate(**left_padded([2, 6]), max_new_tokens=5))


def test_the_text_model_inside_a_larger_one() -> None:
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=tiny_config("deepseek_v3"), image_token_index=60
    )
    stock = LlavaForConditionalGeneration._from_config(
        config, attn_implementation="sdpa", experts_implementation="eager"
    )
    stock = stock.double().eval()
    draw_weights_(stock, 0)
    model = copy.deepcopy(stock)
    before = fingerprint(model)
    assert len(replace_attention(model).replaced) == 2
    assert model.config.text_config._attn_implementation == "mla"
    assert model.config.vision_config._attn_implementation == "sdpa"
    ids = random_tokens(2, 9).clamp(max=59)
    ids[:, 1:5] = 60
    options = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 3, 8, 8, dtype=torch.float64),
        "max_new_tokens": 8,
        "return_dict_in_generate": True,
    }
    output = model.generate(**options)
    assert torch.equal(output.sequences, stock.generate(**options).sequences)
    assert isinstance(output.past_key_values, LatentCache)
    restore_attention(model)
    assert fingerprint(model)[3:] == before[3:]  # generate itself sets attributes


# --- what is refused


@pytest.mark.parametrize("model_type", SPARSE)
def test_sparse_models_are_left_with_the_reason(model_type: str) -> None:
    model, stock = tiny_model(model_type), tiny_model(model_type)
    before = fingerprint(model)
    report = replace_attention(model)
    assert report.replaced == () and len(report.left) == 2
    assert any("indexer" in reason for reason in report.left.values())
    assert fingerprint(model) == before
    assert_equal_logits(model, stock)


@pytest.mark.parametrize("name", ["indices", "s_aux", "softcap", "position_bias", "anything_new"])
def test_keywords_that_may_change_the_mathematics_are_refused(name: str) -> None:
    model = tiny_model("deepseek_v3")
    replace_attention(model)
    with pytest.raises(UnsupportedError, match=f"{name} has a value of type"):
        logits(model, **{name: torch.ones(1)})
    logits(model, **{name: None})


def test_attention_weights_are_refused() -> None:
    model = tiny_model("deepseek_v3")
    replace_attention(model)
    query, latent = torch.zeros(1, 4, 1, 20), torch.zeros(1, 1, 3, 24)
    with pytest.raises(UnsupportedError, match="output_attentions"):
        AttentionInterface()["mla"](
            attention(model), query, latent, latent[..., :8], None, output_attentions=True
        )


def test_a_causal_mask_and_is_causal_false_contradict() -> None:
    model = tiny_model("deepseek_v3")
    replace_attention(model)
    query, latent = torch.zeros(1, 4, 3, 20), torch.zeros(1, 1, 3, 24)
    with pytest.raises(UnsupportedError, match="is_causal has value False"):
        AttentionInterface()["mla"](
            attention(model),
            query,
            latent,
            latent[..., :8],
            key_run_mask(1, 3, 3),
            is_causal=False,
        )


def test_a_sliding_window_wider_than_the_keys_is_no_window() -> None:
    model = tiny_model("deepseek_v3")
    replace_attention(model)
    layer = attention(model)
    rows = torch.randn(1, 1, 5, 32, dtype=torch.float64)
    arguments = (
        layer,
        torch.randn(1, 4, 5, 20, dtype=torch.float64),
        rows[..., :24],
        rows[..., 24:],
    )
    attend, mask = AttentionInterface()["mla"], key_run_mask(1, 5, 5)
    with torch.no_grad():
        assert torch.equal(
            attend(*arguments, mask, sliding_window=5)[0], attend(*arguments, mask)[0]
        )
        with pytest.raises(UnsupportedError, match="sliding_window"):
            attend(*arguments, mask, sliding_window=4)


def test_models_without_mla_are_refused() -> None:
    from transformers import LlamaConfig

    llama = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    for model in (model_from_config(llama), nn.Linear(2, 2)):
        with pytest.raises(UnsupportedError, match="without multi-head latent attention"):
            replace_attention(model)


@pytest.mark.parametrize("codec", ["int8", Int8Codec])
def test_what_is_no_codec_is_refused(codec: Any) -> None:
    model = tiny_model("deepseek_v3")
    before = fingerprint(model)
    with pytest.raises(UnsupportedError, match=r"codec has value .*nt8.*, expected None or"):
        replace_attention(model, codec=codec)
    assert fingerprint(model) == before


def test_an_unknown_implementation_is_refused_when_it_runs() -> None:
    model = tiny_model("deepseek_v3")
    replace_attention(model, impl="triton")
    with pytest.raises(UnsupportedError, match="triton"):
        logits(model)


def test_eval_and_train_leave_a_replaced_model_alone() -> None:
    model, stock = tiny_model("deepseek_v3"), tiny_model("deepseek_v3")
    replace_attention(model)
    model.train().eval()
    assert_equal_logits(model, stock)


def test_batching_names_the_transformers_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuous, "POOL_MODULE", "mla.no_such_module")
    model = tiny_model("deepseek_v3")
    replace_attention(model)
    with pytest.raises(UnsupportedError, match=r"transformers has version .*, expected 5\.23 or"):
        model.generate_batch([[5, 6, 7]], max_new_tokens=2)
