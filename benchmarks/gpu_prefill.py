"""Causal prefill of one sequence on a GPU, forward and backward, against PyTorch's own attention.

``given=0`` rows do the whole op, from the latent; ``given=1`` rows get expanded keys and values.
Every backend of `scaled_dot_product_attention` is tried, with values padded to the width of keys
where it needs that; those that cannot run leave a row that says why.

Dims: L tokens, H heads, C latent, N unrotated, R rotated, V value width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import roofline
from benchmarks.gpu_measure import Task
from benchmarks.harness import Point, gate
from benchmarks.prefill_cases import SCALE, Inputs, Sizes, draw, expand, truth
from mla.kernels import launch
from mla.ops import mla_prefill

BACKENDS = {
    "flash padded": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "cudnn padded": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "efficient padded": SDPBackend.EFFICIENT_ATTENTION,
}


SMALL = Sizes(2, 32, 32, 16, 32)


def points() -> list[Point]:
    found: list[Point] = []
    for mode in ("forward", "backward"):
        for L in (8192, 16384):
            for impl, given in (
                ("triton", 0),
                *((name, given) for given in (0, 1) for name in BACKENDS),
                ("torch", 0),
            ):
                found.append({"impl": impl, "mode": mode, "L": L, "given": given})
    return found


def cost(point: Point) -> roofline.Cost:
    sizes, L = Sizes(), int(point["L"])
    widths = dict(zip("HCNRV", sizes, strict=True))
    op = roofline.prefill if point["mode"] == "forward" else roofline.prefill_backward
    found = op(L, **widths, size=2)
    if point["given"]:
        expansion = 2 * sizes.C * L * sizes.H * (sizes.N + sizes.V)
        share = 1 if point["mode"] == "forward" else 3
        found = found._replace(num_flops=found.num_flops - share * expansion)
    return found


def prepare(point: Point) -> Task:
    """The call to time."""
    inputs = draw(int(point["L"]), Sizes(), torch.device("cuda"), torch.bfloat16)
    return Task(_call(point, inputs, Sizes()), cost(point), capture=False)  # milliseconds long


def verify(point: Point) -> None:
    """Hold a short sequence, and its gradients, against the oracle in float64.

    Raises:
        GateError: the implementation computes something else.
    """
    is_small = launch.is_interpreting()
    device = torch.device("cpu" if is_small else "cuda")
    sizes = SMALL if is_small else Sizes(H=2)
    dtype = torch.float32 if is_small else torch.bfloat16
    inputs = draw(40 if is_small else 333, sizes, device, dtype)
    mode = "forward" if point["given"] else str(point["mode"])  # their gradients have no oracle
    expected = truth(inputs, sizes, gradients=mode == "backward")
    found = _call({**point, "mode": mode}, inputs, sizes)()
    for (name, theirs), ours in zip(expected.items(), found, strict=True):
        gate(
            {f"{point['impl']} {name}": ours.detach()},
            expected=theirs.detach().to(device),
            tolerance=3e-2,
            point={"mode": mode, "given": point["given"]},
        )


def verify_key(point: Point) -> tuple[Any, ...]:
    return tuple(point[key] for key in ("impl", "mode", "given"))


def _call(point: Point, inputs: Inputs, sizes: Sizes) -> Callable[[], tuple[Tensor, ...]]:
    """Forward: (out,). Backward: the gradients for a gradient of ones."""
    impl: Any = point["impl"]
    leaves: tuple[Tensor, ...] = inputs
    if impl in ("triton", "torch"):

        def attend(*given: Tensor) -> Tensor:
            out: Tensor = mla_prefill(*given, scale=SCALE, causal=True, impl=impl).out
            return out
    else:
        padded, backend = impl.endswith("padded"), BACKENDS[impl]
        if point["given"]:
            with torch.no_grad():
                expanded = expand(inputs, sizes, padded)
            leaves = tuple(x.requires_grad_() for x in expanded)

        def attend(*given: Tensor) -> Tensor:
            whole = given if point["given"] else expand(Inputs(*given), sizes, padded)
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(*whole, is_causal=True, scale=SCALE)
            return out[..., : sizes.V].transpose(1, 2)

    if point["mode"] == "forward":

        @torch.no_grad()
        def forward() -> tuple[Tensor, ...]:
            return (attend(*leaves),)

        return forward
    out = attend(*leaves)
    gradient = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True)
