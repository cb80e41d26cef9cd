"""Causal prefill of one sequence from its latents, forward alone and with its backward pass.

    sdpa        keys and values expanded from the latents, then SDPA
    sdpa heads  the same, the expansion left out: what attention alone takes
    flex        expanded, then FlexAttention, compiled; on a CPU it has no backward pass
    torch       impl="torch"
    triton      impl="triton", on CUDA

On a CPU SDPA gets values padded to the width of keys, since its fused attention takes no others; on
CUDA both forms run and the padded one is `sdpa padded`. ``over_sdpa`` is the time over that of the
fastest of `sdpa` and `sdpa padded`, expansion included: 1.1 is 10 % slower. `training` is forward
and backward together: ours keeps latents instead of keys and values and expands them once more.

Dims: L tokens, H heads, C=512, N=128, R=64, V=128.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import baselines, flex, roofline
from benchmarks.harness import Candidate, Point, gate
from benchmarks.memory import with_peak
from benchmarks.notes import skipped
from benchmarks.prefill_cases import SCALE, Inputs, Sizes, draw, expand, truth
from benchmarks.report import Row
from benchmarks.sweep import TOLERANCES, Benchmark, Comparison, Options, main
from mla.ops import mla_prefill
from mla.ops.select import Impl

NAME = "prefill"
GIVEN, FLEX = "sdpa heads", "flex"
SDPA = ("sdpa", "sdpa padded")
SMALL = 37  # tokens of the check against the oracle, with 2 heads


def points(quick: bool) -> list[Point]:
    cases = [("forward", "bfloat16", 16, 512), ("forward", "float32", 16, 512)]
    cases += [("training", "float32", 16, 512)]
    if not quick:
        cases += [("forward", dtype, 16, L) for dtype in ("bfloat16", "float32")
                  for L in (128, 1024, 2048, 4096)]  # fmt: skip
        cases += [("forward", "bfloat16", 128, 1024)]
        cases += [("training", "float32", 16, L) for L in (128, 1024, 2048)]
        cases += [("training", "bfloat16", 16, L) for L in (512, 1024, 2048)]
    return [dict(zip(("mode", "dtype", "H", "L"), case, strict=True)) for case in cases]


def impls_at(point: Point) -> tuple[str, ...]:
    """The first is the baseline."""
    is_cpu = baselines.device().type == "cpu"
    sdpa = SDPA[:1] if is_cpu else SDPA
    dtype = getattr(torch, str(point["dtype"]))
    names = (*sdpa, GIVEN, *baselines.ours_here("mla_prefill", dtype))
    reason = flex.reason_absent()
    if reason is None and is_cpu and point["mode"] == "training":
        reason = "it has no backward pass on a CPU"
    if reason is not None:
        skipped(NAME, FLEX, reason)
        return names
    return (*names, FLEX)


@lru_cache(maxsize=1)
def inputs(dtype: torch.dtype, H: int, L: int) -> Inputs:
    return draw(L, Sizes(H=H), baselines.device(), dtype)


def of(point: Point) -> Inputs:
    return inputs(getattr(torch, str(point["dtype"])), int(point["H"]), int(point["L"]))


def attend(x: Inputs, impl: str) -> Callable[[Inputs], Tensor]:
    """A function of the leaves; ``[1, L, H, V]``."""
    sizes = Sizes(H=x.query.shape[2])
    if impl == FLEX:

        def by_flex(given: Inputs) -> Tensor:
            query, keys, values = expand(given, sizes, False)
            return flex.attention(query, keys, values, scale=SCALE)().transpose(1, 2)

        return by_flex
    if impl not in (*SDPA, GIVEN):
        name = cast(Impl, impl)
        return lambda given: mla_prefill(*given, scale=SCALE, causal=True, impl=name).out
    padded = x.query.is_cpu or impl == "sdpa padded"
    with torch.no_grad():
        heads = expand(x, sizes, padded) if impl == GIVEN else None

    def by_sdpa(given: Inputs) -> Tensor:
        out = _sdpa(*(heads or expand(given, sizes, padded)))
        return out[..., : sizes.V].transpose(1, 2)

    return by_sdpa


def _sdpa(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=SCALE)


def call(x: Inputs, impl: str, mode: str) -> Callable[[], tuple[Tensor, ...]]:
    """Forward: (out,). Training: the gradients of the leaves for a gradient of ones."""
    if mode == "forward":
        x = Inputs(*(leaf.detach() for leaf in x))
    function = attend(x, impl)
    if mode == "forward":
        return lambda: (function(x),)
    if impl == GIVEN:
        return _attention_alone(x)

    def run() -> tuple[Tensor, ...]:
        out = function(x)
        return torch.autograd.grad(out, x, torch.ones_like(out))

    return run


def _attention_alone(x: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """Gradients of query, keys and values."""
    with torch.no_grad():
        expanded = expand(x, Sizes(H=x.query.shape[2]), x.query.is_cpu)
    query, keys, values = (tensor.detach().requires_grad_() for tensor in expanded)

    def run() -> tuple[Tensor, ...]:
        out = _sdpa(query, keys, values)
        return torch.autograd.grad(out, (query, keys, values), torch.ones_like(out))

    return run


def verify(point: Point, impl: str) -> None:
    """Hold output and every gradient of a short sequence against the oracle in float64.

    Raises:
        GateError: naming what is wrong.
    """
    mode, sizes = str(point["mode"]), Sizes(H=2)
    dtype = getattr(torch, str(point["dtype"]))
    x = draw(SMALL, sizes, baselines.device(), dtype)
    if impl == GIVEN and mode == "training":
        return  # gradients of other leaves: nothing to hold them against
    found = call(x, impl, mode)()
    for (name, theirs), ours in zip(
        truth(x, sizes, gradients=mode == "training").items(), found, strict=True
    ):
        gate(
            {f"{impl} {name}": ours.detach().cpu()},
            expected=theirs,
            tolerance=TOLERANCES[str(point["dtype"])],
            point={**point, "L": SMALL},
        )


def cost(point: Point, impl: str) -> roofline.Cost:
    size, L, H = of(point).query.itemsize, int(point["L"]), int(point["H"])
    widths = {**dict(zip("HCNRV", Sizes(), strict=True)), "H": H}
    forward = roofline.prefill(L, **widths, size=size)
    expansion = roofline.expand(L, H, widths["C"], widths["N"], widths["V"], size=size)
    backward = roofline.Cost(0, 0)
    if point["mode"] == "training":
        backward = roofline.prefill_backward(L, **widths, size=size)
    times = 1 if point["mode"] == "forward" else 4
    left_out = times * expansion.num_flops if impl == GIVEN else 0
    num_flops = forward.num_flops + backward.num_flops - left_out
    return roofline.Cost(forward.num_bytes + backward.num_bytes, num_flops)


def setup(point: Point, impl: str) -> Candidate:
    """A point's own results are compared with those of the baseline."""
    run = call(of(point), impl, str(point["mode"]))
    num_bytes, num_flops, _ = cost(point, impl)

    def first() -> Tensor | None:
        result = run()
        is_other = impl == GIVEN and point["mode"] == "training"
        return None if is_other else result[min(1, len(result) - 1)]

    return Candidate(run=first, num_bytes=num_bytes, num_flops=num_flops)


def rows_at(point: Point, options: Options, on_round: Callable[[], None]) -> list[Row]:
    names = []
    for impl in impls_at(point):
        if impl == FLEX:
            reason = flex.refusal(call(of(point), impl, str(point["mode"])))
            if reason is not None:
                skipped(NAME, impl, reason)
                continue
        verify(point, impl)
        names.append(impl)
    rows = Comparison(impls=tuple(names), setup=setup).rows_at(point, options, on_round)
    times = {str(row["impl"]): baselines.clock(row) for row in rows}
    sdpa = min((time for name in SDPA if (time := times.get(name))), default=None)
    found: list[Row] = []
    for row in rows:
        time = times[str(row["impl"])]
        ratio = time / sdpa if time and sdpa else None
        new = baselines.placed({**row, "over_sdpa": ratio})
        run = call(of(point), str(row["impl"]), str(point["mode"]))
        found.append(with_peak(new, run) if time else new)
    return found


BENCHMARK = Benchmark(
    name=NAME,
    title="Causal prefill of one sequence, C=512, N=128, R=64, V=128",
    points=points,
    rows_at=rows_at,
    hidden=("bytes", "flops", "rounds", "p20_ms", "p80_ms", "cpu_speedup", "speedup"),
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
