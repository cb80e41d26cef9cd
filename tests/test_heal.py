"""Healing of converted models: what is trained, what it brings, what is refused."""

import math

import pytest
import torch
from cli_models import tiny_llama
from heal_models import FAST, WINDOWS, attention_weights, converted_pair, same_bits, tiny_qwen2
from hf_models import tokens

from mla.checks import ShapeError, UnsupportedError
from mla.convert import token_losses

pytest.importorskip("transformers")

from mla.integrations.converted import load_converted, save_converted
from mla.integrations.converted.heal import HealOptions, heal
from mla.integrations.converted.heal_match import layer_tasks, match_layer


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


# --- what is trained -----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_alone_is_trained_and_the_original_keeps_every_bit(make, checkpointing):
    original, conversion = converted_pair(make)
    model = conversion.model
    original.train()
    before = {name: x.clone() for name, x in original.state_dict().items()}
    attention, trained = attention_weights(model), set()
    heal(
        *(model, original, WINDOWS),
        steps=6,
        options=HealOptions(**FAST, checkpointing=checkpointing),
        progress=lambda *_: trained.update(
            n for n, x in model.named_parameters() if x.requires_grad
        ),
    )
    assert trained == {name for name, _ in model.named_parameters() if ".self_attn." in name}
    assert all(torch.equal(x, before[name]) for name, x in original.state_dict().items())
    theirs = {x.data_ptr(): name for name, x in original.named_parameters()}
    for name, x in model.named_parameters():
        assert (x.data_ptr() in theirs) == (".self_attn." not in name), name
    for parameters in (original.parameters(), model.parameters()):
        assert all(x.requires_grad and x.grad is None for x in parameters)
    for old, new in zip(attention, attention_weights(model), strict=True):
        assert old.dtype == new.dtype and not torch.equal(old, new)
    assert original.training and not any(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in original.modules())


def test_checkpointing_changes_no_bit():
    found = []
    for checkpointing in (False, True):
        original, conversion = converted_pair()
        options = HealOptions(**FAST, checkpointing=checkpointing)
        heal(conversion.model, original, WINDOWS, steps=5, options=options)
        found.append(attention_weights(conversion.model))
    assert same_bits(*found)


@pytest.mark.parametrize(
    ("dtype", "bfloat16"), [(torch.bfloat16, False), (torch.float32, True), (torch.float64, False)]
)
def test_dtypes_stay(dtype, bfloat16):
    original, conversion = converted_pair(dtype=dtype)
    report = heal(
        conversion.model,
        original,
        WINDOWS,
        steps=10,
        options=HealOptions(**FAST, bfloat16=bfloat16),
    )
    assert {x.dtype for x in conversion.model.parameters()} == {dtype}
    assert report.divergence_after < report.divergence_before


# --- what it brings ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2])
def test_predictions_come_closer_and_the_report_says_how_close(make):
    original, conversion = converted_pair(make, dtype=torch.float64)
    test = WINDOWS[-2:]

    def divergence(model):
        wanted, found = (logits(x, test).log_softmax(-1) for x in (original, model))
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())

    before = divergence(conversion.model)
    report = heal(
        conversion.model, original, WINDOWS, steps=30, options=HealOptions(**FAST, patience=99)
    )
    assert report.divergence_before == pytest.approx(before, rel=1e-5)
    assert report.divergence_after == pytest.approx(divergence(conversion.model), rel=1e-5)
    assert report.divergence_after < 0.97 * before
    losses = [float(token_losses(x, test).mean().exp()) for x in (original, conversion.model)]
    assert [report.after.before, report.after.after] == pytest.approx(losses, rel=1e-5)
    assert report.after.ratio == pytest.approx(losses[1] / losses[0], rel=1e-5)
    assert (report.steps, report.tokens, report.stopped) == (30, 30 * 24, "steps")
    assert [x.step for x in report.held_out] == [0, 25, 30]
    assert len(report.losses) == 30 and len(report.layers) == 2


def test_layers_are_given_what_the_original_sees():
    original, _ = converted_pair()
    seen = []

    def observe(module, args, kwargs, output):
        seen.append((kwargs["hidden_states"], output[0]))

    handles = [
        x.self_attn.register_forward_hook(observe, with_kwargs=True) for x in original.model.layers
    ]
    with torch.no_grad():
        states = original(input_ids=WINDOWS, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    for index, task in enumerate(layer_tasks(original, WINDOWS)):
        torch.testing.assert_close(task.inputs, seen[index][0])
        torch.testing.assert_close(task.outputs, seen[index][1])
        stream = states[index] + seen[index][1]
        torch.testing.assert_close(task.weights, 1.0 / stream.square().sum(-1))


def test_matching_brings_every_layer_closer_on_held_out_windows():
    original, conversion = converted_pair()
    windows = tokens(4, 24, seed=5)[[0, 1, 2, 3, 0, 1]]
    options = HealOptions(**FAST | {"match_steps": 24})
    report = heal(conversion.model, original, windows, steps=1, options=options)
    assert all(0 < layer.after < layer.before for layer in report.layers)
    # The first measure is that after matching, and matching is kept only if it helped.
    assert report.held_out[0].divergence <= report.divergence_before


def test_a_layer_that_got_worse_is_put_back():
    original, conversion = converted_pair()
    attention = conversion.model.model.layers[0].self_attn.mla
    start = [x.detach().clone() for x in attention.parameters()]
    matched = match_layer(
        *(attention, next(layer_tasks(original, WINDOWS))),
        held_out=2,
        steps=2,
        optimizer=torch.optim.SGD(attention.parameters(), lr=1e6),
        set_rate=lambda optimizer, step: None,
    )
    assert matched.after == matched.before > 0
    assert same_bits([x.detach() for x in attention.parameters()], start)


def test_the_best_weights_are_kept():
    original, conversion = converted_pair()
    before = attention_weights(conversion.model)
    wild = HealOptions(**FAST | {"learning_rate": 3.0, "match_steps": 0}, evaluate_every=1)
    report = heal(conversion.model, original, WINDOWS, steps=50, options=wild)
    assert (report.stopped, report.best_step) == ("no improvement", 0)
    assert report.steps == wild.patience
    assert same_bits(attention_weights(conversion.model), before)
    assert report.after == report.before


def test_a_loss_that_is_no_number_ends_it():
    original, conversion = converted_pair()
    before = attention_weights(conversion.model)
    wild = HealOptions(**FAST | {"learning_rate": 1e38, "match_rate": 1e38})
    report = heal(conversion.model, original, WINDOWS, steps=50, options=wild)
    assert report.stopped == "divergence" and report.steps < 50
    assert same_bits(attention_weights(conversion.model), before)
    assert all(layer.after == layer.before for layer in report.layers)


def test_time_ends_it():
    original, conversion = converted_pair()
    options = HealOptions(**FAST | {"match_steps": 0})
    report = heal(conversion.model, original, WINDOWS, steps=50, seconds=1e-6, options=options)
    assert (report.stopped, report.steps, len(report.held_out)) == ("time", 0, 1)


def test_healed_weights_are_saved_loaded_and_decoded_with(tmp_path):
    original, conversion = converted_pair(dtype=torch.float64)
    model, ids = conversion.model, tokens(1, 9, seed=7)
    form = {name: (x.shape, x.dtype) for name, x in model.state_dict().items()}
    old = logits(model, ids)
    heal(model, original, WINDOWS, steps=10, options=HealOptions(**FAST))
    assert {name: (x.shape, x.dtype) for name, x in model.state_dict().items()} == form
    save_converted(conversion, tmp_path / "healed")
    loaded = load_converted(tmp_path / "healed").model
    healed = logits(loaded, ids)
    assert torch.equal(healed, logits(model, ids))
    assert (healed - old).abs().max() > 1e-3
    with torch.no_grad():  # token after token from the cache: absorbed
        cache, steps = None, []
        for token in ids.T[:, :, None].unbind(0):
            out = loaded(input_ids=token, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), healed, rtol=1e-9, atol=1e-9)


# --- refusals ------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    original, conversion = converted_pair()
    model = conversion.model
    before = attention_weights(model)
    other = tiny_llama(seed=9)
    cases = (
        (
            (original, original, WINDOWS),
            {},
            UnsupportedError,
            "converted has type LlamaForCausalLM",
        ),
        ((torch.nn.Linear(2, 2), original, WINDOWS), {}, UnsupportedError, "without converted"),
        ((model, model, WINDOWS), {}, UnsupportedError, "q_proj of model has type NoneType"),
        ((model, other, WINDOWS), {}, ValueError, "original has other values of model.embed"),
        (
            (model, original.to(torch.float64), WINDOWS),
            {},
            ValueError,
            "float64.*expected.*float32",
        ),
        ((model, original, WINDOWS[0]), {}, ShapeError, r"windows has shape \(24,\)"),
        ((model, original, WINDOWS.float()), {}, ShapeError, "expected .W, T. token ids"),
        ((model, original, WINDOWS[:, :1]), {}, ShapeError, "with T >= 2"),
        ((model, original, WINDOWS[:4]), {}, ShapeError, "has 4 rows, expected more than the held"),
        ((model, original, WINDOWS), {"steps": 0}, ValueError, "values 0 and None, expected at"),
        ((model, original, WINDOWS), {"seconds": 0.0}, ValueError, "expected at least one step"),
        ((model, original, WINDOWS), {"resume": True}, ValueError, "expected a file to resume"),
    )
    for arguments, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            heal(*arguments, **options)
    halves = converted_pair(dtype=torch.bfloat16)
    halves[0].half(), halves[1].model.half()
    with pytest.raises(UnsupportedError, match=r"dtype torch\.float16, expected float32"):
        heal(halves[1].model, halves[0], WINDOWS)
    assert same_bits(attention_weights(model), before)
    assert all(x.requires_grad for x in model.parameters())


@pytest.mark.parametrize(
    "values", [{"learning_rate": 0.0}, {"held_out": 0}, {"warmup": -1}, {"clip": math.inf}]
)
def test_options_out_of_range_are_refused(values):
    (name,) = values
    with pytest.raises(ValueError, match=f"HealOptions: {name} has value .*, expected"):
        HealOptions(**values)
