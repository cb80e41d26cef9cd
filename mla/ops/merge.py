"""Merge attention over disjoint sets of keys by log-sum-exp.

Dims: X parts, B batch, L queries, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mla.checks import ShapeError, require_device
from mla.ops.decode import AttentionOutput
from mla.ops.library import LIBRARY, define
from mla.ops.select import Case, Impl, kernel_for


def _kernel(out: Tensor, lse: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    merge = kernel_for(impl, Case("merge_partials", out.device.type, out.dtype))
    result: tuple[Tensor, Tensor] = merge(out, lse)
    return result


def _fake(out: Tensor, lse: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return out.new_empty(out.shape[1:]), lse.new_empty(lse.shape[1:])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], *output)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor, None]:
    """d lse_X = p_X (grad_lse + grad_out . (out_X - out)) with p_X = exp(lse_X - lse)."""
    part, part_lse, out, lse = ctx.saved_tensors
    top = torch.where(lse == float("-inf"), torch.zeros_like(lse), lse)
    share = torch.exp(part_lse - top)
    used = torch.where((share == 0)[..., None], torch.zeros_like(part), part)
    along = (grad_out * (used - out)).sum(-1)
    return share[..., None] * grad_out, share * (grad_lse + along), None


_merge = define(
    "merge_partials", "(Tensor out, Tensor lse, str impl) -> (Tensor, Tensor)", _kernel, _fake
)
torch.library.register_autograd("mla::merge_partials", _backward, setup_context=_setup, lib=LIBRARY)


def merge_partials(out: Tensor, lse: Tensor, *, impl: Impl = "auto") -> AttentionOutput:
    """Merge partial attention results into the result over all their keys.

        lse = log sum_X exp(lse_X);  out = sum_X exp(lse_X - lse) out_X

    Exact and differentiable. A part with lse = -inf saw no key and may hold anything, NaN
    included; where all parts are so, the result is 0 and -inf.

    Args:
        out: ``[X, B, L, H, W]`` (any dims between X and W), float32 or float64.
        lse: ``[X, B, L, H]``, natural log, dtype and device of ``out``.
        impl: see `mla_decode`.

    Returns:
        out ``[B, L, H, W]`` and lse ``[B, L, H]``.

    Raises:
        ShapeError: ``lse`` does not have the leading dims of ``out``, or X is 0.
    """
    if out.ndim < 2 or lse.shape != out.shape[:-1] or out.shape[0] == 0:
        raise ShapeError(
            f"merge_partials: lse has shape {tuple(lse.shape)}, expected {tuple(out.shape[:-1])}, "
            "the leading dims of out, with at least one part"
        )
    if out.dtype not in (torch.float32, torch.float64) or lse.dtype != out.dtype:
        raise ShapeError(
            f"merge_partials: out, lse have dtypes {out.dtype}, {lse.dtype}, "
            "expected float32 or float64 for both"
        )
    require_device("merge_partials", "lse", lse, "out", out)
    return AttentionOutput(*_merge(out, lse, impl))
