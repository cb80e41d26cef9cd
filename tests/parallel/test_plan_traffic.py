"""Bytes that the plan predicts for a layer against those that gloo processes exchange."""

from __future__ import annotations

import pytest
import torch
from plan_ranks import traffic_of_layer
from processes import run_ranks

from mla.config import MLAConfig, RopeConfig
from mla.plan import (
    context_parallel_decode_bytes,
    context_parallel_prefill_bytes,
    tensor_parallel_bytes,
)

CONFIG = MLAConfig(
    hidden_size=20,
    num_attention_heads=4,
    kv_lora_rank=24,
    qk_nope_head_dim=10,
    qk_rope_head_dim=6,
    v_head_dim=14,
    rope=RopeConfig(),
)
BATCH, PROMPT, NEW = 3, 12, 2


@pytest.mark.parametrize(("tensor", "context"), [(2, 1), (1, 3), (2, 2)])
def test_a_layer_exchanges_what_the_plan_says(tensor, context):
    def reduced(new_tokens):
        sizes = {"batch": BATCH, "new_tokens": new_tokens, "tensor": tensor}
        return tensor_parallel_bytes(CONFIG, dtype=torch.float32, **sizes).sent

    gathered = context_parallel_prefill_bytes(
        CONFIG, batch=BATCH, num_tokens=PROMPT, context=context, dtype=torch.float32
    )
    merged = context_parallel_decode_bytes(
        CONFIG, batch=BATCH, new_tokens=NEW, context=context, tensor=tensor
    )
    sizes = (BATCH, PROMPT, NEW, tensor)
    for counts in run_ranks(traffic_of_layer, tensor * context, CONFIG, *sizes):
        assert counts.prefill.get("all_reduce", 0) == reduced(PROMPT // context)
        assert counts.prefill.get("all_gather", 0) == gathered.sent
        assert counts.step.get("all_reduce", 0) == reduced(NEW)
        assert counts.step.get("all_gather", 0) == merged.sent
        kinds = [name for name, n in (("all_gather", context), ("all_reduce", tensor)) if n > 1]
        assert sorted({*counts.prefill, *counts.step}) == kinds
