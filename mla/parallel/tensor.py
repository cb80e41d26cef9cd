"""Tensor parallelism: heads sharded over the ranks of a mesh, the latent and its cache replicated.

    mesh = init_device_mesh("cuda", (8,))
    shard_heads(model, mesh)                # in place; `mla.parallel.plans` says what goes where

Parameters become DTensors under their names, so that `torch.distributed.checkpoint`, optimizers and
FSDP2 know how they are cut. Between the projections tensors are plain: a rank computes its heads
as one device computes all of them.

Dims: B batch, L tokens, D model width, H heads, C latent width, R rotated width.
Source: Megatron-LM, arXiv:1909.08053, section 3, for the two all-reduces of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from mla.checks import ShapeError, UnsupportedError
from mla.parallel.plans import head_plan, mla_layers

M = TypeVar("M", bound=nn.Module)


class Replicated(ParallelStyle):
    """Every rank has the whole parameters and computes the same output from the same input.

    Parameters become DTensors, so that optimizers, gradient norms and checkpoints see one kind of
    parameter in the whole layer; inputs and outputs are plain tensors. The gradient of the output
    is taken to be the same on all ranks.

    Args:
        own_columns: how many of the last columns of the output go to sharded heads as they are;
            their gradient is summed over the ranks. R for ``kv_a_proj_with_mqa``.
    """

    def __init__(self, own_columns: int = 0) -> None:
        super().__init__()
        self.own_columns = own_columns

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        output_fn: Any = partial(_plain_output, self.own_columns)
        return distribute_module(module, device_mesh, self._distribute, _replica_input, output_fn)

    def _distribute(self, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, weight in list(module.named_parameters(recurse=False)):
            replica = distribute_tensor(
                weight, mesh, [Replicate()], src_data_rank=self.src_data_rank
            )
            parameter = nn.Parameter(replica, requires_grad=weight.requires_grad)
            module.register_parameter(key, parameter)


def _replica_input(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
    (x,) = inputs
    return x if isinstance(x, DTensor) else _replica(x, mesh)


def _replica(x: Tensor, mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False)


def _plain_output(own_columns: int, module: nn.Module, output: Any, mesh: DeviceMesh) -> Tensor:
    whole: Tensor = output.to_local()
    if own_columns == 0 or not whole.requires_grad:
        return whole
    rest, own = whole.split([whole.shape[-1] - own_columns, own_columns], dim=-1)
    return torch.cat([rest, _replica(own, mesh).to_local(grad_placements=[Partial()])], dim=-1)


def parallel_styles(model: nn.Module, plan: Mapping[str, str]) -> dict[str, ParallelStyle]:
    """What ``plan`` names, for `torch.distributed.tensor.parallel.parallelize_module`.

    Args:
        model: what the names of ``plan`` are relative to.
        plan: that of `head_plan`; further entries may be ``"colwise"``, ``"rowwise"`` and
            ``"replicate"``, of layers that take one tensor.

    Raises:
        UnsupportedError: a style has another name, or does not fit its module.
    """
    return {name: _style(model, name, style) for name, style in plan.items()}


def _style(model: nn.Module, name: str, style: str) -> ParallelStyle:
    module = model.get_submodule(name)
    if style == "replicate":
        return Replicated()
    if style not in ("colwise", "rowwise", "mla_kv_a_proj"):
        raise UnsupportedError(
            f"parallel_styles: {name} has the style {style!r}, expected 'colwise', 'rowwise', "
            "'replicate' or 'mla_kv_a_proj'"
        )
    if not isinstance(module, nn.Linear):
        raise UnsupportedError(
            f"parallel_styles: {name} has type {type(module).__name__}, expected Linear for the "
            f"style {style!r}"
        )
    if style == "mla_kv_a_proj":
        layer: Any = model.get_submodule(name.rpartition(".")[0])
        return Replicated(own_columns=module.out_features - layer.kv_b_proj.in_features)
    return ColwiseParallel() if style == "colwise" else RowwiseParallel()


def shard_heads(module: M, mesh: DeviceMesh, *, src_data_rank: int | None = 0) -> M:
    """Shard the heads of every MLA layer in ``module`` over the ranks of ``mesh``, in place.

    Parameters are replaced, so optimizers come later, and so does `fully_shard` where both are
    used. ``hidden_states`` and the output stay whole on every rank, and each rank has a cache of
    its own with the same latents. Everything outside the layers is left as it is.

    Args:
        module: a `mla.MultiheadLatentAttention`, or a model with MLA layers inside, also those of
            transformers, stock or replaced.
        mesh: with one dim; of several take one, ``mesh["tp"]``.
        src_data_rank: of ``mesh``, whose parameters all ranks get; None: each has the same already.

    Returns:
        ``module``.

    Raises:
        ShapeError: the mesh has several dims, or its size does not divide the heads of a layer;
            nothing has changed.
        UnsupportedError: there is no MLA layer, one has parameters that `TP_PLAN` does not name or
            that are sharded already; nothing has changed.
    """
    if mesh.ndim != 1:
        raise ShapeError(
            f"shard_heads: mesh has {mesh.ndim} dims {mesh.mesh_dim_names}, expected one; "
            "take one by its name"
        )
    plan = head_plan(module)
    if not plan:
        raise UnsupportedError(
            f"shard_heads: module has type {type(module).__name__} without an MLA layer, expected "
            "a MultiheadLatentAttention or a model with MLA layers inside"
        )
    for name, layer in mla_layers(module):
        _check_layer(f"module {name}" if name else "module", layer, mesh.size())
    styles = parallel_styles(module, plan)
    parallelize_module(module, mesh, styles, src_data_rank=src_data_rank)
    return module


def _check_layer(name: str, layer: Any, size: int) -> None:
    """Heads that divide, in parameters that are whole."""
    H = layer.config.num_attention_heads
    if H % size:
        raise ShapeError(
            f"shard_heads: {name} has H={H} heads, expected a multiple of {size}, the size of the "
            "mesh"
        )
    for key, weight in layer.named_parameters():
        if isinstance(weight, DTensor):
            raise UnsupportedError(
                f"shard_heads: {name} has {key} with placements {weight.placements}, expected "
                "whole parameters; shard heads once, and before fully_shard"
            )
