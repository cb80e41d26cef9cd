"""Which implementation computes an op: one table, read by dispatch, `info`, README and tests.

Pure: the answer depends on the case alone, never on timing or on the values of tensors.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal, NamedTuple

import torch

from mla.checks import FLOAT_DTYPES, UnsupportedError

Impl = Literal["auto", "triton", "cpp", "torch"]
OpName = Literal["mla_decode", "mla_prefill", "mla_append", "mla_gather", "merge_partials"]
OPS: tuple[OpName, ...] = (
    "mla_decode",
    "mla_prefill",
    "mla_append",
    "mla_gather",
    "merge_partials",
)


class Case(NamedTuple):
    """What the choice may depend on."""

    op: OpName
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    codec: str = "plain"
    widths: tuple[int, int] = (0, 0)  # of keys and of values, N+R and V; prefill alone
    num_keys: int = 0  # of the longest sequence


class Win(NamedTuple):
    """Prefill that was timed on a device, Triton ahead of the fastest backend of SDPA."""

    architecture: str
    dtype: torch.dtype
    widths: tuple[int, int]
    least_keys: int  # and no measured length above it was slower


# From benchmarks/gpu_prefill.py, forward and backward both; empty: nothing has been timed yet.
PREFILL_WINS: tuple[Win, ...] = ()


def _never(case: Case) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One row of the support table."""

    name: str
    devices: tuple[str, ...]  # that "auto" takes it on; empty: all
    batch_invariant: bool
    note: str
    reason_not: Callable[[Case], str | None]  # None: can run
    kernels: dict[str, str]  # op, or a part of one -> "module:function"
    reason_passed: Callable[[Case], str | None] = _never  # why "auto" leaves what can run

    @property
    def ops(self) -> tuple[OpName, ...]:
        return tuple(op for op in OPS if op in self.kernels)


def _torch_reason(case: Case) -> str | None:
    if case.dtype not in FLOAT_DTYPES:
        return f"needs a floating dtype, got {case.dtype}"
    return None


def _triton_reason(case: Case) -> str | None:
    if case.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"needs float32, bfloat16 or float16, got {case.dtype}"
    if importlib.util.find_spec("triton") is None:
        return "needs triton: pip install 'mla[triton]'"
    from mla.kernels import launch

    if case.device != "cuda" and not launch.is_interpreting():
        return f"needs a CUDA or ROCm device, got {case.device}"
    if case.device == "cuda" and not torch.cuda.is_available():
        return "needs a CUDA or ROCm device, none is available"
    try:
        launch.architecture(torch.device(case.device))
    except UnsupportedError as error:
        return str(error)
    return None


def _triton_passed(case: Case) -> str | None:
    """Prefill is left to SDPA, which is good at it, except where a measurement says otherwise."""
    if case.op != "mla_prefill":
        return None
    from mla.kernels import launch

    architecture = launch.architecture(torch.device(case.device))
    wins = [win for win in PREFILL_WINS if win.architecture == architecture]
    if not wins:
        return f"not yet timed against SDPA on {architecture}; runs on request"
    kind = (case.dtype, case.widths)
    if any((win.dtype, win.widths) == kind and case.num_keys >= win.least_keys for win in wins):
        return None
    return f"not measured to be faster than SDPA on {architecture} at this shape; runs on request"


def _cpp_reason(case: Case) -> str | None:
    if case.device != "cpu":
        return f"needs a CPU, got {case.device}"
    if case.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"needs float32, bfloat16 or float16, got {case.dtype}"
    from mla.kernels import cpu

    return cpu.reason_absent()


# Fastest first; "auto" takes the first row that can run and that it does not pass over.
TABLE: tuple[Implementation, ...] = (
    Implementation(
        name="triton",
        devices=("cuda",),
        batch_invariant=True,
        note="Triton kernels for sm80 to sm120 and gfx942, gfx950; float32 to float16",
        reason_not=_triton_reason,
        kernels={
            "mla_decode": "mla.kernels.decode:decode",
            "mla_prefill": "mla.kernels.prefill:prefill",
            "mla_prefill_backward": "mla.kernels.prefill:prefill_backward",
            "mla_append": "mla.kernels.append:append",
            "mla_norm_rope_append": "mla.kernels.append:norm_rope_append",
            "merge_partials": "mla.kernels.merge:merge",
        },
        reason_passed=_triton_passed,
    ),
    Implementation(
        name="cpp",
        devices=("cpu",),
        batch_invariant=True,
        note="C++ kernels for AVX-512 with and without products of bytes and of bfloat16, AVX2 and "
        "any other processor; float32 to float16; built where there is a C++ compiler",
        reason_not=_cpp_reason,
        kernels={
            "mla_decode": "mla.kernels.cpu:decode",
            "mla_append": "mla.kernels.cpu:append",
            "mla_norm_rope_append": "mla.kernels.cpu:norm_rope_append",
        },
    ),
    Implementation(
        name="torch",
        devices=(),
        batch_invariant=False,
        note="plain PyTorch, float64 to float16; results inherit the rounding of its libraries' "
        "matrix products, which may differ with the batch",
        reason_not=_torch_reason,
        kernels={
            "mla_decode": "mla.kernels.eager.decode:decode",
            "mla_prefill": "mla.kernels.eager.prefill:prefill",
            "mla_prefill_backward": "mla.kernels.eager.prefill:prefill_backward",
            "mla_append": "mla.kernels.eager.rows:append",
            "mla_norm_rope_append": "mla.kernels.eager.rows:norm_rope_append",
            "mla_gather": "mla.kernels.eager.rows:gather",
            "merge_partials": "mla.kernels.eager.decode:merge",
        },
    ),
)


def supported_impls(
    op: OpName,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    codec: str = "plain",
) -> list[tuple[str, str | None]]:
    """The implementations of ``op``, fastest first, each with the reason it cannot run, or None.

    Args:
        op: public name, such as ``"mla_decode"``.
        device: device type, ``"cpu"`` or ``"cuda"``.
        dtype: dtype of the queries (of the rows for appends).
        codec: kind of the cache's codec.

    Raises:
        UnsupportedError: there is no such op.
    """
    if op not in OPS:
        raise UnsupportedError(f"supported_impls: op has value {op!r}, expected one of {OPS}")
    case = Case(op, torch.device(device).type, dtype, codec)
    return [(row.name, row.reason_not(case)) for row in TABLE if op in row.ops]


@lru_cache(maxsize=1024)
def resolve(impl: str, case: Case) -> Implementation:
    """The implementation to run.

    Raises:
        UnsupportedError: ``impl`` is unknown or cannot run; the message lists those that can.
    """
    rows = [row for row in TABLE if case.op in row.ops]
    reasons = {row.name: row.reason_not(case) for row in rows}
    able = [row for row in rows if reasons[row.name] is None]
    for row in able:
        if impl == row.name or (impl == "auto" and _passed(row, case) is None):
            return row
    if impl == "auto":
        fact = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
    else:
        fact = f"impl={impl!r} " + (reasons.get(impl) or "does not exist for this op")
    raise UnsupportedError(f"{case.op}: {fact}; this case can run on {[row.name for row in able]}")


def _passed(row: Implementation, case: Case) -> str | None:
    """Why "auto" leaves a row that can run; None: it does not."""
    if row.devices and case.device not in row.devices:
        return "runs here, on request only"
    return row.reason_passed(case)


def reason_not_auto(name: str, case: Case) -> str | None:
    """Why "auto" goes past ``name`` to the rows behind it; None: it takes it."""
    row = next(row for row in TABLE if row.name == name)
    return row.reason_not(case) or _passed(row, case)


def preferred(impl: Impl, op: OpName) -> Impl:
    """``impl`` where it has ``op``, otherwise "auto": for callers of several ops."""
    has_op = any(row.name == impl and op in row.ops for row in TABLE)
    is_known = impl == "auto" or any(row.name == impl for row in TABLE)
    return impl if has_op or not is_known else "auto"


def kernel_for(impl: str, case: Case, part: str | None = None) -> Callable[..., Any]:
    """The function behind ``impl`` for this op, or for ``part`` of it such as a backward pass."""
    return _load(resolve(impl, case).kernels[part or case.op])


@cache
def _load(path: str) -> Callable[..., Any]:
    module, function = path.split(":")
    kernel: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return kernel
