"""Decoding with replaced attention under torch.compile: one graph, compiled once, same tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from hf_models import left_padded, tiny_model
from transformers import CompileConfig, StaticCache
from transformers.masking_utils import create_causal_mask

from mla.codec import Codec, Int4Codec, Int8Codec
from mla.integrations.transformers import StaticLatentCache, replace_attention

CAPACITY = 19
STEPS = 6
# Routed experts branch on data in eager form, hence dense layers.
DENSE = {"deepseek_v3": {"first_k_dense_replace": 2}, "youtu": {}}


def greedy(model: nn.Module, cache: Any, forward: Any, *, mask_outside: bool) -> Tensor:
    """Greedy ids of a left-padded batch; ``forward`` runs the decode steps."""
    batch = left_padded([3, 8, 5])
    mask, ids = batch["attention_mask"], []
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(**batch, position_ids=positions, past_key_values=cache).logits
        for _ in range(STEPS):
            ids.append(logits[:, -1:].argmax(-1))
            mask = torch.cat((mask, mask.new_ones(3, 1)), dim=1)
            full = nn.functional.pad(mask, (0, CAPACITY - mask.shape[1]))
            if mask_outside:  # as `generate` does it
                full = create_causal_mask(
                    config=model.config,
                    inputs_embeds=torch.empty(3, 1, 0),
                    attention_mask=full,
                    past_key_values=cache,
                )
            positions = mask.sum(-1, keepdim=True) - 1
            logits = forward(
                input_ids=ids[-1],
                attention_mask=full,
                position_ids=positions,
                past_key_values=cache,
            ).logits
    return torch.cat(ids, dim=1)


class Recorder:
    """A backend that counts graphs and the joins of whole caches in them."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self.num_graphs = 0
        self.num_joins = 0

    def __deepcopy__(self, memo: Any) -> Recorder:
        return self  # transformers copies the settings it compiles with

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.num_graphs += 1
        for node in graph.graph.nodes:
            if node.target is torch.cat:
                self.num_joins += node.meta["example_value"].shape[1] == self.capacity
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


@pytest.mark.parametrize(
    ("model_type", "kind", "mask_outside"),
    [
        ("deepseek_v3", StaticCache, False),
        ("deepseek_v3", StaticLatentCache, True),
        ("youtu", StaticLatentCache, False),
    ],
)
def test_compiled_decode(model_type: str, kind: type, mask_outside: bool) -> None:
    stock = tiny_model(model_type, **DENSE[model_type])
    ours = copy.deepcopy(stock)
    replace_attention(ours)
    expected = greedy(stock, StaticCache(stock.config, CAPACITY), stock, mask_outside=mask_outside)
    assert expected.unique().numel() > 8
    recorder = Recorder()
    torch._dynamo.reset()
    forward = torch.compile(ours.forward, fullgraph=True, backend=recorder)
    got = greedy(ours, kind(ours.config, CAPACITY), forward, mask_outside=mask_outside)
    assert torch.equal(got, expected)
    assert recorder.num_graphs == 1
    assert recorder.num_joins == (0 if kind is StaticLatentCache else 2)


@pytest.mark.parametrize("codec", [Int8Codec(group=16), Int4Codec(group=16)])
def test_compiled_decode_from_coded_rows(codec: Codec) -> None:
    ours = tiny_model("deepseek_v3", **DENSE["deepseek_v3"])
    replace_attention(ours, codec=codec)
    caches = [StaticLatentCache(ours.config, CAPACITY, codec=codec) for _ in range(2)]
    expected = greedy(ours, caches[0], ours, mask_outside=False)
    recorder = Recorder()
    torch._dynamo.reset()
    forward = torch.compile(ours.forward, fullgraph=True, backend=recorder)
    assert torch.equal(greedy(ours, caches[1], forward, mask_outside=False), expected)
    assert recorder.num_graphs == 1
    for compiled, eager in zip(caches[1].layers, caches[0].layers, strict=True):
        assert torch.equal(compiled.rows, eager.rows)


def test_generate_compiles_decoding_by_itself() -> None:
    """With a static cache transformers compiles the step; on a CPU only when told to."""
    stock = tiny_model("deepseek_v3", first_k_dense_replace=2)
    ours = copy.deepcopy(stock)
    replace_attention(ours)
    torch._dynamo.reset()
    recorder = Recorder(capacity=8 + 6 - 1)
    compile_config = CompileConfig(fullgraph=True, dynamic=False, backend=recorder, mode=None)
    compile_config._compile_all_devices = True
    options = {"max_new_tokens": 6, "cache_implementation": "static", "do_sample": False}
    got = ours.generate(**left_padded([3, 8]), **options, compile_config=compile_config)
    assert torch.equal(got, stock.generate(**left_padded([3, 8]), **options))
    assert recorder.num_graphs == 1 and recorder.num_joins == 0


def test_a_hole_in_the_mask_stops_a_compiled_step() -> None:
    ours = tiny_model("deepseek_v3", first_k_dense_replace=2)
    replace_attention(ours)
    cache = StaticLatentCache(ours.config, CAPACITY)
    torch._dynamo.reset()
    forward = torch.compile(ours.forward, fullgraph=True, backend="aot_eager")
    mask = torch.tensor([[1, 1, 0, 1] + [0] * (CAPACITY - 4)])
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        ours(ids, past_key_values=cache)
        with pytest.raises(RuntimeError, match="row with holes"):
            forward(input_ids=ids[:, :1], attention_mask=mask, past_key_values=cache)


def test_compiled_training_step() -> None:
    """Forward and backward in one graph each, gradients as without compilation."""
    grads = []
    for compiled in (False, True):
        model = tiny_model("deepseek_v3", first_k_dense_replace=2)
        replace_attention(model)
        torch._dynamo.reset()
        forward = model.forward
        if compiled:
            forward = torch.compile(forward, fullgraph=True, backend="aot_eager")
        batch = left_padded([3, 8, 5])
        forward(**batch, use_cache=False).logits.square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)
