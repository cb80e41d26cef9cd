"""MLA on several devices, applied to a finished module from outside, on torch.distributed.

    shard_heads(model, mesh["tp"])       tensor parallelism: heads sharded, the latent replicated
    shard_context(model, mesh["cp"])     context parallelism: tokens and cached pages sharded

Importing this package also tells DTensor how the ops of `mla.ops` may be sharded.

Files:

    plans.py         which submodule is sharded how, as data
    tensor.py        those plans applied with `parallelize_module`
    sharding.py      rules of DTensor for our ops
    sequence.py      sequences cut in zigzag order, and put together again
    context.py       decode and prefill over the ranks that share a context
    context_layer.py the layer on top of them
    traffic.py       bytes that collectives move, counted
"""

from mla.parallel import sharding  # noqa: F401 - registers its rules
from mla.parallel.context import context_decode, context_prefill, shard_view, sum_gradients
from mla.parallel.context_layer import shard_context
from mla.parallel.plans import TP_PLAN, head_plan
from mla.parallel.sequence import gather_sequence, shard_of, shard_sequence, zigzag_positions
from mla.parallel.tensor import Replicated, parallel_styles, shard_heads
from mla.parallel.traffic import count_traffic

__all__ = [
    "TP_PLAN",
    "Replicated",
    "context_decode",
    "context_prefill",
    "count_traffic",
    "gather_sequence",
    "head_plan",
    "parallel_styles",
    "shard_context",
    "shard_heads",
    "shard_of",
    "shard_sequence",
    "shard_view",
    "sum_gradients",
    "zigzag_positions",
]
