"""Sequences cut over the ranks of a group so that each has the same causal work.

    2k chunks of c positions; rank r holds chunks r and 2k-1-r      "zigzag"
    k = 2:   | 0 | 1 | 1 | 0 |        k = 3:   | 0 | 1 | 2 | 2 | 1 | 0 |

A query sees the keys before it, so late chunks cost more than early ones: chunk i multiplies with
i + 1 chunks of keys, and every rank with (r + 1) + (2k - r) = 2k + 1 of them.

Dims: B batch, S positions of the whole sequence, L = S/k of one rank, k ranks, W any width.
Source: the order is that of zigzag ring attention and of Llama 3, arXiv:2407.21783, section 3.3.2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mla.checks import ShapeError
from mla.view import check_shard

Group = dist.ProcessGroup | DeviceMesh


def process_group(group: Group) -> dist.ProcessGroup:
    """The group itself, or that of a mesh with one dim."""
    if not isinstance(group, DeviceMesh):
        return group
    if group.ndim != 1:
        raise ShapeError(
            f"process_group: mesh has dims {group.mesh_dim_names or group.ndim}, expected one; "
            "take one of them, such as mesh['cp']"
        )
    return group.get_group()


def shard_of(group: Group) -> tuple[int, int]:
    """(index, count): this rank in ``group`` and its size, as `mla.CacheView` names a shard."""
    members = process_group(group)
    return members.rank(), members.size()


def padded_length(length: int, count: int) -> int:
    """``length`` rounded up to a multiple of 2k, as `shard_sequence` pads."""
    return -(-length // (2 * count)) * 2 * count


def zigzag_positions(
    length: int, shard: tuple[int, int], *, device: torch.device | str | None = None
) -> Tensor:
    """``[L]`` int64 positions that a shard holds, in the order in which it holds them.

    Args:
        length: S, of the whole sequence; a multiple of 2k.
        shard: (index, count).
        device: of the result.

    Raises:
        ShapeError: ``length`` is no multiple of 2k, or there is no such shard.
    """
    index, count = _checked(shard, length, "zigzag_positions")
    chunks = torch.arange(length, device=device).view(2 * count, length // (2 * count))
    return torch.cat([chunks[index], chunks[2 * count - 1 - index]])


def shard_sequence(x: Tensor, shard: tuple[int, int], *, dim: int = 1) -> Tensor:
    """What a shard holds of ``x``, padded on the right with zeros to a multiple of 2k.

    Causal attention never looks at padding on the right; outputs there mean nothing.

    Args:
        x: ``[B, S, ..]``, the whole sequence, the same on all ranks; tokens, hidden states, ...
        shard: (index, count), see `shard_of`.
        dim: that of the positions.

    Returns:
        ``[B, L, ..]``, a copy; L = 0 where S is 0.
    """
    check_shard("shard_sequence", shard)
    dim = dim % x.ndim
    length = padded_length(x.shape[dim], shard[1])
    positions = zigzag_positions(length, shard, device=x.device)
    # Behind the end lies padding: any position serves, and is zeroed.
    is_padding = positions >= x.shape[dim]
    if not length:
        return x.clone()
    part = x.index_select(dim, positions.clamp(max=x.shape[dim] - 1))
    return part.masked_fill(is_padding.view(-1, *[1] * (x.ndim - dim - 1)), 0)


def gather_sequence(x: Tensor, group: Group, *, dim: int = 1) -> Tensor:
    """The whole sequence from the shards of all ranks, by one all-gather; differentiable.

    The backward pass adds up the gradients of all ranks and gives each those of its positions, by
    one reduce-scatter: right where ranks use the result for different things, as queries use keys.
    Where all ranks compute the same loss from it, each counts.

    Args:
        x: ``[B, L, ..]`` of this rank, of the same shape on all.
        group: of the sequence.
        dim: that of the positions.

    Returns:
        ``[B, S, ..]`` with S = k*L, padding included; ``x`` itself in a group of one.

    Raises:
        ShapeError: L is odd.
    """
    members = process_group(group)
    count = members.size()
    if x.shape[dim] % 2:
        raise ShapeError(
            f"gather_sequence: x has {x.shape[dim]} positions, expected two chunks of one size; "
            "cut it with shard_sequence"
        )
    if count == 1:
        return x
    part = x.movedim(dim, 0)  # [L, B, ..]
    gathered: Tensor = _AllGather.apply(part.contiguous(), members)
    chunks = gathered.view(count, 2, part.shape[0] // 2, *part.shape[1:])
    whole = torch.cat([chunks[:, 0], chunks[:, 1].flip(0)]).flatten(0, 1)
    return whole.movedim(0, dim)


def _checked(shard: tuple[int, int], length: int, op: str) -> tuple[int, int]:
    check_shard(op, shard)
    if length % (2 * shard[1]):
        raise ShapeError(
            f"{op}: length has value {length}, expected a multiple of {2 * shard[1]}, twice the "
            f"ranks; pad to {padded_length(length, shard[1])}"
        )
    return shard


def all_gather(x: Tensor, members: dist.ProcessGroup) -> Tensor:
    """``[k * n, ..]`` from contiguous ``x [n, ..]`` of every rank, in the order of ranks."""
    ops = torch.ops._c10d_functional
    size, name = members.size(), members.group_name
    gathered: Tensor = ops.wait_tensor(ops.all_gather_into_tensor(x, size, name))
    return gathered


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, members: dist.ProcessGroup) -> Tensor:
        return all_gather(x, members)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.members = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ops = torch.ops._c10d_functional
        size, name = ctx.members.size(), ctx.members.group_name
        scattered = ops.reduce_scatter_tensor(grad.contiguous(), "sum", size, name)
        return ops.wait_tensor(scattered), None
