"""What the ranks of the tests of tensor parallelism run; with no mesh, one process alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from helpers import randn
from layers import make_layer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from mla import DenseLatentCache, MLAConfig, MultiheadLatentAttention, PagedLatentCache
from mla.codec import Codec
from mla.parallel import head_plan, parallel_styles, shard_heads


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer and what it is given: a ragged prompt, then steps that all rows take."""

    config: MLAConfig
    prompt: tuple[int, ...]
    steps: tuple[int, ...] = (1,)
    codec: Codec | None = None
    page_size: int | None = None
    seed: int = 0


Results = dict[str, Tensor]
Run = Callable[[Case, torch.dtype, DeviceMesh | None], Results]


def whole_mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_ranks(run: Run, cases: Sequence[Case], dtype: torch.dtype) -> list[Results]:
    """``run`` of every case on this rank."""
    mesh = whole_mesh()
    return [run(case, dtype, mesh) for case in cases]


def make(case: Case, dtype: torch.dtype, mesh: DeviceMesh | None) -> MultiheadLatentAttention:
    layer = make_layer(case.config, case.seed, dtype)
    return layer if mesh is None else shard_heads(layer, mesh)


def hidden(case: Case, B: int, L: int, seed: int, dtype: torch.dtype) -> Tensor:
    return randn(B, L, case.config.hidden_size, seed=case.seed + seed, dtype=dtype)


def train(case: Case, dtype: torch.dtype, mesh: DeviceMesh | None) -> Results:
    """Output and every gradient."""
    return gradients(make(case, dtype, mesh), case, dtype)


def gradients(layer: nn.Module, case: Case, dtype: torch.dtype) -> Results:
    B, L = len(case.prompt), max(case.prompt)
    x = hidden(case, B, L, 100, dtype).requires_grad_()
    out: Tensor = layer(x)
    out.backward(hidden(case, B, L, 200, dtype))
    assert x.grad is not None
    results = {"out": out.detach(), "hidden_states": x.grad}
    for name, weight in layer.named_parameters():
        assert weight.grad is not None, name
        results[name] = whole(weight.grad)
    return results


def decode(case: Case, dtype: torch.dtype, mesh: DeviceMesh | None) -> Results:
    """Outputs of a ragged prompt and of the steps after it, 0 where a row has no token."""
    layer, B = make(case, dtype, mesh), len(case.prompt)
    if case.page_size is None:
        cache: Any = DenseLatentCache(case.config, batch_size=B, codec=case.codec, dtype=dtype)
    else:
        pool = PagedLatentCache(
            case.config, num_pages=40, page_size=case.page_size, codec=case.codec, dtype=dtype
        )
        cache = pool.batch([pool.allocate() for _ in range(B)])
    results = {}
    with torch.no_grad():
        for index, counts in enumerate([case.prompt, *([step] * B for step in case.steps)]):
            L = max(counts)
            cache.reserve(list(counts))
            out = layer(hidden(case, B, L, 300 + index, dtype), cache=cache)
            is_token = torch.arange(L) < torch.tensor(counts)[:, None]
            results[f"step {index}"] = torch.where(is_token[..., None], out, 0)
    return results


def train_without_the_sum(case: Case, dtype: torch.dtype) -> Results:
    """`train` where the gradient of the rotated key stays what each rank has of it."""
    layer = make_layer(case.config, case.seed, dtype)
    plan = head_plan(layer) | {"kv_a_proj_with_mqa": "replicate"}
    parallelize_module(layer, whole_mesh(), parallel_styles(layer, plan))
    return gradients(layer, case, dtype)


def placements(case: Case) -> dict[str, Any]:
    """Where the parameters of a layer lie, those of rank 0 whatever the others began with."""
    layer = make_layer(case.config, case.seed + dist.get_rank())
    expected = make_layer(case.config, case.seed).state_dict()
    shard_heads(layer, whole_mesh())
    for name, weight in layer.named_parameters():
        assert isinstance(weight, DTensor), name
        assert torch.equal(weight.full_tensor(), expected[name]), name
    return {name: str(weight.placements[0]) for name, weight in layer.named_parameters()}


def refusals(case: Case) -> list[str]:
    """What `shard_heads` says to what it cannot shard; the layer stays as it was."""
    size, mesh = dist.get_world_size(), whole_mesh()
    sharded = shard_heads(make_layer(case.config, 0), mesh)
    adapted = make_layer(case.config, 0)
    adapted.kv_b_proj.extra = nn.Linear(2, 3)
    attempts: list[tuple[nn.Module, DeviceMesh]] = [
        (make_layer(case.config, 0), init_device_mesh("cpu", (1, size))),
        (nn.Linear(2, 2), mesh),
        (nn.ModuleDict({"a": sharded}), mesh),
        (adapted, mesh),
        (nn.ModuleList([make_layer(case.config, 0), odd_layer(case)]), mesh),
    ]
    messages = []
    for module, ranks in attempts:
        before = [type(weight) for weight in module.parameters()]
        try:
            shard_heads(module, ranks)
        except ValueError as error:
            messages.append(f"{type(error).__name__} {error}")
        assert [type(weight) for weight in module.parameters()] == before
    return messages


def odd_layer(case: Case) -> MultiheadLatentAttention:
    from dataclasses import replace

    return make_layer(replace(case.config, num_attention_heads=3), 0)


def raise_on_one_rank(case: Case) -> None:
    """Rank 1 gives up in the middle of training."""
    layer = make(case, torch.float64, whole_mesh())
    for step in range(3):
        if step == 1 and dist.get_rank() == 1:
            raise ValueError("rank 1 gives up")
        gradients(layer, case, torch.float64)
