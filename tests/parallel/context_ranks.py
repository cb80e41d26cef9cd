"""What the ranks of the tests of context parallelism do; each function runs on every rank."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from helpers import poison_, randn
from layers import SMALL, make_layer
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from mla import DenseLatentCache, MLAConfig, MultiheadLatentAttention, PagedLatentCache
from mla.cache import PagedBatch
from mla.codec import Codec, PlainCodec
from mla.parallel.context import context_decode, context_prefill, sum_gradients
from mla.parallel.context_layer import shard_context
from mla.parallel.sequence import all_gather, gather_sequence, shard_of, shard_sequence
from mla.parallel.tensor import shard_heads
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
    "scatter": lambda: dist.scatter(
        torch.empty(4), list(torch.ones(3, 4)) if dist.get_rank() == 0 else None
    ),
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


class LayerWork(NamedTuple):
    """A layer that prefills rows of ``lengths`` and then takes steps of some tokens."""

    config: MLAConfig
    seed: int
    dtype: torch.dtype
    codec: Codec
    page_size: int
    lengths: tuple[int, ...]  # of the prompts
    steps: tuple[int, ...]

    def hidden_states(self) -> list[Tensor]:
        """Of the prompts, padded on the right, and of each step."""
        sizes = (max(self.lengths), *self.steps)
        B, D = len(self.lengths), self.config.hidden_size
        return [
            randn(B, L, D, seed=self.seed + i, dtype=torch.float64).to(self.dtype)
            for i, L in enumerate(sizes)
        ]

    def layer(self, **options: Any) -> MultiheadLatentAttention:
        return make_layer(self.config, self.seed, self.dtype, **options)

    def batch(self, shard: tuple[int, int]) -> PagedBatch:
        """Poisoned pages, just as many as are needed; fixed, so that all steps are absorbed."""
        B = len(self.lengths)
        longest = max(self.lengths) + sum(self.steps)
        pool = PagedLatentCache(
            self.config,
            num_pages=B * -(-longest // (self.page_size * shard[1])),
            page_size=self.page_size,
            shard=shard,
            codec=self.codec,
            dtype=self.dtype,
        )
        poison_(pool.rows(0))
        batch = pool.batch([pool.allocate() for _ in self.lengths], max_length=longest)
        if any(length != self.lengths[0] or length % (2 * shard[1]) for length in self.lengths):
            batch.reserve(self.lengths)  # padded; otherwise the layer reserves for its caller
        return batch


class Mesh(NamedTuple):
    """What a layer is cut over; without groups it stays on one process."""

    context: Any = None
    heads: Any = None

    def cut(self, layer: MultiheadLatentAttention) -> MultiheadLatentAttention:
        if self.heads is not None:
            shard_heads(layer, self.heads)
        return layer if self.context is None else shard_context(layer, self.context)

    @property
    def shard(self) -> tuple[int, int]:
        return (0, 1) if self.context is None else shard_of(self.context)


def run_layer(item: LayerWork, mesh: Mesh = Mesh()) -> list[Tensor]:  # noqa: B008 - a constant
    """What the layer gives for the prompts and for each step."""
    layer, batch = mesh.cut(item.layer()), item.batch(mesh.shard)
    prompt, *steps = item.hidden_states()
    with torch.no_grad():
        out = layer(
            prompt if mesh.context is None else shard_sequence(prompt, mesh.shard), cache=batch
        )
        if mesh.context is not None:
            out = gather_sequence(out, mesh.context)[:, : prompt.shape[1]]
        return [out] + [layer(hidden, cache=batch) for hidden in steps]


def train_layer(item: LayerWork, mesh: Mesh = Mesh()) -> list[Tensor]:  # noqa: B008 - a constant
    """out and the gradients of the hidden states and of all weights, from the whole sequence."""
    layer = mesh.cut(item.layer()).train()
    hidden = item.hidden_states()[0]
    wanted = randn(*hidden.shape, seed=item.seed, dtype=torch.float64).to(item.dtype)
    if mesh.context is not None:
        hidden, wanted = (shard_sequence(x, mesh.shard) for x in (hidden, wanted))
    hidden = hidden.requires_grad_()
    out = layer(hidden)
    (out * wanted).sum().backward()
    results = [out.detach(), hidden.grad]
    if mesh.context is not None:
        results = [gather_sequence(x, mesh.context) for x in results]
        sum_gradients(layer.parameters(), mesh.context)
    grads = [parameter.grad for parameter in layer.parameters()]
    return results + [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]


def layers_of_all(
    inference: Sequence[LayerWork], training: Sequence[LayerWork], heads: int
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Context over all ranks, or over those that share heads with ``heads`` ranks."""
    sizes = (dist.get_world_size() // heads, heads)
    both = init_device_mesh("cpu", sizes, mesh_dim_names=("cp", "tp"))
    mesh = Mesh(both["cp"], both["tp"] if heads > 1 else None)
    return [run_layer(item, mesh) for item in inference], [
        train_layer(item, mesh) for item in training
    ]


def traffic_of_layer(config: MLAConfig, B: int, S: int, L: int, heads: int) -> dict[str, Any]:
    """Bytes of a prefill of S tokens in training and of a step of L tokens, by kind."""
    sizes = (dist.get_world_size() // heads, heads)
    both = init_device_mesh("cpu", sizes, mesh_dim_names=("cp", "tp"))
    mesh = Mesh(both["cp"], both["tp"] if heads > 1 else None)
    item = LayerWork(config, 0, torch.float32, PlainCodec(), 4, (S,) * B, (L,))
    layer, batch = mesh.cut(item.layer()), item.batch(mesh.shard)
    prompt, step = item.hidden_states()
    part = shard_sequence(prompt, mesh.shard)
    found: dict[str, Any] = {}
    with count_traffic() as traffic:
        out = layer(part)
    found["forward"] = dict(traffic.bytes)
    with count_traffic() as traffic:
        out.sum().backward()
    found["backward"] = dict(traffic.bytes)
    with torch.no_grad():
        layer(part, cache=batch)
        with count_traffic() as traffic:
            layer(step, cache=batch)
    found["step"] = dict(traffic.bytes)
    return found


def traffic_of_decode(work: DecodeWork) -> int:
    with count_traffic() as traffic:
        decode_all([work])
    assert sum(traffic.calls.values()) == 1
    return traffic.total


def one_raises(item: DecodeWork) -> None:
    """Every rank but the last waits in the merge for one that never comes."""
    if dist.get_rank() == dist.get_world_size() - 1:
        raise RuntimeError("this rank gives up")
    decode_all([item])


def refusals() -> list[str]:
    """Messages of calls that must raise on every rank, before anything is sent."""
    group = dist.group.WORLD
    layer = shard_context(make_layer(SMALL, 0), group)
    dense = DenseLatentCache(SMALL, batch_size=1, dtype=torch.float64)
    hidden = torch.zeros(1, 4, SMALL.hidden_size, dtype=torch.float64)
    queries = torch.zeros(1, 1, 2, 24), torch.zeros(1, 1, 2, 6)
    view = CacheView.dense(torch.zeros(1, 4, 30), torch.zeros(1, dtype=torch.int32), C=24, R=6)
    calls = [
        lambda: shard_context(torch.nn.Linear(2, 2), group),
        lambda: layer(hidden, attn_mask=torch.ones(1, 4, dtype=torch.bool)),
        lambda: layer(hidden, cu_seqlens=torch.tensor([0, 4], dtype=torch.int32)),
        lambda: layer(hidden, cache=dense),
        lambda: context_decode(*queries, view, scale=1.0, group=group),
        lambda: gather_sequence(hidden[:, :3], group),
        lambda: shard_of(init_device_mesh("cpu", (1, 2), mesh_dim_names=("tp", "cp"))),
    ]
    messages = []
    for call in calls:
        try:
            call()
        except ValueError as error:
            messages.append(str(error))
        else:
            messages.append("nothing was raised")
    assert dense.max_length == 0
    return messages


def run_example(splits: Sequence[tuple[int, int]], path: str) -> list[bool]:
    """What examples/generate_parallel.py finds for these (tensor, context) splits."""
    sys.path.append(path)
    from generate_parallel import run

    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    os.environ["LOCAL_WORLD_SIZE"] = str(dist.get_world_size())
    options = {"prompt": "one page of context and some more", "tokens": 8, "seed": 0}
    return [
        run(argparse.Namespace(tensor_parallel=tensor, context_parallel=context, **options))
        for tensor, context in splits
    ]


def compiled_is_eager(decoding: DecodeWork, training: PrefillWork) -> list[bool]:
    """Whether one graph without breaks gives what the eager calls give, gradients included."""
    group = dist.group.WORLD
    view = decoding.views[dist.get_rank()]

    def decode(q_latent: Tensor, q_rope: Tensor, view: CacheView) -> Tensor:
        return context_decode(q_latent, q_rope, view, group=group, **decoding.options).out

    def prefill(*inputs: Tensor) -> Tensor:
        return context_prefill(*inputs, scale=training.scale, group=group).out

    found = []
    for function, inputs in (
        (decode, [decoding.q_latent, decoding.q_rope, view]),
        (prefill, training.inputs),
    ):
        results = []
        for call in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
            leaves = inputs
            if function is prefill:
                leaves = [x.detach().clone().requires_grad_() for x in inputs]
            out = call(*leaves)
            if function is prefill:
                out.sum().backward()
                out = torch.cat([out.detach().flatten()] + [x.grad.flatten() for x in leaves])
            results.append(out)
        # Gradients that meet are added in another order.
        found.append(torch.allclose(*results, rtol=1e-12, atol=1e-12))
    return found
