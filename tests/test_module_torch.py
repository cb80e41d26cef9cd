"""MultiheadLatentAttention inside PyTorch: adapters, meta device, autocast, compile, export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import SMALL, inputs, make_layer
from test_module import oracle
from torch import Tensor

from mla import DenseLatentCache, MultiheadLatentAttention


def test_lora_on_kv_b_proj_is_honoured_in_every_form() -> None:
    peft = pytest.importorskip("peft")
    layer, x = make_layer(SMALL, 8), inputs(1, 9, 8)
    with torch.no_grad():
        plain = layer(x)
    settings = peft.LoraConfig(target_modules=["kv_b_proj"], r=3, lora_alpha=6)
    adapted = peft.inject_adapter_in_model(settings, layer).double().eval()
    for scale in (0.0, 0.5, 1.0):  # a change of the adapter after the first use is seen
        with torch.no_grad():
            adapted.kv_b_proj.lora_B["default"].weight.fill_(scale)
            expanded = adapted(x)
            cache = DenseLatentCache(SMALL, batch_size=1, dtype=torch.float64)
            steps = [adapted(part, cache=cache) for part in x.split([6, 1, 2], 1)]
        torch.testing.assert_close(torch.cat(steps, 1), expanded, rtol=1e-9, atol=1e-9)
        assert torch.equal(expanded, plain) == (scale == 0.0)


def test_meta_device_then_state_dict() -> None:
    source, x = make_layer(SMALL, 9), inputs(1, 5, 9)
    layer = MultiheadLatentAttention(SMALL, device="meta", dtype=torch.float64)
    assert not list(layer.buffers())
    layer.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(layer(x), source(x))


def test_autocast_runs_in_bfloat16() -> None:
    layer, x = make_layer(SMALL, 10, torch.float32), inputs(2, 6, 10, torch.float32)
    cache = DenseLatentCache(SMALL, batch_size=2, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        with torch.no_grad():
            steps = torch.cat([layer(part, cache=cache) for part in x.split([5, 1], 1)], 1)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.kv_b_proj.weight.grad.dtype == torch.float32
    exact = oracle(layer, x.double())
    assert (out.double() - exact).norm() / exact.norm() < 0.03
    assert (steps.double() - exact).norm() / exact.norm() < 0.03


def test_compiles_whole_in_training_and_decoding() -> None:
    layer, x = make_layer(SMALL, 11), inputs(2, 6, 11)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = x.clone().requires_grad_()
    compiled(y).square().sum().backward()
    z = x.clone().requires_grad_()
    layer(z).square().sum().backward()
    torch.testing.assert_close(y.grad, z.grad)
    cache = DenseLatentCache(SMALL, batch_size=2, max_length=16, dtype=torch.float64)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(layer, fullgraph=True, backend=counter)
    more = inputs(2, 10, 12)
    with torch.no_grad():
        layer(x, cache=cache)
        outs = []
        for token in more.split(1, dim=1):
            cache.reserve(1)
            outs.append(step(token, cache=cache))
        expected = layer(torch.cat([x, more], 1))[:, 6:]
    torch.testing.assert_close(torch.cat(outs, 1), expected)
    assert counter.frame_count <= 2, f"{counter.frame_count} compilations of one decode step"


def test_compiled_step_without_reservation_says_so() -> None:
    layer, x = make_layer(SMALL, 13), inputs(1, 2, 13)
    cache = DenseLatentCache(SMALL, batch_size=1, max_length=8, dtype=torch.float64)
    step = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad(), pytest.raises(Exception, match="no reservation"):
        step(x, cache=cache)
    assert cache.max_length == 0


def test_exports() -> None:
    layer, x = make_layer(SMALL, 14), inputs(2, 6, 14)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({1: length},))
    longer = inputs(2, 11, 15)
    torch.testing.assert_close(program.module()(longer), layer(longer))


def test_training_keeps_the_latent_and_not_keys_and_values() -> None:
    x = inputs(1, 64, 16, torch.float32)

    def saved_bytes(save: Any) -> int:
        layer, seen = make_layer(SMALL, 16, torch.float32, save=save), {}
        parameters = {p.data_ptr() for p in layer.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(x)
        return sum(seen.values())

    expanded = 4 * 64 * SMALL.num_attention_heads * (SMALL.qk_nope_head_dim + SMALL.v_head_dim)
    assert saved_bytes("expanded") - saved_bytes("latent") == expanded
