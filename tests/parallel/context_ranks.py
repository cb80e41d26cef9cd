"""What the ranks of the tests of context parallelism do; each function runs on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from mla.parallel.context import context_decode, context_prefill
from mla.parallel.sequence import all_gather, gather_sequence, shard_of, shard_sequence
from mla.parallel.traffic import count_traffic
from mla.view import CacheView


class DecodeWork(NamedTuple):
    """One call of `context_decode`, with the view of every rank."""

    q_latent: Tensor
    q_rope: Tensor
    views: list[CacheView]
    w_uv: Tensor | None
    options: dict[str, Any]


class PrefillWork(NamedTuple):
    """One call of `context_prefill` on the whole sequence, and the gradients it is given."""

    inputs: list[Tensor]  # query, latent, k_rope, kv_b_weight
    grads: list[Tensor]  # of out and lse
    scale: float


def decode_all(work: Sequence[DecodeWork]) -> list[tuple[Tensor, Tensor]]:
    group = dist.group.WORLD
    rank = dist.get_rank()
    return [
        tuple(
            context_decode(
                item.q_latent,
                item.q_rope,
                item.views[rank],
                group=group,
                w_uv=item.w_uv,
                **item.options,
            )
        )
        for item in work
    ]


def prefill_all(work: Sequence[PrefillWork]) -> list[list[Tensor]]:
    """out, lse, gradients of this rank's query, latent and k_rope, its share of the weight's."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    shard = shard_of(mesh)
    results = []
    for item in work:
        *tokens, weight = item.inputs
        leaves = [shard_sequence(x, shard) for x in tokens] + [weight.clone()]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        outputs = context_prefill(*leaves, scale=item.scale, group=mesh)
        grads = [shard_sequence(grad, shard) for grad in item.grads]
        torch.autograd.backward(outputs, grads)
        results.append([x.detach() for x in outputs] + [leaf.grad for leaf in leaves])
    return results


def gather_all(parts: Sequence[Tensor], dim: int) -> list[tuple[Tensor, Tensor]]:
    """Each whole tensor out of its shards, and the gradient of the shard where all want it."""
    results = []
    for whole in parts:
        part = shard_sequence(whole, shard_of(dist.group.WORLD), dim=dim).requires_grad_()
        gathered = gather_sequence(part, dist.group.WORLD, dim=dim)
        (gathered * (1 + dist.get_rank())).sum().backward()
        results.append((gathered.detach(), part.grad))
    return results


def _receive_any() -> None:
    request = dist.irecv(torch.empty(12), src=(dist.get_rank() + 1) % 3)
    assert request is not None


def _functional(name: str, *args: Any) -> Any:
    def call() -> None:
        ops = torch.ops._c10d_functional
        size = () if name == "all_reduce" else (3,)
        ops.wait_tensor(
            getattr(ops, name)(torch.ones(12), *args, *size, dist.group.WORLD.group_name)
        )

    return call


TRAFFIC_CALLS: dict[str, Any] = {
    "all_gather": lambda: all_gather(torch.ones(12), dist.group.WORLD),
    "all_gather_list": lambda: dist.all_gather(list(torch.empty(3, 12)), torch.ones(12)),
    "reduce_scatter": lambda: dist.reduce_scatter(torch.empty(4), list(torch.ones(3, 4))),
    "all_reduce": lambda: dist.all_reduce(torch.ones(12)),
    "all_to_all": lambda: dist.all_to_all_single(torch.empty(12), torch.ones(12)),
    "broadcast": lambda: dist.broadcast(torch.ones(12), 0),
    "functional_all_gather": _functional("all_gather_into_tensor"),
    "functional_reduce_scatter": _functional("reduce_scatter_tensor", "sum"),
    "functional_all_reduce": _functional("all_reduce", "sum"),
    "distributed_tensor": lambda: DTensor.from_local(
        torch.ones(12), init_device_mesh("cpu", (3,)), [Shard(0)]
    ).full_tensor(),
    "barrier": dist.barrier,
    "unknown": _receive_any,
}


def traffic_of_all() -> dict[str, Any]:
    """Calls and bytes of each, or the name of the error."""
    found: dict[str, Any] = {}
    for name, call in TRAFFIC_CALLS.items():
        try:
            with count_traffic() as traffic:
                call()
        except ValueError as error:
            found[name] = type(error).__name__
        else:
            found[name] = (dict(traffic.calls), dict(traffic.bytes))
    return found
