"""The ops as torch custom ops: schemas, fakes, compilation without breaks, export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import make_view, randn
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from mla.cache import DenseLatentCache
from mla.codec import Codec, Fp8Codec, Int4Codec, Int8Codec, PlainCodec
from mla.config import MLAConfig
from mla.ops import (
    merge_partials,
    mla_append,
    mla_decode,
    mla_gather,
    mla_norm_rope_append,
    mla_prefill,
)
from mla.ops.library import flatten_view
from mla.view import CacheView

F64 = torch.float64
C, R, H = 24, 6, 3
COUNTS = torch.tensor([1, 2], dtype=torch.int32)
COVERED = {
    "append",
    "decode",
    "gather",
    "merge_partials",
    "norm_rope_append",
    "prefill",
    "prefill_backward",
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def view_of(codec: Codec, page_size: int | None) -> CacheView:
    latent, k_rope = randn(2, 9, C, seed=0, dtype=F64), randn(2, 9, R, seed=1, dtype=F64)
    return make_view(latent, k_rope, [9, 4], codec=codec, page_size=page_size, starts=[1, 0])


def queries(L: int = 2) -> list[Tensor]:
    return [randn(2, L, H, width, seed=width) for width in (C, R)]


def fresh(L: int = 2) -> list[Tensor]:
    return [randn(2, L, width, seed=width) for width in (C, R)]


def prefill_inputs(B: int = 2, L: int = 3, S: int = 4) -> list[Tensor]:
    shapes = [(B, L, H, 4 + R), (B, S, C), (B, S, R), (H * (4 + 5), C)]
    return [randn(*shape, seed=i) for i, shape in enumerate(shapes)]


def test_every_op_is_checked_here():
    names = torch._C._dispatch_get_all_op_names()
    assert {n.removeprefix("mla::") for n in names if n.startswith("mla::")} == COVERED


@pytest.mark.parametrize("codec", [PlainCodec(), Int4Codec()], ids=lambda codec: codec.kind)
@pytest.mark.parametrize("page_size", [None, 3])
def test_opcheck_of_cache_ops(codec, page_size):
    view = flatten_view(view_of(codec, page_size))
    ops, check = torch.ops.mla, torch.library.opcheck
    check(ops.decode.default, (*queries(), *view, 0.3, None, None, "auto"))
    check(ops.decode.default, (*queries(), *view, 0.3, COUNTS, F64, "auto"))
    check(ops.append.default, (*view, *fresh(), None, "auto"))
    check(ops.append.default, (*view, *fresh(), COUNTS, "auto"))
    check(ops.gather.default, (*view, 1, 7, torch.bfloat16, "auto"))
    kv_a, angles = torch.cat(fresh(), dim=-1), torch.ones(2, 2, R // 2)
    for norm, pairing in ((torch.ones(C), "half"), (None, "none")):
        options = (norm, angles, angles, 1e-6, 1.0, pairing, None, "auto")
        check(ops.norm_rope_append.default, (*view, kv_a, *options))


def test_opcheck_of_the_fused_append_of_one_token():
    """With one row of one token every slice is contiguous, so that copies are easily forgotten."""
    view = make_view(randn(1, 3, C, seed=0).double(), randn(1, 3, R, seed=1).double(), [3])
    kv_a, angles = randn(1, 1, C + R, seed=2), torch.ones(1, 1, R // 2)
    options = (None, angles, angles, 1e-6, 1.0, "none", None, "auto")
    torch.library.opcheck(
        torch.ops.mla.norm_rope_append.default, (*flatten_view(view), kv_a, *options)
    )
    torch.library.opcheck(
        torch.ops.mla.gather.default, (*flatten_view(view), 1, 2, torch.float32, "auto")
    )


@pytest.mark.parametrize("has_empty", [False, True])
def test_opcheck_of_merge(has_empty):
    out, lse = randn(3, 2, 4, 5, seed=0), randn(3, 2, 4, seed=1)
    if has_empty:
        lse[1] = float("-inf")
    arguments = (out.requires_grad_(), lse.requires_grad_(), "auto")
    torch.library.opcheck(torch.ops.mla.merge_partials.default, arguments)


MASKS: dict[str, tuple[Any, ...]] = {
    "causal": (True, None, None, None, None, 3, 4),
    "full": (False, None, None, None, None, 3, 4),
    "padded": (True, torch.tensor([1, 0]).int(), torch.tensor([4, 2]).int(), None, None, 3, 4),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("expanded", [False, True])
def test_opcheck_of_prefill(mask, expanded):
    inputs = [x.requires_grad_() for x in prefill_inputs()]
    arguments = (*inputs, 0.3, *MASKS[mask], None, expanded, "auto")
    torch.library.opcheck(torch.ops.mla.prefill.default, arguments)


def test_opcheck_of_packed_prefill():
    query, latent, k_rope, weight = prefill_inputs(B=1, L=7, S=9)
    ends = [torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 3, 7], [0, 4, 6, 9])]
    inputs = [x.requires_grad_() for x in (query, latent, k_rope, weight)]
    arguments = (*inputs, 0.3, True, None, None, *ends, 7, 9, F64, False, "auto")
    torch.library.opcheck(torch.ops.mla.prefill.default, arguments)


@pytest.mark.parametrize("has_lse", [False, True])
def test_opcheck_of_the_backward_op(has_lse):
    inputs = prefill_inputs()
    mask = MASKS["padded"]
    results = torch.ops.mla.prefill.default(*inputs, 0.3, *mask, None, False, "auto")
    grad_out, grad_lse = torch.ones_like(results[0]), torch.ones_like(results[1])
    schema = torch.ops.mla.prefill_backward.default._schema
    arguments = (grad_out, grad_lse if has_lse else None, *inputs, *results, 0.3, *mask)
    if any(argument.name == "impl" for argument in schema.arguments):
        arguments = (*arguments, "auto")
    torch.library.opcheck(torch.ops.mla.prefill_backward.default, arguments)


# --- compiled ------------------------------------------------------------------------------------


def step(
    kv_a: Tensor, q_latent: Tensor, q_rope: Tensor, angles: Tensor, view: CacheView
) -> tuple[Tensor, Tensor]:
    """What a layer does with one token: append it, attend, and both once more by hand."""
    rows = mla_norm_rope_append(
        view, kv_a * 2, None, angles.cos(), angles.sin(), eps=1e-6, pairing="half"
    )
    mla_append(view, rows.latent * 1.5, rows.k_rope)
    out, lse = mla_decode(q_latent, q_rope, view, scale=0.3)
    past = mla_gather(view, 0, view.max_length, dtype=torch.float32)
    merged = merge_partials(torch.stack([out, out]), torch.stack([lse, lse]))
    return merged.out, merged.lse + past.latent.sum()


def step_inputs(length: int, codec: Codec, page_size: int | None) -> tuple[Any, ...]:
    latent = randn(2, length, C, seed=length, dtype=F64)
    k_rope = randn(2, length, R, seed=length + 1, dtype=F64)
    view = make_view(latent, k_rope, [length, length - 2], codec=codec, page_size=page_size)
    tokens = torch.cat(fresh(1), dim=-1)
    return tokens, *queries(1), randn(2, 1, R // 2, seed=3), view.with_length(length)


def assert_compiles(backend: Any, codec: Codec, page_size: int | None) -> None:
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for length in (9, 11, 30):
        *inputs, view = step_inputs(length, codec, page_size)
        *others, other = step_inputs(length, codec, page_size)
        with torch.no_grad():
            for one, two in zip(compiled(*inputs, view), step(*others, other), strict=True):
                torch.testing.assert_close(one, two)
        assert torch.equal(view.rows.view(torch.uint8), other.rows.view(torch.uint8))


@pytest.mark.parametrize("page_size", [None, 3])
@pytest.mark.parametrize("codec", [PlainCodec(), Int8Codec()], ids=lambda codec: codec.kind)
def test_a_step_compiles_without_graph_breaks(codec, page_size):
    counter = CompileCounterWithBackend("aot_eager")
    assert_compiles(counter, codec, page_size)
    assert counter.frame_count <= 2  # once for the sizes seen first, once for all others


@pytest.mark.inductor
def test_a_step_compiles_with_inductor():
    assert_compiles("inductor", Fp8Codec(), None)


@pytest.mark.parametrize(("max_length", "most"), [(256, 1), (None, 3)])
def test_lengths_do_not_compile_again(max_length, most):
    """In a growing cache the first change of the host bound does, and the first new storage."""
    config = MLAConfig(
        hidden_size=8, num_attention_heads=H, kv_lora_rank=C, qk_nope_head_dim=4,
        qk_rope_head_dim=R, v_head_dim=4,
    )  # fmt: skip
    cache = DenseLatentCache(config, batch_size=2, max_length=max_length, dtype=torch.float32)
    counter = CompileCounterWithBackend("eager")

    @torch.compile(backend=counter, fullgraph=True)
    def decode(q_latent: Tensor, q_rope: Tensor, view: CacheView) -> tuple[Tensor, Tensor]:
        return mla_decode(q_latent, q_rope, view, scale=0.3)

    capacities = set()
    with torch.no_grad():
        for count in (5, 1, 1, 1, 60, 1, 40, 1, 100):
            cache.reserve(count)
            view = cache.append(0, *(randn(2, count, w, seed=count) for w in (C, R)))
            capacities.add(cache.capacity)
            expected = mla_decode(*queries(1), view, scale=0.3)
            for one, two in zip(decode(*queries(1), view), expected, strict=True):
                torch.testing.assert_close(one, two)
    assert len(capacities) == (1 if max_length else 3)
    assert counter.frame_count <= most


def test_training_compiles_for_all_sequence_lengths():
    counter = CompileCounterWithBackend("aot_eager")

    def loss(*inputs: Tensor) -> Tensor:
        out, lse = mla_prefill(*inputs, scale=0.3)
        return out.square().sum() + lse.sum()

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for length in (3, 5, 8, 13):
        inputs = [x.requires_grad_() for x in prefill_inputs(2, length, length)]
        actual = torch.autograd.grad(compiled(*inputs), inputs)
        expected = torch.autograd.grad(loss(*inputs), inputs)
        for one, two in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, two)
    assert counter.frame_count <= 2


# --- exported ------------------------------------------------------------------------------------


class Decode(torch.nn.Module):
    def forward(self, q_latent: Tensor, q_rope: Tensor, view: CacheView) -> tuple[Tensor, Tensor]:
        return tuple(mla_decode(q_latent, q_rope, view, scale=0.3))


def test_decode_exports_with_dynamic_sizes(tmp_path):
    def inputs(B: int, S: int) -> tuple[Tensor, Tensor, CacheView]:
        rows = randn(B, S + 3, C + R, seed=S)
        lengths = torch.arange(S, S - B, -1, dtype=torch.int32)
        view = CacheView.dense(rows, lengths, C=C, R=R)
        return randn(B, 1, H, C, seed=1), randn(B, 1, H, R, seed=2), view

    auto = torch.export.Dim.AUTO
    by_batch = {0: auto}
    leaves = [{0: auto, 1: auto}, None, by_batch, None, auto]  # rows .. max_length
    shapes = (by_batch, by_batch, leaves)
    with torch.no_grad():
        program = torch.export.export(Decode(), inputs(2, 9), dynamic_shapes=shapes)
        assert any("mla.decode" in str(node.target) for node in program.graph.nodes)
        torch.export.save(program, tmp_path / "decode.pt2")
        with torch.serialization.safe_globals([CacheView, PlainCodec]):  # of the example inputs
            loaded = torch.export.load(tmp_path / "decode.pt2").module()
        for B, S in ((2, 9), (3, 20), (4, 7)):
            expected = Decode()(*inputs(B, S))
            for one, two in zip(loaded(*inputs(B, S)), expected, strict=True):
                torch.testing.assert_close(one, two)


class Prefill(torch.nn.Module):
    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(mla_prefill(*inputs, scale=0.3))


def test_prefill_exports_with_dynamic_sizes():
    auto = torch.export.Dim.AUTO
    by_token = {0: auto, 1: auto}
    program = torch.export.export(
        Prefill(), tuple(prefill_inputs(2, 5, 5)), dynamic_shapes=((by_token,) * 3 + (None,),)
    )
    for B, L in ((2, 5), (3, 8)):
        expected = Prefill()(*prefill_inputs(B, L, L))
        for one, two in zip(program.module()(*prefill_inputs(B, L, L)), expected, strict=True):
            torch.testing.assert_close(one, two)


# --- gradients -----------------------------------------------------------------------------------


def test_ops_on_the_cache_run_forward_but_refuse_gradients():
    view = view_of(PlainCodec(), None)
    inputs = [x.requires_grad_() for x in queries()]
    out, _ = mla_decode(*inputs, view, scale=0.3)
    with pytest.raises(ValueError, match="mla_decode: the output has requires_grad, expected no"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ops_are_deterministic(dtype):
    view = view_of(Int4Codec(), 3)
    results = [mla_decode(*(q.to(dtype) for q in queries()), view, scale=0.3) for _ in range(2)]
    assert torch.equal(results[0].out, results[1].out)
    outs = [mla_prefill(*(x.to(dtype) for x in prefill_inputs()), scale=0.3) for _ in range(2)]
    assert torch.equal(outs[0].out, outs[1].out)
