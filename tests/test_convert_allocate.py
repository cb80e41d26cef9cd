"""Sizes of layers by measured errors: the search against all choices, errors against float64."""

import itertools
import math

import pytest
import torch
from helpers import generator
from hf_models import VOCAB, tokens
from hypothesis import assume, given
from hypothesis import strategies as st

from mla import MultiheadLatentAttention
from mla.checks import ShapeError
from mla.convert.allocate import (
    Option,
    Sample,
    allocate,
    measure_options,
    output_error,
    sizes_to_try,
)

transformers = pytest.importorskip("transformers")

from test_convert_model import grouped_model  # noqa: E402

from mla.convert import gqa_to_mla  # noqa: E402
from mla.convert.survey import Survey  # noqa: E402
from mla.integrations.converted import (  # noqa: E402
    calibrate,
    convert_model,
    read_host,
    survey_model,
)
from mla.integrations.converted.hosts import attention_weights  # noqa: E402

OPTIONS = st.lists(
    st.builds(
        Option,
        rope_dim=st.integers(0, 6).map(lambda n: 2 * n),
        latent_dim=st.integers(1, 6).map(lambda n: 2 * n),
        error=st.floats(0, 10),
    ),
    min_size=1,
    max_size=4,
)


@given(layers=st.lists(OPTIONS, min_size=1, max_size=4), total=st.integers(2, 90))
def test_no_other_choice_within_the_budget_has_a_smaller_error(layers, total):
    choices = [c for c in itertools.product(*layers) if sum(o.size for o in c) <= total]
    if not choices:
        with pytest.raises(ValueError, match=f"total has value {total}, expected at least"):
            allocate(layers, total)
        return
    chosen = allocate(layers, total)
    assert all(option in layer for option, layer in zip(chosen, layers, strict=True))
    assert sum(option.size for option in chosen) <= total
    least = min(sum(option.error for option in choice) for choice in choices)
    assert math.isclose(sum(option.error for option in chosen), least, rel_tol=1e-12)


@given(
    best=st.integers(0, 12), size=st.integers(2, 30).map(lambda n: 2 * n), slope=st.floats(0.1, 9)
)
def test_the_walk_ends_where_the_error_is_least(best, size, slope):
    measured = []

    def error(rope_dim: int, latent_dim: int) -> float:
        measured.append(rope_dim)
        assert rope_dim + latent_dim == size and latent_dim >= 1
        return abs(rope_dim - 2 * best) * (slope if rope_dim > 2 * best else 1.0)

    assume(size < 64)
    (option,) = measure_options([size], error, 2, 16)  # G*d = 32, R in steps of 4
    allowed = [R for R in range(0, 33, 4) if size > R]
    least = min(abs(R - 2 * best) * (slope if 2 * best < R else 1.0) for R in allowed)
    assert option.error == least
    assert len(measured) == len(set(measured)), "measured twice"


def test_the_full_size_needs_no_measurement():
    def error(rope_dim: int, latent_dim: int) -> float:
        raise AssertionError("measured")

    assert measure_options([64], error, 2, 16) == (Option(32, 32, 0.0),)


@given(budget=st.floats(0.1, 1.0), G=st.integers(1, 4), d=st.sampled_from([8, 16, 64]))
def test_sizes_surround_the_budget(budget, G, d):
    sizes = sizes_to_try([budget], G, d)
    assert sizes == sorted(set(sizes)) and sizes[-1] <= 2 * G * d
    assert sizes[0] <= max(budget * 2 * G * d, 2) or len(sizes) == 1
    assert sizes[-1] >= min(budget * 2 * G * d, 2 * G * d) - 1e-9


def surveyed(model, **options) -> Survey:
    return survey_model(model, tokens(3, 24, seed=1), **options)


def test_the_error_is_that_of_the_layer_on_its_own_inputs():
    model = grouped_model("llama-biases")
    windows = tokens(2, 24, seed=1)
    seen = []
    attention = model.model.layers[1].self_attn

    def keep(module, args, kwargs, result):
        seen.append((kwargs["hidden_states"][0], result[0][0]))

    handle = attention.register_forward_hook(keep, with_kwargs=True)
    for window in windows:
        model(input_ids=window[None])
    handle.remove()
    host, moments = read_host(model), calibrate(model, windows)[1]
    inputs, outputs = (torch.stack(rows).detach() for rows in zip(*seen, strict=True))
    rng = generator(0)
    stream = torch.rand(2, 24, generator=rng, dtype=torch.float64) + 0.5
    weights = attention_weights(attention)
    for sizes, least, most in (((16, 16), 0.0, 1e-9), ((4, 8), 1e-4, 100.0)):
        converted = gqa_to_mla(weights, moments, kv_budget=sizes, **host.shape)
        found = output_error(converted, Sample(inputs, outputs, stream))
        assert least <= found <= most
    module = MultiheadLatentAttention(converted.config).double()
    module.load_state_dict(converted.state_dict)
    with torch.no_grad():
        difference = module(inputs) - outputs
    expected = (difference.square().sum(-1) / stream).mean()
    assert math.isclose(found, float(expected), rel_tol=1e-5)  # errors are summed in float32


def test_layers_share_the_budget_and_the_better_half_of_it_is_not_wasted():
    model = grouped_model(num_hidden_layers=3)
    survey = surveyed(model, kv_budgets=[0.5])
    reports = convert_model(model, tokens(3, 24, seed=1), kv_budget=0.5, survey=survey).reports
    assert sum(report.cached_numbers for report in reports) <= 0.5 * 32 * 3
    chosen = [(report.rope_dim, report.latent_dim) for report in reports]
    errors = {
        (index, option.rope_dim, option.latent_dim): option.error
        for index, layer in enumerate(survey)
        for option in layer.options
    }
    found = sum(errors[(index, *sizes)] for index, sizes in enumerate(chosen))
    same = [o for layer in survey for o in layer.options if o.size == 16]
    assert len(same) == 3 and found <= sum(option.error for option in same)


def test_an_interrupted_survey_goes_on(tmp_path):
    model, folder = grouped_model(num_hidden_layers=3), tmp_path / "survey"
    whole = surveyed(model, kv_budgets=[0.5])

    class Stop(Exception):
        pass

    def stop(done: int, steps: int) -> None:
        assert steps == 9
        if done == 5:  # in the middle of the second layer
            raise Stop

    with pytest.raises(Stop):
        surveyed(model, kv_budgets=[0.5], folder=folder, progress=stop)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    seen = []
    resumed = surveyed(
        model, kv_budgets=[0.5], folder=folder, progress=lambda done, steps: seen.append(done)
    )
    assert seen == [4, 5, 6, 7, 8, 9]
    for a, b in zip(whole, resumed, strict=True):
        assert a.options == b.options
        assert all(torch.equal(x, y) for x, y in zip(a.moments, b.moments, strict=True))
    seen.clear()
    surveyed(model, kv_budgets=[0.5], folder=folder, progress=lambda *step: seen.append(step))
    assert seen == []  # all is there


@pytest.mark.parametrize("what", ["windows", "budgets", "weights"])
def test_a_survey_of_something_else_is_begun_anew(tmp_path, what):
    model, seen = grouped_model(), []
    survey_model(model, tokens(2, 24, seed=1), kv_budgets=[0.5], folder=tmp_path)
    if what == "weights":
        with torch.no_grad():
            model.model.layers[1].self_attn.q_proj.weight[0, 0] += 1
    survey_model(
        model,
        tokens(2, 24, seed=2 if what == "windows" else 1),
        kv_budgets=[0.75 if what == "budgets" else 0.5],
        folder=tmp_path,
        progress=lambda done, steps: seen.append(done),
    )
    assert seen == [1, 2, 3, 4]


@pytest.mark.parametrize("host", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_layers_see_what_they_see_in_the_whole_model(host, attention):
    model = grouped_model(host)
    model.set_attn_implementation(attention)
    windows, seen = tokens(2, 24, seed=1), []
    last = model.model.layers[1].self_attn
    handle = last.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"][0].detach()),
        with_kwargs=True,
    )
    for window in windows:
        model(input_ids=window[None])
    handle.remove()
    x = torch.cat(seen)
    x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    torch.testing.assert_close(
        calibrate(model, windows)[1].queries, (x.mT @ x / len(x)), rtol=1e-5, atol=1e-6
    )  # sums are of float32 inputs


def test_a_survey_without_options_cannot_be_shared_out():
    model, windows = grouped_model(), tokens(2, 24, seed=1)
    with pytest.raises(ValueError, match="survey has layers without options, expected that of"):
        convert_model(model, windows, kv_budget=0.5, survey=survey_model(model, windows))


def test_an_error_leaves_no_hook_behind():
    model = grouped_model()
    with pytest.raises(IndexError):
        survey_model(model, torch.full((1, 4), VOCAB + 1))
    with pytest.raises(ShapeError):
        survey_model(model, torch.zeros(0, 4).long())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
