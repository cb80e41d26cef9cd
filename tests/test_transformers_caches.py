"""Latent caches hold what the caches of transformers hold, after any sequence of operations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import poison_, randn
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("transformers")

from hf_models import tiny_config
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticLayer

from mla.checks import ShapeError
from mla.integrations.transformers import (
    LatentCache,
    LatentCacheLayer,
    StaticLatentCache,
    StaticLatentLayer,
)

C, R = 5, 3


def states(batch: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    rows = randn(batch, 1, length, C + R, seed=seed)
    return rows[..., :C], rows[..., C:]


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 9)),
        st.tuples(st.just("crop"), st.integers(0, 12)),
        st.tuples(st.just("repeat"), st.integers(1, 3)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 99), min_size=1, max_size=4)),
        st.tuples(st.just("choose"), st.integers(0, 99)),
        st.tuples(st.just("reorder"), st.integers(0, 99)),
        st.tuples(st.just("reset"), st.none()),
        st.tuples(st.just("copy"), st.none()),
    ),
    max_size=14,
)


def apply(layer: Any, operation: str, value: Any, batch: int, seed: int) -> Any:
    """Run one operation; returns the layer, another object after a copy."""
    if operation == "update":
        layer.update(*states(batch, value, seed))
    elif operation == "crop":
        layer.crop(-value)
    elif operation == "repeat":
        layer.batch_repeat_interleave(value)
    elif operation == "select":
        layer.batch_select_indices(torch.tensor([i % batch for i in value]))
    elif operation == "choose":
        mask = torch.arange(batch) != value % (batch + 1)
        layer.batch_select_indices(mask | (batch == 1))
    elif operation == "reorder":
        layer.reorder_cache(torch.arange(batch).roll(value))
    elif operation == "reset":
        layer.reset()
    elif operation == "copy":
        return copy.deepcopy(layer)
    return layer


@given(operations=OPERATIONS, grad=st.booleans())
@example(operations=[("update", 3), ("crop", 0), ("update", 1), ("crop", 9)], grad=False)
def test_any_operations_leave_what_a_dynamic_layer_holds(
    operations: list[tuple[str, Any]], grad: bool
) -> None:
    ours, stock, batch = LatentCacheLayer(), DynamicLayer(), 2
    with torch.set_grad_enabled(grad):
        for seed, (operation, value) in enumerate([*operations, ("update", 2)]):
            if operation == "crop" and (not stock.is_initialized or stock.keys.numel() == 0):
                continue
            ours = apply(ours, operation, value, batch, seed)
            # The oldest transformers zeroes the tokens of a dynamic layer and keeps counting them.
            is_reset = operation == "reset"
            stock = DynamicLayer() if is_reset else apply(stock, operation, value, batch, seed)
            if stock.get_seq_length() > 0:
                batch = stock.keys.shape[0]
                assert torch.equal(ours.keys, stock.keys)
                assert torch.equal(ours.values, stock.values)
            elif operation in ("crop", "reset"):
                ours.reset(), stock.reset()  # an empty layer of transformers forgets its batch
            assert ours.get_seq_length() == stock.get_seq_length()
            assert ours.get_mask_sizes(3) == stock.get_mask_sizes(3)
            assert ours.get_max_length() == stock.get_max_length() == -1


@torch.no_grad()
def test_appending_copies_rarely_and_wastes_at_most_half() -> None:
    layer, addresses = LatentCacheLayer(), set()
    for step in range(600):
        keys, values = layer.update(*states(1, 1, step))
        addresses.add(layer.rows.data_ptr())
        assert keys.data_ptr() == layer.rows.data_ptr()
        assert values.data_ptr() == keys.data_ptr() + C * keys.element_size()
        assert layer.rows.shape[1] <= max(2, 1.5 * (step + 1))
    assert len(addresses) < 20
    assert layer.nbytes == layer.rows.shape[1] * (C + R) * 4


def test_a_recorded_step_keeps_its_rows() -> None:
    """Backward through an early step works after later steps have appended."""
    layer = LatentCacheLayer()
    latent, k_rope = states(2, 3, 0)
    weight, query = torch.ones(C, requires_grad=True), torch.ones(C, requires_grad=True)
    with torch.no_grad():
        layer.update(latent, k_rope)
    first, _ = layer.update(latent * weight, k_rope)
    early = (first * query).square().sum()
    layer.crop(-1)
    for seed in (1, 2):
        later, _ = layer.update(*states(2, 1, seed))
        early = early + (later * query).square().sum()
    with torch.no_grad():
        layer.crop(-2)
        layer.update(*states(2, 1, 3))
    early.backward()
    assert torch.isfinite(weight.grad).all() and (query.grad != 0).all()


def test_a_recorded_step_keeps_rows_that_need_no_gradient() -> None:
    layer, query = LatentCacheLayer(), torch.ones(C, requires_grad=True)
    total = torch.zeros(())
    for seed in range(6):
        latent, _ = layer.update(*states(2, 1, seed))
        total = total + (latent * query).square().sum()
    total.backward()
    assert (query.grad > 0).all()


def test_rows_from_inference_mode_can_be_extended_outside() -> None:
    layer = LatentCacheLayer()
    with torch.inference_mode():
        layer.update(*states(2, 3, 0))
        layer.update(*states(2, 1, 1))
    with torch.no_grad():
        keys, _ = layer.update(*states(2, 1, 2))
    expected = torch.cat([states(2, n, seed)[0] for n, seed in ((3, 0), (1, 1), (1, 2))], dim=2)
    assert torch.equal(keys, expected)


@torch.no_grad()
def test_unfilled_rows_are_never_handed_out() -> None:
    layer = LatentCacheLayer()
    layer.update(*states(2, 4, 0))
    layer.update(*states(2, 1, 1))
    poison_(layer.rows[:, layer.length :])
    layer.crop(-2)
    layer.reorder_cache(torch.tensor([1, 1]))
    poison_(layer.rows[:, layer.length :])
    keys, values = layer.update(*states(2, 1, 2))
    assert keys.shape[2] == 4 and torch.isfinite(keys).all() and torch.isfinite(values).all()


@pytest.mark.parametrize("layer", [LatentCacheLayer(), StaticLatentLayer(8)])
def test_wrong_shapes_raise_and_change_nothing(layer: Any) -> None:
    with pytest.raises(ShapeError, match=r"key_states has shape \(2, 4, 3, 5\)"):
        layer.update(torch.zeros(2, 4, 3, C), torch.zeros(2, 4, 3, R))
    layer.update(*states(2, 3, 0))
    before = layer.keys.clone()
    for batch, width in ((3, C), (2, C + 1)):
        with pytest.raises(ShapeError, match=r"beside rows of shape \(2, \d, 8\)"):
            layer.update(torch.zeros(batch, 1, 1, width), torch.zeros(batch, 1, 1, R))
    assert torch.equal(layer.keys, before) and int(layer.get_seq_length()) == 3


def test_crop_refuses_a_final_length() -> None:
    with pytest.raises(ValueError, match="tokens_to_remove has value 3"):
        LatentCacheLayer().crop(3)


def test_a_static_layer_holds_what_transformers_holds() -> None:
    ours, stock, address = StaticLatentLayer(9), StaticLayer(9), None
    for layer in (ours, stock):
        assert layer.get_seq_length() == 0
        layer.update(*states(2, 4, 0))
        address = address or ours.rows.data_ptr()
        layer.update(*states(2, 1, 1))
        layer.reorder_cache(torch.tensor([1, 0]))
        layer.update(*states(2, 2, 2))
    assert torch.equal(ours.keys, stock.keys) and torch.equal(ours.values, stock.values)
    assert ours.get_seq_length() == stock.get_seq_length() == 7
    assert ours.get_mask_sizes(2) == stock.get_mask_sizes(2)
    assert ours.get_max_length() == 9
    ours.reset()
    ours.update(*states(2, 1, 3))
    assert ours.get_seq_length() == 1 and ours.rows.data_ptr() == address


def test_layers_of_other_kinds_stay_as_transformers_makes_them() -> None:
    config = tiny_config("kimi_linear")
    stock = [type(layer) for layer in DynamicCache(config=config).layers]
    dynamic, static = LatentCache(config), StaticLatentCache(config, 16)
    assert [type(layer) for layer in dynamic.layers] == [stock[0], LatentCacheLayer, stock[2]]
    assert [type(layer) for layer in static.layers] == [stock[0], StaticLatentLayer, stock[2]]
    assert dynamic.nbytes == 0 and static.is_compileable
