"""Bytes that groups exchange: by hand for DeepSeek-V3, and against rings that are played out."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mla.checks import ShapeError
from mla.config import MLAConfig, RopeConfig
from mla.plan import (
    Traffic,
    context_parallel_decode_bytes,
    context_parallel_prefill_bytes,
    tensor_parallel_bytes,
)
from mla.plan.communication import ring_all_gather, ring_all_reduce

V3 = MLAConfig.preset("deepseek-v3")
SMALL = MLAConfig(
    hidden_size=40,
    num_attention_heads=12,
    kv_lora_rank=24,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    rope=RopeConfig(),
)
SIZES = st.integers(1, 9)


def test_deepseek_v3_by_hand():
    """D = 7168, H = 128, C = 512, R = 64, V = 128; 2 bytes a number, 4 for partial results."""
    eight = tensor_parallel_bytes(V3, batch=1, tensor=8)
    assert eight == Traffic(payload=14_336, sent=25_088, messages=14)
    assert tensor_parallel_bytes(V3, batch=32, tensor=8).payload == 458_752
    four = context_parallel_decode_bytes(V3, batch=1, context=4)
    assert four == Traffic(payload=66_048, sent=198_144, messages=3)  # 128 * 129 * 4, three times
    both = context_parallel_decode_bytes(V3, batch=1, context=4, tensor=8)
    assert both == Traffic(payload=8_256, sent=24_768, messages=3)
    latent = context_parallel_decode_bytes(V3, batch=1, context=4, width=512)
    assert latent.payload == 262_656  # 128 * 513 * 4
    prompt = context_parallel_prefill_bytes(V3, batch=1, num_tokens=131_072, context=4)
    assert prompt == Traffic(payload=37_748_736, sent=113_246_208, messages=3)  # 32768 * 576 * 2


@given(num_devices=st.integers(1, 9), chunk=st.integers(1, 20))
def test_ring_all_reduce_is_a_reduce_scatter_and_an_all_gather(num_devices, chunk):
    """Play the ring: every device passes one of its chunks on, until all have all sums."""
    n = num_devices
    parts = [[{(device, c)} for c in range(n)] for device in range(n)]
    sent = steps = 0
    for turn in range(2 * (n - 1)):
        passed = [(device, (device - turn) % n) for device in range(n)]
        moving = [parts[device][c] for device, c in passed]
        for (device, c), part in zip(passed, moving, strict=True):
            target = (device + 1) % n
            parts[target][c] = part | parts[target][c] if turn < n - 1 else part
        sent, steps = sent + chunk, steps + 1
    assert all(parts[d][c] == {(x, c) for x in range(n)} for d in range(n) for c in range(n))
    expected = Traffic(n * chunk, sent, steps) if n > 1 else Traffic(0, 0, 0)
    assert ring_all_reduce(n * chunk, n) == expected


@given(num_devices=st.integers(1, 9), payload=st.integers(1, 20))
def test_ring_all_gather_passes_every_part_on(num_devices, payload):
    n = num_devices
    owned = [{device} for device in range(n)]
    sent = steps = 0
    for turn in range(n - 1):
        for device in range(n):
            owned[(device + 1) % n] |= {(device - turn) % n}
        sent, steps = sent + payload, steps + 1
    assert all(own == set(range(n)) for own in owned)
    assert ring_all_gather(payload, n) == Traffic(payload * (n > 1), sent, steps)


@given(batch=SIZES, new_tokens=SIZES)
def test_one_device_exchanges_nothing(batch, new_tokens):
    nothing = Traffic(0, 0, 0)
    sizes = {"batch": batch, "new_tokens": new_tokens}
    assert tensor_parallel_bytes(SMALL, tensor=1, **sizes) == nothing
    assert context_parallel_decode_bytes(SMALL, context=1, **sizes) == nothing
    prefill = context_parallel_prefill_bytes(SMALL, batch=batch, num_tokens=new_tokens, context=1)
    assert prefill == nothing and nothing.seconds(1e9, latency=1.0) == 0


@given(batch=SIZES, new_tokens=SIZES, context=st.integers(2, 8))
def test_bytes_grow_with_the_batch_and_not_with_the_cached_context(batch, new_tokens, context):
    one = context_parallel_decode_bytes(SMALL, batch=1, context=context)
    many = context_parallel_decode_bytes(SMALL, batch=batch, new_tokens=new_tokens, context=context)
    assert many == (batch * new_tokens * one.payload, batch * new_tokens * one.sent, context - 1)
    assert one.payload == 12 * (10 + 1) * 4
    reduced = tensor_parallel_bytes(SMALL, batch=batch, new_tokens=new_tokens, tensor=4)
    assert reduced.payload == batch * new_tokens * 40 * 2
    wide = tensor_parallel_bytes(SMALL, batch=1, tensor=4, dtype=torch.float32)
    assert wide.payload == 40 * 4


@given(num_tokens=st.integers(1, 100), context=st.integers(2, 8))
def test_a_prompt_is_padded_to_two_chunks_for_each_device(num_tokens, context):
    found = context_parallel_prefill_bytes(SMALL, batch=1, num_tokens=num_tokens, context=context)
    tokens = found.payload // (32 * 2)
    assert tokens == 2 * math.ceil(num_tokens / (2 * context))
    assert found.sent == (context - 1) * found.payload


def test_time_is_bytes_over_the_link_and_messages_in_turn():
    traffic = Traffic(100, 3000, 7)
    assert traffic.seconds(1000.0) == 3.0
    assert traffic.seconds(1000.0, latency=0.5) == 6.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tensor_parallel_bytes(SMALL, batch=0, tensor=2), "batch has value 0"),
        (lambda: tensor_parallel_bytes(SMALL, batch=1, tensor=5), "a divisor of 12 heads"),
        (lambda: tensor_parallel_bytes(SMALL, batch=1, tensor=0), "tensor has value 0"),
        (
            lambda: context_parallel_decode_bytes(SMALL, batch=1, context=2.0),
            "context has value 2.0, expected an integer",
        ),
        (
            lambda: context_parallel_decode_bytes(SMALL, batch=1, context=2, tensor=7),
            "tensor has value 7",
        ),
        (
            lambda: context_parallel_prefill_bytes(SMALL, batch=1, num_tokens=0, context=2),
            "num_tokens has value 0",
        ),
    ],
)
def test_bad_sizes_are_refused(call, message):
    with pytest.raises(ShapeError, match=message):
        call()
