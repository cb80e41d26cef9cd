"""Our ops on DTensors, on every rank, and their distance from the same ops on plain tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from helpers import make_view, randn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication

import mla.parallel  # noqa: F401 - registers the rules
from mla.ops import merge_partials, mla_append, mla_decode, mla_gather, mla_prefill
from mla.view import CacheView

B, L, H, C, N, R, V, S = 4, 2, 4, 24, 10, 6, 7, 9
WHOLE, ROWS, HEADS = Replicate(), Shard(0), Shard(2)
# Placements of queries and of what belongs to a row of the batch, for the dims of the mesh.
WAYS: dict[str, tuple[Placement, Placement]] = {
    "heads": (HEADS, WHOLE),
    "batch": (ROWS, ROWS),
    "whole": (WHOLE, WHOLE),
    "sequence": (Shard(1), WHOLE),
}


class Place:
    """One way to distribute the tensors of a call."""

    def __init__(self, mesh: DeviceMesh, query: Sequence[Placement], rows: Sequence[Placement]):
        self.mesh, self.query_placements, self.row_placements = mesh, query, rows

    def query(self, x: Tensor) -> Tensor:
        return distribute_tensor(x, self.mesh, self.query_placements)

    def rows(self, x: Tensor) -> Tensor:
        return distribute_tensor(x, self.mesh, self.row_placements)

    def weight(self, x: Tensor) -> Tensor:
        """Rows of ``[H*(N+V), C]`` where heads are sharded."""
        cut = [ROWS if placement == HEADS else WHOLE for placement in self.query_placements]
        return distribute_tensor(x, self.mesh, cut)

    def view(self, view: CacheView) -> CacheView:
        lengths = self.rows(view.lengths)
        if view.page_table is None:
            return CacheView.dense(self.rows(view.rows), lengths, C=C, R=R)
        pool = distribute_tensor(view.rows, self.mesh, [WHOLE] * self.mesh.ndim)
        table = self.rows(view.page_table)
        return CacheView.paged(pool, table, lengths, C=C, R=R)


def places() -> dict[str, Place]:
    """Every way for the ranks there are: with four of them on a mesh of 2 x 2."""
    if dist.get_world_size() == 2:
        mesh = init_device_mesh("cpu", (2,))
        return {name: Place(mesh, [query], [rows]) for name, (query, rows) in WAYS.items()}
    mesh = init_device_mesh("cpu", (2, 2))
    both = {name: Place(mesh, [query] * 2, [rows] * 2) for name, (query, rows) in WAYS.items()}
    return both | {"batch and heads": Place(mesh, [ROWS, HEADS], [ROWS, WHOLE])}


def errors(seed: int) -> dict[str, float]:
    """Largest difference of every output and gradient."""
    found = {}
    for name, place in places().items():
        for Z in (None, 4):
            found |= {f"{name} {Z} {key}": x for key, x in decode_errors(place, Z, seed).items()}
        for save in ("latent", "expanded"):
            errors = prefill_errors(place, save, seed)
            found |= {f"{name} {save} {key}": x for key, x in errors.items()}
    return found


def distance(actual: Any, expected: Tensor) -> float:
    return (actual.full_tensor() - expected).abs().max().item()


def tensors(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [
        randn(*shape, seed=seed + index, dtype=torch.float64) for index, shape in enumerate(shapes)
    ]


def decode_errors(place: Place, page_size: int | None, seed: int) -> dict[str, float]:
    latent, k_rope, q_latent, q_rope = tensors(
        seed, (B, S, C), (B, S, R), (B, L, H, C), (B, L, H, R)
    )
    view = make_view(latent, k_rope, [9, 3, 5, 7], page_size=page_size, dtype=torch.float64)
    expected = mla_decode(q_latent, q_rope, view, scale=0.3)
    queries = place.query(q_latent), place.query(q_rope)
    actual = mla_decode(*queries, place.view(view), scale=0.3)
    with implicit_replication():
        plain = mla_decode(*queries, view, scale=0.3)
    rows = mla_gather(view, 1, 3, dtype=torch.float64)
    fetched = mla_gather(place.view(view), 1, 3, dtype=torch.float64)
    parts = torch.stack([expected.out, 2 * expected.out]), torch.stack([expected.lse] * 2)
    along = [Shard(p.dim + 1) if isinstance(p, Shard) else p for p in place.query_placements]
    merged = merge_partials(*(distribute_tensor(x, place.mesh, along) for x in parts))
    return {
        "out": distance(actual.out, expected.out),
        "lse": distance(actual.lse, expected.lse),
        "out of a plain cache": distance(plain.out, expected.out),
        "latent": distance(fetched.latent, rows.latent),
        "merged": distance(merged.out, merge_partials(*parts).out),
    }


def prefill_errors(place: Place, save: Any, seed: int) -> dict[str, float]:
    given = tensors(seed, (B, L, H, N + R), (B, L, C), (B, L, R), (H * (N + V), C))
    grad_out, grad_lse = tensors(seed + 10, (B, L, H, V), (B, L, H))
    starts = torch.tensor([0, 1, 0, 0], dtype=torch.int32)
    lengths = torch.tensor([2, 2, 2, 1], dtype=torch.int32)
    put = (place.query, place.rows, place.rows, place.weight)

    def run(leaves: list[Tensor], starts: Tensor, lengths: Tensor) -> Any:
        return mla_prefill(*leaves, scale=0.3, key_starts=starts, key_lengths=lengths, save=save)

    leaves = [x.clone().requires_grad_() for x in given]
    expected = run(leaves, starts, lengths)
    # A query that sees no key has lse = -inf, which no gradient comes from.
    grad_lse = torch.where(expected.lse == float("-inf"), 0, grad_lse)
    torch.autograd.backward([expected.out, expected.lse], [grad_out, grad_lse])
    shards = [f(x).requires_grad_() for f, x in zip(put, given, strict=True)]
    actual = run(shards, place.rows(starts), place.rows(lengths))
    grads = [
        distribute_tensor(grad, place.mesh, x.placements)
        for grad, x in zip((grad_out, grad_lse), actual, strict=True)
    ]
    torch.autograd.backward(list(actual), grads)
    names = ("query", "latent", "k_rope", "weight")
    errors = {
        f"gradient of {name}": distance(shard.grad, leaf.grad)
        for name, shard, leaf in zip(names, shards, leaves, strict=True)
        if leaf.grad is not None
    }
    return errors | {"out": distance(actual.out, expected.out)}


def placements(seed: int) -> dict[str, str]:
    """Where the output of ``mla_prefill`` lies."""
    given = tensors(seed, (B, L, H, N + R), (B, L, C), (B, L, R), (H * (N + V), C))
    found = {}
    for name, place in places().items():
        put = (place.query, place.rows, place.rows, place.weight)
        out = mla_prefill(*(f(x) for f, x in zip(put, given, strict=True)), scale=1.0).out
        found[name] = str(out.placements[0])
    place = places()["heads"]
    query, latent, k_rope = place.query(given[0][:, :, :3]), *map(place.rows, given[1:3])
    weight = place.weight(given[3][: 3 * (N + V)])
    out = mla_prefill(query, latent, k_rope, weight, scale=1.0).out
    found["odd heads"] = str(out.placements[0])
    packed = [x.flatten(0, 1) for x in given[:3]]
    heads = Place(place.mesh, [Shard(1)], [WHOLE])
    bounds = heads.rows(torch.tensor([0, 3, B * L], dtype=torch.int32))
    out = mla_prefill(
        heads.query(packed[0]),
        heads.rows(packed[1]),
        heads.rows(packed[2]),
        place.weight(given[3]),
        scale=1.0,
        cu_seqlens_q=bounds,
    ).out
    found["packed heads"] = f"S({out.placements[0].dim + 1})"  # without the batch of one
    return found


def append() -> str:
    """What DTensor says to an op that writes."""
    latent, k_rope = tensors(0, (B, S, C), (B, S, R))
    place = places()["whole"]
    view = place.view(make_view(latent, k_rope, [3, 3, 3, 3], dtype=torch.float64))
    try:
        mla_append(view, place.rows(latent[:, :1]), place.rows(k_rope[:, :1]))
    except (NotImplementedError, RuntimeError) as error:
        return str(error)
    return "no error"
