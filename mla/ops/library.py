"""Torch custom ops of the namespace ``mla``: schemas, fakes and autograd; torch only.

Registered through `torch.library.Library`, which costs 9 us a call on a CPU where the decorator
`torch.library.custom_op` costs 23 (torch 2.13). A `CacheView` travels as its tensors, sizes and
the ``spec`` string of its codec.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from mla.checks import UnsupportedError
from mla.codec import codec_from_spec
from mla.view import CacheView

LIBRARY = torch.library.Library("mla", "DEF")

VIEW_SCHEMA = (
    "Tensor{mutated} rows, Tensor? page_table, Tensor lengths, Tensor? starts, "
    "int C, int R, str codec, SymInt max_length, int shard_index, int shard_count"
)


def define(
    name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Define ``mla::name``, run by ``kernel`` on every device, and return the callable op.

    The first argument is a tensor. Autocast does not reach into the kernel: the dtypes of its
    arguments decide, nothing else.
    """

    def run(*arguments: Any) -> Any:
        device = arguments[0].device.type
        if not torch.is_autocast_enabled(device):
            return kernel(*arguments)
        with torch.autocast(device, enabled=False):
            return kernel(*arguments)

    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mla::{name}", fake, lib=LIBRARY)
    op: Callable[..., Any] = getattr(torch.ops.mla, name).default
    return op


def view_schema(*, mutated: bool = False) -> str:
    """The schema of a flattened view; ``mutated`` marks its rows as written."""
    return VIEW_SCHEMA.format(mutated="(a!)" if mutated else "")


def flatten_view(view: CacheView) -> tuple[Any, ...]:
    """The arguments of `view_schema`."""
    return (
        view.rows,
        view.page_table,
        view.lengths,
        view.starts,
        view.C,
        view.R,
        view.codec.spec,
        view.max_length,
        *view.shard,
    )


NUM_VIEW_ARGUMENTS = 10


def unflatten_view(arguments: tuple[Any, ...]) -> CacheView:
    """Back from `flatten_view`."""
    rows, page_table, lengths, starts, C, R, spec, max_length, index, count = arguments
    return CacheView(
        rows=rows,
        page_table=page_table,
        lengths=lengths,
        starts=starts,
        C=C,
        R=R,
        codec=codec_from_spec(spec),
        max_length=max_length,
        shard=(index, count),
    )


def refuse_gradient(op: str, advice: str) -> None:
    """Register a backward that says so: an op that is not differentiable still runs forward."""

    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise UnsupportedError(
            f"{op}: the output has requires_grad, expected no gradient; {advice}"
        )

    torch.library.register_autograd(f"mla::{op.removeprefix('mla_')}", backward, lib=LIBRARY)
