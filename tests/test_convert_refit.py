"""Output projections fitted to the original's outputs: against least squares, on whole models."""

import pytest
import torch
from helpers import generator
from hf_models import tokens
from hypothesis import given
from hypothesis import strategies as st

from mla.checks import ShapeError, UnsupportedError
from mla.convert.refit import RIDGES, OutputRefit

transformers = pytest.importorskip("transformers")

from test_convert_model import grouped_model, logits  # noqa: E402

from mla.integrations.converted import convert_model, refit_model  # noqa: E402


@given(
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 5),
    windows=st.integers(2, 4),
    is_right=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_the_best_ridge_on_held_out_windows(inputs, outputs, windows, is_right, seed):
    rng = generator(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    true, weight = draw(outputs, inputs + 1), draw(outputs, inputs)
    bias = true.new_zeros(outputs)
    if is_right:  # nothing that is fitted to noise does better
        weight, bias = true[:, :-1].clone(), true[:, -1].clone()
    total, data = OutputRefit(inputs, outputs), []
    for index in range(windows):
        z = draw(17, inputs).float().double()
        extended = torch.cat([z, z.new_ones(17, 1)], 1)
        y = (extended @ true.T + 0.3 * draw(17, outputs)).float()
        total.add(z, y, is_held_out=index == windows - 1)
        data.append((extended, y.double()))
    found = total.solve(weight, bias)
    held_z, held_y = data[-1]

    def error(projection):
        return ((held_z @ projection.T - held_y).square().sum() / held_y.square().sum()).item()

    old = torch.cat([weight, bias[:, None]], 1)
    errors = {None: error(old)}
    z, y = (torch.cat(parts) for parts in zip(*data[:-1], strict=True))
    for ridge in RIDGES:
        # Rows that pull each column towards the old value: the same minimum, by least squares.
        energy = z.square().sum(0)
        pull = (ridge * (energy + 1e-3 * energy[:-1].mean())).sqrt()
        pull[-1] = 0.0
        a, b = torch.cat([z, pull.diag()]), torch.cat([y, pull[:, None] * old.T])
        errors[ridge] = error(torch.linalg.lstsq(a, b).solution.T)
    assert found.before == pytest.approx(errors[None], rel=1e-4, abs=1e-6)  # sums of float32 rows
    assert found.after == pytest.approx(min(errors.values()), rel=1e-4, abs=1e-6)
    if found.ridge is None:
        assert torch.equal(found.weight, weight) and torch.equal(found.bias, bias)
    fitted = torch.cat([found.weight, found.bias[:, None]], 1)
    assert error(fitted) == pytest.approx(found.after, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("host", ["llama", "qwen2", "mistral"])
def test_layers_gain_and_the_original_keeps_every_bit(host):
    model, windows = grouped_model(host).train(), tokens(64, 60, seed=1)  # many for 49 inputs
    before = {name: x.clone() for name, x in model.state_dict().items()}
    converted = convert_model(model, windows, kv_budget=0.5).model
    ids = tokens(8, 30, seed=2)
    error = (logits(converted, ids) - logits(model, ids)).square().mean()
    steps = []
    found = refit_model(converted, model, windows, progress=lambda *step: steps.append(step))
    assert steps == [(1, 2), (2, 2)]
    assert all(layer.after <= layer.before for layer in found)
    assert any(layer.ridge is not None for layer in found)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert model.training and not converted.training
    assert (logits(converted, ids) - logits(model, ids)).square().mean() < error
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in converted.modules())


def test_what_is_exact_stays_so():
    model, windows = grouped_model(), tokens(8, 24, seed=1)
    converted = convert_model(model, windows, kv_budget=1.0).model
    refit_model(converted, model, windows)
    ids = tokens(2, 40, seed=2)
    # Sums of float32 rows; the projection is fitted to outputs that it gives already.
    torch.testing.assert_close(logits(converted, ids), logits(model, ids), rtol=0, atol=1e-3)


def test_bad_input_is_refused():
    model = grouped_model()
    converted = convert_model(model, tokens(2, 24, seed=1)).model
    with pytest.raises(UnsupportedError, match="without converted attention, expected a model of"):
        refit_model(model, model, tokens(2, 24))
    for windows in (tokens(1, 24), torch.ones(2, 4), torch.ones(4).long()):
        with pytest.raises(ShapeError, match="refit_model: windows has shape"):
            refit_model(converted, model, windows)


def test_sizes_can_be_given_layer_by_layer():
    model, windows = grouped_model(), tokens(2, 24, seed=1)
    sizes = [(4, 8), (8, 12)]
    reports = convert_model(model, windows, kv_budget=sizes).reports
    assert [(report.rope_dim, report.latent_dim) for report in reports] == sizes
    with pytest.raises(ShapeError, match=r"kv_budget has 3 pairs with .* expected 2, one"):
        convert_model(model, windows, kv_budget=[(4, 8)] * 3)
