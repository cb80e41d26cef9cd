"""W_UK and W_UV: what ``kv_b_proj`` expands with, as views; and the two products that absorb them.

    w_uk_HNC, w_uv_HVC = rows of kv_b_proj.weight, per head N key rows, then V value rows
    q_latent_BLHC = q_nope_BLHN . w_uk_HNC          values_BLHV = out_BLHC . w_uv_HVC

Nothing is copied or precomputed, so optimizer steps, ``load_state_dict`` and adapters leave no
stale weight behind. The product W_UK^T W_UQ is never formed: for DeepSeek-V3 it has three times the
values of its factors.

Dims: B batch, L queries, H heads, C latent, N unrotated key width, V value width.
Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mla.checks import ShapeError, UnsupportedError

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class KeyValueWeights(NamedTuple):
    w_uk: Tensor
    w_uv: Tensor


def split_kv_b(weight: Tensor, H: int, N: int, V: int) -> KeyValueWeights:
    """Cut the weight of ``kv_b_proj`` into its key and its value part.

    Args:
        weight: ``[H*(N+V), C]``, per head N key rows, then V value rows.
        H, N, V: heads, unrotated key width, value width.

    Returns:
        w_uk: ``[H, N, C]`` view of ``weight``.
        w_uv: ``[H, V, C]`` view of ``weight``.

    Raises:
        ShapeError: ``weight`` has another number of rows.
    """
    if weight.ndim != 2 or weight.shape[0] != H * (N + V):
        raise ShapeError(
            f"split_kv_b: weight has shape {tuple(weight.shape)}, "
            f"expected [H*(N+V)={H * (N + V)}, C] for H={H}, N={N}, V={V}"
        )
    weight_HIC = weight.view(H, N + V, weight.shape[1])
    return KeyValueWeights(weight_HIC[:, :N], weight_HIC[:, N:])


def absorb_queries(q_nope: Tensor, w_uk: Tensor) -> Tensor:
    """Queries that score latents directly: ``q_nope_BLHN . w_uk_HNC``.

    Args:
        q_nope: ``[B, L, H, N]``.
        w_uk: ``[H, N, C]``.

    Returns:
        ``[B, L, H, C]``, last dim contiguous; 0 where N is 0.
    """
    return _per_head(q_nope, w_uk)


def absorb_output(out: Tensor, w_uv: Tensor) -> Tensor:
    """Values of each head from its mean latent: ``out_BLHC . w_uv_HVC``.

    Args:
        out: ``[B, L, H, C]``.
        w_uv: ``[H, V, C]``.

    Returns:
        ``[B, L, H, V]``, strides free.
    """
    if out.dtype == torch.bfloat16 and out.device.type == "cpu":
        return _per_head_weight_first(out, w_uv)
    return _per_head(out, w_uv.transpose(1, 2))


def _per_head(x_BLHI: Tensor, weight_HIO: Tensor) -> Tensor:
    B, L, H, I = x_BLHI.shape  # noqa: E741
    x_HTI = x_BLHI.reshape(B * L, H, I).transpose(0, 1)
    return torch.bmm(x_HTI, weight_HIO).transpose(0, 1).view(B, L, H, weight_HIO.shape[2])


# oneDNN is slow where the second factor of a bfloat16 product is a transposed view. H=16, C=512,
# V=128, one thread of a Zen 5 core, torch 2.13.0: 956 -> 159 us for 1 token, 2032 -> 1172 for 160.
def _per_head_weight_first(x_BLHI: Tensor, weight_HOI: Tensor) -> Tensor:
    B, L, H, I = x_BLHI.shape  # noqa: E741
    x_HTI = x_BLHI.reshape(B * L, H, I).transpose(0, 1).contiguous()
    y_HOT = torch.bmm(weight_HOI, x_HTI.transpose(1, 2))
    return y_HOT.permute(2, 0, 1).view(B, L, H, weight_HOI.shape[1])


def effective_weight(kv_b_proj: nn.Module) -> Tensor:
    """The matrix that ``kv_b_proj`` multiplies with at this moment.

    A plain linear layer gives its own parameter. A LoRA layer of peft gives
    ``base + sum of scaling * B @ A`` over its active adapters, in the dtype of the base, and the
    base where adapters are merged or disabled. Where heads are sharded over processes
    (`mla.parallel.shard_heads`), these are the rows of the heads that this process has; training
    multiplies them with `with_whole_gradient`. Gradients reach every part; nothing is changed.

    Returns:
        ``[H*(N+V), C]``.

    Raises:
        UnsupportedError: the layer has a bias, is quantised or offloaded, is sharded otherwise than
            by heads, or is of a kind that is not known to multiply with one matrix.
    """
    if _is_peft(kv_b_proj, "tuners.lora.layer", "Linear"):
        return _lora_weight(kv_b_proj)
    if _is_peft(kv_b_proj, "utils.other", "ModulesToSaveWrapper"):
        return effective_weight(_saved_module(kv_b_proj))
    return _linear_weight(kv_b_proj)


def with_whole_gradient(latent: Tensor, kv_b_proj: nn.Module) -> Tensor:
    """The latent to multiply `effective_weight` with, for training.

    Where heads are sharded, each process gets the gradient of the latent through its own heads;
    the backward pass sums them over the processes, as the forward of a column-wise sharded layer
    would. Otherwise ``latent`` is returned as it is.

    Args:
        latent: ``[.., C]``, the same on all processes.
    """
    mesh = getattr(getattr(kv_b_proj, "weight", None), "device_mesh", None)
    if mesh is None or not (latent.requires_grad and torch.is_grad_enabled()):
        return latent
    from torch.distributed.tensor import DTensor, Partial, Replicate

    whole = DTensor.from_local(latent, mesh, [Replicate()], run_check=False)
    return whole.to_local(grad_placements=[Partial()])


class Expansion(NamedTuple):
    """What keys and values are made of."""

    weight: Tensor
    latent: Tensor


def expansion(kv_b_proj: nn.Module, latent: Tensor) -> Expansion:
    """`effective_weight`, and ``latent [.., C]`` `with_whole_gradient`."""
    return Expansion(effective_weight(kv_b_proj), with_whole_gradient(latent, kv_b_proj))


def local_part(weight: Tensor) -> Tensor:
    """The part of a DTensor that this process holds; a plain tensor as it is."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


def _refuse(fact: str, advice: str = "") -> UnsupportedError:
    text = f"effective_weight: kv_b_proj has {fact}, expected a linear layer of one plain matrix"
    return UnsupportedError(f"{text}; {advice}" if advice else text)


def _is_peft(module: nn.Module, path: str, name: str) -> bool:
    kind = type(module)
    return kind.__name__ == name and kind.__module__ == f"peft.{path}"


def _linear_weight(module: nn.Module) -> Tensor:
    kind = type(module)
    if not isinstance(module, nn.Linear) or kind.forward is not nn.Linear.forward:
        raise _refuse(f"type {kind.__module__}.{kind.__qualname__}")
    if "forward" in vars(module):
        _check_forward(module)
    if module.bias is not None:
        raise _refuse("a bias", "a bias of keys cannot be absorbed; fold it away or drop it")
    weight = module.weight
    if weight.dtype not in FLOAT_DTYPES or not _is_plain(type(weight)):
        raise _refuse(f"a weight of type {type(weight).__name__} and dtype {weight.dtype}")
    if hasattr(weight, "device_mesh"):
        _check_sharding(kind, weight)
    return local_part(weight)


def _check_sharding(kind: type, weight: Any) -> None:
    """Rows of whole heads, or all of them; engines that shard parameters gather them before use."""
    advice = "shard whole attention layers, and heads with mla.parallel.shard_heads"
    if any(base.__name__ == "FSDPModule" for base in kind.__mro__):
        raise _refuse("an FSDP unit of its own, whose weight is not gathered here", advice)
    placements = weight.placements
    if len(placements) != 1 or not (placements[0].is_replicate() or placements[0].is_shard(0)):
        raise _refuse(f"a weight with placements {tuple(placements)}", advice)


# Subclasses of Tensor that torch itself defines (DTensor, fake tensors) stand for a matrix; others
# are packed formats.
def _is_plain(kind: type) -> bool:
    return kind in (nn.Parameter, Tensor) or kind.__module__.startswith("torch.")


def _check_forward(module: nn.Module) -> None:
    """Others replace ``forward`` of an instance: accelerate, which may move the weight away, and
    the tensor parallelism of transformers, whose weights are DTensors."""
    if module.forward.__module__ == "transformers.distributed.tensor_parallel":
        return
    hook: Any = getattr(module, "_hf_hook", None)
    if hook is None:
        raise _refuse("a forward method of its own")
    if any(getattr(part, "offload", False) for part in getattr(hook, "hooks", (hook,))):
        raise _refuse("an offloaded weight", "keep attention layers on their device")


def _lora_weight(module: Any) -> Tensor:
    weight = effective_weight(module.base_layer)
    if module.disable_adapters:
        # peft would unmerge here, in place; subtracting leaves the model as it is.
        return _add_deltas(module, weight, module.merged_adapters, sign=-1.0)
    if module.merged:
        return weight
    return _add_deltas(module, weight, module.active_adapters, sign=1.0)


def _add_deltas(module: Any, weight: Tensor, adapters: list[str], *, sign: float) -> Tensor:
    for name in adapters:
        if name not in module.lora_A:
            continue
        _check_adapter(module, name, is_applied_to_input=sign > 0)
        up, down = module.lora_B[name].weight, module.lora_A[name].weight
        if up.shape[0] != weight.shape[0]:
            raise _refuse(f"adapter {name!r} on a weight sharded by heads", "merge it before")
        weight = (weight + sign * module.scaling[name] * (up @ down)).to(weight.dtype)
    return weight


def _check_adapter(module: Any, name: str, *, is_applied_to_input: bool) -> None:
    if name in getattr(module, "lora_variant", {}):
        raise _refuse(f"adapter {name!r} of variant {type(module.lora_variant[name]).__name__}")
    if getattr(module, "use_dora", {}).get(name):  # how older versions of peft say it
        raise _refuse(f"adapter {name!r} of variant DoRA")
    if module.lora_B[name].bias is not None:
        raise _refuse(f"adapter {name!r} with a bias")
    if getattr(module, "fan_in_fan_out", False):
        raise _refuse(f"adapter {name!r} with fan_in_fan_out")
    dropout = getattr(module.lora_dropout[name], "p", 0.0)
    if module.training and dropout > 0.0 and is_applied_to_input:
        raise _refuse(
            f"adapter {name!r} with dropout {dropout} in training",
            "train this adapter with lora_dropout=0, or call eval()",
        )


def _saved_module(wrapper: Any) -> nn.Module:
    """The one of its copies that peft's ``modules_to_save`` wrapper runs."""
    active = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
    is_original = wrapper.disable_adapters or not active
    module: nn.Module = wrapper.original_module
    return module if is_original else wrapper.modules_to_save.get_submodule(active[0])
