"""Which implementation computes an op: one table, read by dispatch, `info`, README and tests.

Pure: the answer depends on the case alone, never on timing or on the values of tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from mla.checks import FLOAT_DTYPES, UnsupportedError

Impl = Literal["auto", "torch"]
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


@dataclass(frozen=True)
class Implementation:
    """One row of the support table."""

    name: str
    ops: tuple[OpName, ...]
    devices: str
    batch_invariant: bool
    note: str
    reason_not: Callable[[Case], str | None]  # None: can run


def _torch_reason(case: Case) -> str | None:
    if case.dtype not in FLOAT_DTYPES:
        return f"needs a floating dtype, got {case.dtype}"
    return None


# Fastest first; "auto" takes the first row that can run.
TABLE: tuple[Implementation, ...] = (
    Implementation(
        name="torch",
        ops=OPS,
        devices="any",
        batch_invariant=False,
        note="plain PyTorch, float64 to bfloat16; results inherit the rounding of its libraries' "
        "matrix products, which may differ with the batch",
        reason_not=_torch_reason,
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


def resolve(impl: str, case: Case) -> str:
    """The implementation to run.

    Raises:
        UnsupportedError: ``impl`` is unknown or cannot run; the message lists those that can.
    """
    rows = supported_impls(case.op, device=case.device, dtype=case.dtype, codec=case.codec)
    able = [name for name, reason in rows if reason is None]
    if impl in able:
        return impl
    if impl == "auto" and able:
        return able[0]
    reasons = dict(rows)
    if impl == "auto":
        fact = "; ".join(f"{name} {reason}" for name, reason in rows)
    else:
        fact = f"impl={impl!r} " + (reasons.get(impl) or "does not exist for this op")
    raise UnsupportedError(f"{case.op}: {fact}; this case can run on {able}")
