"""The layer under context parallelism against the same layer on one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from context_ranks import (
    LayerWork,
    layers_of_all,
    one_raises,
    refusals,
    run_layer,
    traffic_of_decode,
    traffic_of_layer,
    train_layer,
)
from helpers import assert_within_budget
from hypothesis import given
from hypothesis import strategies as st
from layers import SMALL
from processes import RanksFailed, run_ranks
from strategies import CODECS, SEEDS, DecodeCase
from test_context import DRAWN, TIMEOUT, decode_work
from test_decode import F64
from test_module import CONFIGS
from torch import Tensor

from mla.codec import PlainCodec
from mla.plan import (
    context_parallel_decode_bytes,
    context_parallel_prefill_bytes,
    tensor_parallel_bytes,
)


@st.composite
def layer_work(draw: Any, **fixed: Any) -> LayerWork:
    B = draw(st.integers(1, 3))
    lengths = st.one_of(st.integers(0, 3), st.integers(0, 25))  # some ranks get no page of a row
    config = draw(CONFIGS)
    if (heads := fixed.pop("heads", None)) is not None:
        config = replace(config, num_attention_heads=draw(heads))
    codec = draw(st.sampled_from(CODECS))
    # Where rows are coded, a last bit decides about a whole step of the codec: in float64 only.
    dtypes = [F64, torch.float32, torch.bfloat16] if codec == PlainCodec() else [F64]
    fields = {
        "config": config,
        "seed": draw(SEEDS),
        "dtype": draw(st.sampled_from(dtypes)),
        "codec": codec,
        "page_size": draw(st.sampled_from([1, 3, 8])),
        "lengths": draw(st.tuples(*[lengths] * B).filter(any)),
        "steps": draw(st.sampled_from([(1, 1, 1), (1, 5, 1), (2, 1)])),
    }
    return LayerWork(**{**fields, **fixed})


def draw_training(draw: Any, count: int, **fixed: Any) -> LayerWork:
    length = 2 * count * draw(st.integers(1, 3))
    return draw(layer_work(lengths=(length, length), steps=(), **fixed))


# (ranks, of them sharing the heads of the same context)
@pytest.mark.parametrize(("count", "heads"), [(2, 1), (4, 1), (4, 2)])
@DRAWN
@given(data=st.data())
def test_the_layer_is_that_of_one_process(data, count, heads):
    fixed = {"heads": st.sampled_from([2, 6])} if heads > 1 else {}
    inference = data.draw(st.lists(layer_work(**fixed), min_size=5, max_size=5))
    training = [draw_training(data.draw, count // heads, **fixed) for _ in range(3)]
    ranks = run_ranks(layers_of_all, count, inference, training, heads, timeout=TIMEOUT)
    for i, item in enumerate(inference):
        check_inference(item, [results[0][i] for results in ranks])
    for i, item in enumerate(training):
        check_training(item, [results[1][i] for results in ranks])


def check_inference(item: LayerWork, ranks: list[list[Tensor]]) -> None:
    oracle, plain = run_layer(item._replace(dtype=F64)), run_layer(item)
    for step, (wanted, eager) in enumerate(zip(oracle, plain, strict=True)):
        for b, length in enumerate(item.lengths):
            end = length if step == 0 else None
            parts = [x[b, :end] for x in (ranks[0][step], wanted, eager)]
            # The eager run may be lucky in one row: what it loses in all of them counts.
            assert_within_budget(*parts, f"row {b} of step {step}", least=wanted.abs().max())
        for results in ranks[1:]:
            if step > 0:
                assert torch.equal(results[step], ranks[0][step])


def check_training(item: LayerWork, ranks: list[list[Tensor]]) -> None:
    oracle, plain = train_layer(item._replace(dtype=F64)), train_layer(item)
    names = ["out", "hidden_states", *(n for n, _ in item.layer().named_parameters())]
    least = 4 * (item.config.num_attention_heads * item.config.v_head_dim) ** 0.5
    for results in ranks:
        for name, *parts in zip(names, results, oracle, plain, strict=True):
            assert_within_budget(*parts, name, least=least)


EXAMPLE = DecodeCase(
    L=1, H=2, C=5, R=2, lengths=(7,), starts=None, query_lengths=None, page_size=3,
    codec=PlainCodec(), dtype=torch.float32, magnitudes=(1.0, 1.0), seed=0,
)  # fmt: skip


def test_the_others_end_when_a_rank_raises():
    work = decode_work(EXAMPLE, 2, None)
    with pytest.raises(RanksFailed) as failure:
        run_ranks(one_raises, 2, work, timeout=20)
    waited, raised = failure.value.outcomes
    assert "this rank gives up" in raised
    assert "wait_tensor" in waited or "closed" in waited.lower()
    assert failure.value.seconds < 15


@pytest.mark.parametrize(("count", "heads"), [(2, 1), (4, 2)])
def test_bytes_of_a_layer_are_those_of_the_formulas(count, heads):
    B, S, L = 2, 8, 3
    config = replace(SMALL, num_attention_heads=4)
    k, e = count // heads, 4
    options: dict[str, Any] = {"batch": B, "dtype": torch.float32}
    gathered = context_parallel_prefill_bytes(config, num_tokens=S, context=k, **options).sent
    assert gathered == (k - 1) * B * S // k * (config.kv_lora_rank + config.qk_rope_head_dim) * e
    merged = context_parallel_decode_bytes(
        config, batch=B, context=k, tensor=heads, new_tokens=L
    ).sent
    assert merged == (k - 1) * B * L * (4 // heads) * (config.v_head_dim + 1) * e
    reduced = {
        n: {"all_reduce": tensor_parallel_bytes(config, tensor=heads, new_tokens=n, **options).sent}
        for n in (S // k, L)
        if heads > 1
    }
    for found in run_ranks(traffic_of_layer, count, config, B, S, L, heads):
        assert found["forward"] == {"all_gather": gathered, **reduced.get(S // k, {})}
        assert found["backward"]["reduce_scatter"] == gathered
        assert found["step"] == {"all_gather": merged, **reduced.get(L, {})}


def test_bytes_of_decode_are_those_of_the_plan():
    case = replace(EXAMPLE, L=2, lengths=(7, 3))
    config = replace(
        SMALL, num_attention_heads=case.H, kv_lora_rank=case.C, qk_rope_head_dim=case.R
    )
    plan = context_parallel_decode_bytes(config, batch=2, context=3, new_tokens=2, width=case.C)
    for found in run_ranks(traffic_of_decode, 3, decode_work(case, 3, None)):
        assert found == plan.sent == 2 * 2 * 2 * case.H * (case.C + 1) * 4


REFUSED = [
    "shard_context: module has type Linear without an MLA layer",
    "MultiheadLatentAttention: attn_mask has a value under context parallelism",
    "MultiheadLatentAttention: cu_seqlens has a value under context parallelism",
    "MultiheadLatentAttention: cache has shard (0, 1), expected",
    "context_decode: view has shard (0, 1), expected",
    "gather_sequence: x has 3 positions, expected two chunks",
    "process_group: mesh has dims ('tp', 'cp'), expected one",
]


def test_refusals():
    outcome = run_ranks(refusals, 2)
    for messages in outcome:
        for message, start in zip(messages, REFUSED, strict=True):
            assert message.startswith(start)
