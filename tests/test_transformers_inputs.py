"""What reaches replaced layers: any mask, gradients, dropout, adapters and quantised weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from helpers import assert_within_budget
from hf_models import assert_equal_logits, attention, left_padded, logits, tiny_model
from hf_models import tokens as random_tokens

from mla.checks import UnsupportedError
from mla.integrations.transformers import replace_attention

# --- masks that are no runs of keys


def test_packed_sequences() -> None:
    model, stock = tiny_model("deepseek_v3"), tiny_model("deepseek_v3")
    replace_attention(model)
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]])
    assert_equal_logits(model, stock, position_ids=positions)
    alone = logits(model, input_ids=random_tokens(2, 6)[:1, 3:5])
    packed = logits(model, position_ids=positions)[:1, 3:5]
    torch.testing.assert_close(packed, alone)


def test_boundaries_of_packed_sequences_need_a_mask_that_has_them() -> None:
    model = tiny_model("deepseek_v3")
    replace_attention(model)
    boundaries = {"cu_seq_lens_q": torch.tensor([0, 3, 6]), "max_length_q": 3}
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    ids = random_tokens(1, 6)
    expected = logits(model, input_ids=ids, position_ids=positions)
    got = logits(model, input_ids=ids, position_ids=positions, **boundaries)
    torch.testing.assert_close(got, expected)
    with pytest.raises(UnsupportedError, match="cu_seq_lens_q"):
        logits(model, input_ids=ids, **boundaries)


@pytest.mark.parametrize("additive", [False, True])
def test_custom_4d_masks(additive: bool) -> None:
    model, stock = tiny_model("deepseek_v3"), tiny_model("deepseek_v3")
    replace_attention(model)
    mask = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    mask |= torch.eye(6, dtype=torch.bool)
    if additive:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -1e30)
    assert_equal_logits(model, stock, attention_mask=mask)


def test_holes_in_a_padding_mask() -> None:
    model, stock = tiny_model("deepseek_v3"), tiny_model("deepseek_v3")
    replace_attention(model)
    mask = torch.tensor([[1, 1, 0, 1, 1, 1], [1, 0, 0, 0, 1, 1]])
    assert_equal_logits(model, stock, attention_mask=mask)


def test_right_padding_changes_no_real_token() -> None:
    model, stock = tiny_model("deepseek_v3"), tiny_model("deepseek_v3")
    replace_attention(model)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    ours, expected = logits(model, attention_mask=mask), logits(stock, attention_mask=mask)
    seen = mask.bool()[..., None]
    torch.testing.assert_close(ours * seen, expected * seen, rtol=1e-9, atol=1e-9)


def test_bidirectional_attention() -> None:
    model, stock = tiny_model("deepseek_v3"), tiny_model("deepseek_v3")
    replace_attention(model)
    assert_equal_logits(model, stock, is_causal=False)
    model.config.is_causal = stock.config.is_causal = False
    assert_equal_logits(model, stock)
    assert_equal_logits(model, stock, **left_padded([2, 6]))


def test_poisoned_slots_of_a_static_cache_stay_unseen() -> None:
    """Also on the way through a boolean mask, where stock attention gives NaN."""
    from transformers import StaticCache

    model, stock = tiny_model("deepseek_v3"), tiny_model("deepseek_v3")
    replace_attention(model)
    cache = StaticCache(model.config, 12)
    logits(model, past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        layer.keys[:, :, 6:] = layer.values[:, :, 6:] = float("nan")
    more = random_tokens(2, 3, seed=1)
    full = torch.cat((random_tokens(2, 6), more), dim=1)
    expected = logits(stock, input_ids=full)[:, 6:]
    for mask in (None, torch.arange(12).le(torch.tensor([[6], [7], [8]])).expand(2, 1, 3, 12)):
        got = logits(
            model,
            input_ids=more,
            attention_mask=mask,
            position_ids=torch.arange(6, 9)[None],
            past_key_values=copy.deepcopy(cache),
            use_cache=True,
        )
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


# --- training


def test_gradients_equal_those_of_the_stock_model() -> None:
    grads = []
    for replaced in (False, True):
        model = tiny_model("deepseek_v3").train()
        if replaced:
            replace_attention(model)
            model.gradient_checkpointing_enable({"use_reentrant": False})
        batch = left_padded([4, 6])
        model(**batch, labels=batch["input_ids"]).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-8, atol=1e-10, msg=name)


def test_attention_dropout_in_training_only() -> None:
    models = [tiny_model("deepseek_v3", attention_dropout=0.4) for _ in range(2)]
    replace_attention(models[0])
    assert_equal_logits(*models)
    outputs = []
    for model in models:
        torch.manual_seed(0)
        # Stock attention forms the same mask, or takes another kernel that draws otherwise.
        mask = torch.ones(2, 1, 6, 6).tril().bool()
        outputs.append(logits(model.train(), attention_mask=mask))
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
    model = models[0].eval()
    assert not torch.allclose(outputs[0], logits(model))
    assert_equal_logits(model, models[1].eval())


def test_weights_are_read_at_every_call() -> None:
    model, stock = tiny_model("deepseek_v3"), tiny_model("deepseek_v3")
    replace_attention(model)
    logits(model)
    other = tiny_model("deepseek_v3", seed=7).state_dict()
    model.load_state_dict(other)
    stock.load_state_dict(other)
    assert_equal_logits(model, stock)
    options = {"max_new_tokens": 5, "do_sample": False}
    ids = random_tokens(2, 6)
    assert torch.equal(model.generate(ids, **options), stock.generate(ids, **options))


DENSE = {"first_k_dense_replace": 2}  # a router would turn rounding into other experts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_loses_no_more_than_the_stock_model(dtype: torch.dtype) -> None:
    exact = tiny_model("deepseek_v3", **DENSE)
    stock = tiny_model("deepseek_v3", dtype=dtype, **DENSE)
    model = copy.deepcopy(stock)
    replace_attention(model)
    batch = left_padded([4, 9])
    seen = batch["attention_mask"].bool()[..., None]
    oracle, ours, eager = (logits(m, **batch) * seen for m in (exact, model, stock))
    assert_within_budget(ours, oracle, eager, "logits")
    assert model.generate(**batch, max_new_tokens=4).shape == (2, 13)


def test_autocast() -> None:
    """Norms stay in float32 there, so latents, keys and queries come in mixed dtypes."""
    exact = tiny_model("deepseek_v3", **DENSE)
    stock = tiny_model("deepseek_v3", dtype=torch.float32, **DENSE)
    model = copy.deepcopy(stock)
    replace_attention(model)
    batch = left_padded([4, 9])
    seen = batch["attention_mask"].bool()[..., None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, eager = logits(model, **batch), logits(stock, **batch)
        assert_within_budget(ours * seen, logits(exact, **batch) * seen, eager * seen, "logits")
        assert model.generate(**batch, max_new_tokens=4).shape == (2, 13)
        model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in attention(model).parameters())


# --- adapters and quantised layers


@pytest.mark.parametrize("wrap_first", [True, False])
def test_lora_on_kv_b_proj(wrap_first: bool) -> None:
    peft = pytest.importorskip("peft")
    models = [tiny_model("deepseek_v3"), tiny_model("deepseek_v3")]
    if not wrap_first:
        replace_attention(models[0])
    lora = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["kv_b_proj"], lora_dropout=0.0)
    models = [peft.get_peft_model(model, lora) for model in models]
    if wrap_first:
        assert len(replace_attention(models[0]).replaced) == 2
    for model in models:
        rng = torch.Generator().manual_seed(2)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
                parameter.data = noise
    ids = random_tokens(2, 6)

    def check() -> None:
        assert_equal_logits(*models)
        tokens = [m.generate(input_ids=ids, max_new_tokens=8, do_sample=False) for m in models]
        assert torch.equal(*tokens)

    adapted = logits(models[0])
    check()
    for model in models:
        model.base_model.disable_adapter_layers()
    assert not torch.allclose(logits(models[0]), adapted)
    check()
    for model in models:
        model.base_model.enable_adapter_layers()
        model.merge_adapter()
    check()
    grads = []
    for model in models:
        model.unmerge_adapter()
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-10)


def test_lora_dropout_in_training_runs_the_adapter_itself() -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(
        r=2, target_modules=["kv_b_proj"], lora_dropout=0.5, init_lora_weights=False
    )
    outputs = []
    for replaced in (False, True):
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_model("deepseek_v3"), lora).double().train()
        if replaced:
            replace_attention(model)
        torch.manual_seed(1)
        outputs.append(logits(model))
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)


class PackedLinear(nn.Module):
    """Stands for a quantised layer: no plain matrix inside."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach()
        self.scale = weight.abs().max()
        self.codes = (weight / self.scale * 127).round().to(torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.codes.to(x.dtype) * self.scale / 127).T


def test_a_quantised_layer_keeps_its_decoder_stock() -> None:
    stock = tiny_model("deepseek_v3")
    attention(stock, 1).kv_b_proj = PackedLinear(attention(stock, 1).kv_b_proj)
    model = copy.deepcopy(stock)
    report = replace_attention(model)
    assert report.replaced == ()
    assert "PackedLinear" in report.left["model.layers.1.self_attn"]
    assert "model.layers.1.self_attn" in report.left["model.layers.0.self_attn"]
    assert model.config._attn_implementation == "sdpa"
    assert_equal_logits(model, stock)


def test_a_layer_quantised_afterwards_is_refused() -> None:
    model = tiny_model("deepseek_v3")
    replace_attention(model)
    attention(model).kv_b_proj = PackedLinear(attention(model).kv_b_proj).eval()
    with pytest.raises(UnsupportedError, match="kv_b_proj has type"):
        logits(model)
