"""MLA on several devices, applied to a finished module from outside, on torch.distributed.

    shard_heads(model, mesh["tp"])       tensor parallelism: heads sharded, the latent replicated

Importing this package also tells DTensor how the ops of `mla.ops` may be sharded.

Files:

    plans.py         which submodule is sharded how, as data
    tensor.py        those plans applied with `parallelize_module`
    sharding.py      rules of DTensor for our ops
"""

from mla.parallel import sharding  # noqa: F401 - registers its rules
from mla.parallel.plans import TP_PLAN, head_plan
from mla.parallel.tensor import Replicated, parallel_styles, shard_heads

__all__ = ["TP_PLAN", "Replicated", "head_plan", "parallel_styles", "shard_heads"]
