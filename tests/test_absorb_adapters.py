"""The weight of ``kv_b_proj`` behind the adapters of peft, in every state that these can be in."""

from typing import Any

import pytest
import torch
from helpers import randn
from torch import Tensor, nn

from mla.absorb import effective_weight
from mla.checks import UnsupportedError

peft = pytest.importorskip("peft")

H, N, V, C = 3, 5, 4, 7


def multiplies_with(layer: nn.Module) -> Tensor:
    """The matrix of a linear map, read off its images of the unit vectors."""
    return layer(torch.eye(C, dtype=torch.float64)).T


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kv_b_proj = nn.Linear(C, H * (N + V), bias=False)
        self.o_proj = nn.Linear(H * V, C, bias=False)


def adapted(**options: Any) -> tuple[Any, Any]:
    """The model of peft and, inside it, the block whose ``kv_b_proj`` has an adapter."""
    options = {"r": 2, "target_modules": ["kv_b_proj"], "init_lora_weights": False} | options
    model = peft.get_peft_model(Block(), peft.LoraConfig(**options))
    return model.to(torch.float64), model.base_model.model


def add_adapter(model: Any, name: str) -> None:
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["kv_b_proj"], init_lora_weights=False
    )
    model.add_adapter(name, config)
    model.to(torch.float64)


def assert_honoured(block: nn.Module) -> Tensor:
    weight = effective_weight(block.kv_b_proj).detach().clone()
    torch.testing.assert_close(weight, multiplies_with(block.kv_b_proj).detach())
    return weight


def test_adapter_is_honoured_in_every_state():
    torch.manual_seed(0)
    model, block = adapted(lora_alpha=7)
    base = block.kv_b_proj.base_layer.weight
    first = assert_honoured(block)
    assert not torch.equal(first, base)

    with torch.no_grad():  # a training step
        block.kv_b_proj.lora_B["default"].weight.add_(0.5)
    changed = assert_honoured(block)
    assert not torch.allclose(changed, first)

    with model.disable_adapter():
        assert effective_weight(block.kv_b_proj) is base
    add_adapter(model, "second")
    assert torch.equal(assert_honoured(block), changed)  # there, but not active
    model.set_adapter("second")
    assert not torch.allclose(assert_honoured(block), changed)
    model.base_model.set_adapter(["default", "second"])
    both = assert_honoured(block)
    block.kv_b_proj.set_scale("second", 0.25)
    assert not torch.allclose(assert_honoured(block), both)


@pytest.mark.parametrize("is_trained", [False, True])
def test_merged_adapter_is_counted_once(is_trained):
    torch.manual_seed(0)
    model, block = adapted()
    add_adapter(model, "second")
    model.base_model.set_adapter(["default", "second"])
    model.train(is_trained)
    before = assert_honoured(block)
    unmerged = block.kv_b_proj.base_layer.weight.detach().clone()
    model.merge_adapter(["second"])
    assert effective_weight(block.kv_b_proj) is block.kv_b_proj.base_layer.weight
    assert_honoured(block)  # like peft's forward: what is not merged does not count
    model.unmerge_adapter()
    model.merge_adapter()
    torch.testing.assert_close(assert_honoured(block), before)
    with model.disable_adapter():  # peft would unmerge in place; reading the weight must not
        torch.testing.assert_close(effective_weight(block.kv_b_proj), unmerged)
        assert block.kv_b_proj.merged
        assert_honoured(block)


def test_merged_and_unloaded_layer_is_plain_again():
    torch.manual_seed(0)
    model, block = adapted()
    before = assert_honoured(block)
    block = model.merge_and_unload()
    assert effective_weight(block.kv_b_proj) is block.kv_b_proj.weight
    torch.testing.assert_close(block.kv_b_proj.weight.detach(), before)


def test_gradient_reaches_the_adapter_and_the_base():
    torch.manual_seed(0)
    model, block = adapted()
    model.requires_grad_(True)
    layer, twin = block.kv_b_proj, randn(H * (N + V), C, seed=1, dtype=torch.float64)
    found = torch.autograd.grad((effective_weight(layer) * twin).sum(), list(layer.parameters()))
    wanted = torch.autograd.grad((multiplies_with(layer) * twin).sum(), list(layer.parameters()))
    assert len(found) == 3
    torch.testing.assert_close(found, wanted)


def test_weight_keeps_the_dtype_of_the_base():
    _, block = adapted()
    block.kv_b_proj.base_layer.to(torch.bfloat16)
    assert effective_weight(block.kv_b_proj).dtype == torch.bfloat16


def test_dropout_of_an_adapter_is_refused_in_training_alone():
    model, block = adapted(lora_dropout=0.1)
    assert_honoured(model.eval().base_model.model)
    model.train()
    with pytest.raises(UnsupportedError, match=r"'default' with dropout 0.1 in training.*eval\(\)"):
        effective_weight(block.kv_b_proj)
    with model.disable_adapter():
        assert_honoured(block)


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"use_dora": True}, "of variant DoraLinearVariant"),
        ({"lora_bias": True}, "with a bias"),
    ],
)
def test_adapters_that_are_not_a_product_of_two_matrices_are_refused(options, fact):
    _, block = adapted(**options)
    with pytest.raises(UnsupportedError, match=f"kv_b_proj has adapter 'default' {fact}"):
        effective_weight(block.kv_b_proj)


def test_other_adapters_are_refused_by_type():
    config = peft.IA3Config(target_modules=["kv_b_proj"], feedforward_modules=[])
    block = peft.get_peft_model(Block(), config).base_model.model
    with pytest.raises(UnsupportedError, match=r"type peft\.tuners\.ia3"):
        effective_weight(block.kv_b_proj)


def test_layer_that_an_adapter_replaces_is_the_one_in_force():
    model, block = adapted(target_modules=["o_proj"], modules_to_save=["kv_b_proj"])
    block.kv_b_proj.modules_to_save["default"].weight.data.add_(1.0)
    changed = assert_honoured(block)
    with model.disable_adapter():
        assert not torch.equal(assert_honoured(block), changed)


def test_adapted_layer_compiles_without_breaks():
    torch.manual_seed(0)
    _, block = adapted()
    compiled = torch.compile(effective_weight, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(block.kv_b_proj), effective_weight(block.kv_b_proj))
