"""Whole models of transformers, converted: logits, tokens, caches, refusals, the real model."""

import pytest
import torch
from hf_models import PAD, VOCAB, draw_weights_, left_padded, tokens

from mla.checks import ShapeError, UnsupportedError
from mla.convert import compare_losses, token_losses, token_windows

transformers = pytest.importorskip("transformers")

from mla.integrations.converted import calibrate, convert_model  # noqa: E402
from mla.integrations.transformers import restore_attention  # noqa: E402

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "eos_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
HOSTS = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True}),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-mha": ("Llama", {"num_key_value_heads": 6}),
    "llama-mqa": ("Llama", {"num_key_value_heads": 1}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
}


def grouped_model(host: str = "llama", *, dtype=torch.float64, seed: int = 0, **overrides):
    name, values = HOSTS[host]
    config = getattr(transformers, f"{name}Config")(**SIZES | values | overrides)
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(
        config, attn_implementation="sdpa"
    )
    model = model.to(dtype).eval()
    draw_weights_(model, seed)
    model.generation_config.eos_token_id = None
    return model


def continuation(model, inputs, **options):
    options = {"max_new_tokens": 24, "do_sample": False} | options
    with torch.no_grad():
        return model.generate(**inputs, **options)


def logits(model, ids, **options):
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_full_budget_gives_the_original_logits(host, dtype):
    model = grouped_model(host, dtype=dtype)
    converted = convert_model(model, tokens(2, 24, seed=1), kv_budget=1.0)
    ids = tokens(2, 40, seed=2)
    # transformers computes angles in float32, whatever the dtype of the model.
    torch.testing.assert_close(
        logits(converted.model, ids),
        logits(model, ids),
        rtol=0,
        atol=2e-5 if dtype is torch.float64 else 2e-4,
    )
    assert max(report.output_error for report in converted.reports) < 1e-6


@pytest.mark.parametrize("host", ["llama", "qwen2", "mistral", "llama-mqa"])
def test_full_budget_generates_the_original_tokens(host):
    model = grouped_model(host)
    converted = convert_model(model, tokens(2, 24, seed=1), kv_budget=1.0).model
    for inputs in ({"input_ids": tokens(2, 9, seed=2)}, left_padded([9, 4, 1], seed=3)):
        for options in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
            expected = continuation(model, inputs, **options)
            assert torch.equal(continuation(converted, inputs, **options), expected)


@pytest.mark.parametrize("kv_budget", [0.75, 0.25, (0, 6), (2, 1), (14, 3)])
def test_decoding_from_the_cache_is_one_forward(kv_budget):
    converted = convert_model(grouped_model(), tokens(2, 24, seed=1), kv_budget=kv_budget).model
    inputs = left_padded([7, 3], seed=3)
    with_cache = continuation(converted, inputs)
    assert torch.equal(continuation(converted, inputs, use_cache=False), with_cache)
    ids = tokens(1, 12, seed=4)
    absorbed = logits(converted, ids)
    restore_attention(converted)  # the same layers through transformers' own attention
    torch.testing.assert_close(logits(converted, ids), absorbed, rtol=1e-9, atol=1e-9)
    assert torch.equal(continuation(converted, inputs), with_cache)


def test_sizes_follow_the_budget():
    model, windows = grouped_model(), tokens(2, 24, seed=1)
    for share, numbers in ((0.75, 24), (0.5, 16)):
        reports = convert_model(model, windows, kv_budget=share).reports
        for report in reports:
            assert report.cached_numbers == report.rope_dim + report.latent_dim
            assert report.original_numbers == 32
        assert sum(report.cached_numbers for report in reports) == len(reports) * numbers


def test_the_original_stays_as_it_is_and_shares_what_is_not_attention():
    model = grouped_model().train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    steps = []
    converted = convert_model(
        model,
        tokens(3, 16, seed=1),
        calibrate_progress=lambda *step: steps.append(step),
        convert_progress=lambda *step: steps.append(step),
    ).model
    assert steps == [*((done, 6) for done in range(1, 7)), (1, 2), (2, 2)]
    assert model.training and not converted.training
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    mlps = [x.model.layers[1].mlp.up_proj.weight.data_ptr() for x in (model, converted)]
    assert mlps[0] == mlps[1]
    assert converted.lm_head.weight is converted.model.embed_tokens.weight
    assert model.config._attn_implementation == "sdpa"


def test_hooks_are_removed_after_an_error():
    model = grouped_model()
    with pytest.raises(IndexError):
        calibrate(model, torch.full((1, 4), VOCAB + 1))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_converted_model_trains():
    converted = convert_model(grouped_model(), tokens(2, 24, seed=1), kv_budget=0.5).model.train()
    ids = tokens(2, 10, seed=2)
    converted(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in converted.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), name


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("Qwen3", {}, "model_type 'qwen3', expected one of .*normed queries and keys"),
        ("Mistral", {"sliding_window": 8}, "sliding_window has value 8, expected None"),
        ("Llama", {"rope_parameters": YARN | {"rope_type": "dynamic"}}, "rope_type has value 'dyn"),
        ("DeepseekV3", {"num_hidden_layers": 1}, "model_type 'deepseek_v3', expected one of"),
    ],
)
def test_other_attention_is_refused(name, values, message):
    config = getattr(transformers, f"{name}Config")(**SIZES | values)
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    with pytest.raises(UnsupportedError, match=message):
        convert_model(model, tokens(1, 4))


def test_a_converted_model_is_not_converted_again():
    converted = convert_model(grouped_model(), tokens(1, 8)).model
    with pytest.raises(UnsupportedError, match="q_proj of model has type NoneType"):
        convert_model(converted, tokens(1, 8))


def test_what_is_no_model_is_refused():
    with pytest.raises(UnsupportedError, match="model_type None"):
        convert_model(torch.nn.Linear(2, 2), tokens(1, 4))


@pytest.mark.parametrize(
    "windows", [torch.ones(4).long(), torch.ones(0, 4).long(), torch.ones(1, 4)]
)
def test_bad_windows(windows):
    with pytest.raises(ShapeError, match="calibrate: windows has shape"):
        convert_model(grouped_model(), windows)


def test_real_model_at_full_budget(smollm2, smollm2_tokenizer, data_paths):
    text = data_paths.evaluation_text.read_text(encoding="utf-8")
    windows = token_windows(smollm2_tokenizer, text, count=2, length=128)
    converted = convert_model(smollm2, windows[:1], kv_budget=(192, 192)).model
    difference = logits(converted, windows) - logits(smollm2, windows)
    assert difference.abs().max() < 2e-4


@pytest.mark.slow
def test_real_model_at_three_quarters(smollm2, smollm2_tokenizer, data_paths):
    texts = [
        path.read_text(encoding="utf-8")
        for path in (data_paths.calibration_text, data_paths.evaluation_text)
    ]
    calibration, evaluation = (
        token_windows(smollm2_tokenizer, text, count=count, length=512)
        for text, count in zip(texts, (6, 3), strict=True)
    )
    converted = convert_model(smollm2, calibration, kv_budget=0.75)
    assert sum(report.cached_numbers for report in converted.reports) == 288 * 30
    losses = [token_losses(model, evaluation) for model in (smollm2, converted.model)]
    assert 1.0 < compare_losses(*losses).ratio < 1.08


def test_the_published_objective_is_exact_in_full_and_keeps_the_layers_alike_otherwise():
    model, windows, ids = grouped_model("qwen2"), tokens(2, 24, seed=1), tokens(1, 20, seed=2)
    exact = convert_model(model, windows, kv_budget=1.0, objective="published").model
    torch.testing.assert_close(logits(exact, ids), logits(model, ids), rtol=0, atol=2e-5)
    half = convert_model(model, windows, kv_budget=0.5, objective="published")
    assert {(report.rope_dim, report.latent_dim) for report in half.reports} == {(8, 8)}
    with pytest.raises(ValueError, match="objective has value 'published' with layout='deep"):
        convert_model(model, windows, objective="published", layout="deepseek_v3")
    with pytest.raises(ValueError, match="fold has value 2, expected 1 for our objective"):
        convert_model(model, windows, fold=2)
