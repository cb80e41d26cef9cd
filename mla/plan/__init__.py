"""What a step costs and how that grows, from sizes alone; no device is needed.

    cost            bytes cached, multiply-adds, where two forms cross
    communication   bytes that tensor and context parallel groups exchange
    devices         data sheets of devices and links
    models          the layers of published models and of a config
    roofline        bytes, flops and time of one decode step on one device or a group
    measured        measured shares of a device's limits, from the rows of the benchmarks
    splits          the best split of 8 to 512 devices

`mla.plan` itself has `cost` and `communication`; the others are imported by name.
"""

from mla.plan.communication import (
    Traffic,
    context_parallel_decode_bytes,
    context_parallel_prefill_bytes,
    tensor_parallel_bytes,
)
from mla.plan.cost import (
    StepCost,
    absorbed_step,
    break_even_intensity,
    bytes_per_token,
    cost_per_million_tokens,
    crossover,
    grouped_bytes_per_token,
    grouped_step,
    sequences_that_fit,
    should_absorb,
)

__all__ = [
    "StepCost",
    "Traffic",
    "absorbed_step",
    "break_even_intensity",
    "bytes_per_token",
    "context_parallel_decode_bytes",
    "context_parallel_prefill_bytes",
    "cost_per_million_tokens",
    "crossover",
    "grouped_bytes_per_token",
    "grouped_step",
    "sequences_that_fit",
    "should_absorb",
    "tensor_parallel_bytes",
]
