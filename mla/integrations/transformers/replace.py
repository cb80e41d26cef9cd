"""Replace the attention of MLA layers of a loaded transformers model, per instance, reversibly.

From transformers 5.15 on an MLA layer caches latents, then calls ``expand_kv`` on the whole cache
and hands the result to the function named by ``config._attn_implementation``. A replaced layer has

    expand_kv   an attribute of the instance: the identity, so that latents reach the function
    config      a copy of its own that names `dispatch.attention_forward`

and the models around it have a copy of their config, so that masks are made by `key_run_mask` and a
config object shared with other models stays as it is. No parameter, buffer or class is touched.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, StaticCache

from mla.absorb import effective_weight
from mla.checks import UnsupportedError
from mla.codec import Codec
from mla.integrations.transformers.continuous import ManagerMaker
from mla.integrations.transformers.dispatch import IMPLEMENTATION, RECORD
from mla.integrations.transformers.model_caches import LatentCache, hold_latents_

INSTANCE_ATTRIBUTES = (
    "expand_kv",
    "_prepare_cache_for_generation",
    "init_continuous_batching",
    RECORD,
)
LAYER_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@dataclass(frozen=True)
class ReplacementReport:
    """What `replace_attention` did: names of replaced layers, and why the others were left."""

    replaced: tuple[str, ...]
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"replaced attention in {len(self.replaced)} MLA layers"]
        lines += [f"left {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Record:
    """What `restore_attention` needs to know about one module."""

    config: Any  # the object that was there before
    impl: Any = "auto"
    mask_config: Any = None  # layers: the config that decides which masks they get


def replace_attention(
    model: nn.Module, *, codec: Codec | None = None, impl: Any = "auto"
) -> ReplacementReport:
    """Make the MLA layers of ``model`` decode straight from their latents, changed in place.

    ``generate`` then also uses a `LatentCache` where the caller chose no cache, and latent layers
    in a static one; ``generate_batch`` keeps the same rows in pages. With plain rows tokens stay
    those of the stock model up to rounding; with coded ones, those of a model whose earlier tokens
    were replaced by what is left of them. Calling it again replaces again, with the new options.
    All layers of one decoder share a mask, so a decoder is replaced whole or left whole.

    Args:
        model: a model of transformers 5.15 or newer, or a module that holds one (a peft model).
        codec: how the caches that ``generate`` makes store their rows; None: plain values. A cache
            that the caller passes keeps its own, see `LatentCache`.
        impl: as in `mla.ops.mla_decode`.

    Returns:
        The report; layers that cannot be replaced are listed with the reason.

    Raises:
        UnsupportedError: ``model`` has no MLA layer, or ``codec`` is none of `mla.codec`.
    """
    if not isinstance(codec, Codec | None):
        raise UnsupportedError(
            f"replace_attention: codec has value {codec!r}, expected None or a codec of mla.codec, "
            "such as Int8Codec()"
        )
    if not any(_is_mla_layer(module) for module in model.modules()):
        raise UnsupportedError(
            f"replace_attention: model has type {type(model).__name__} without multi-head latent "
            "attention, expected at least one such layer of transformers 5.15 or newer"
        )
    restore_attention(model)
    replaced, left = _plan(model)
    _replace_models(model, replaced, codec)
    copies: dict[int, Any] = {}
    for layer, owner in replaced.values():
        config = copies.setdefault(id(layer.config), copy.copy(layer.config))
        config._attn_implementation_internal = IMPLEMENTATION
        setattr(layer, RECORD, _Record(layer.config, impl, owner.config))
        layer.config = config
        layer.expand_kv = _keep_latents
    return ReplacementReport(tuple(replaced), left)


def _keep_latents(latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
    """What ``expand_kv`` of a replaced layer does: nothing."""
    return latent, k_rope


def restore_attention(model: nn.Module) -> None:
    """Undo `replace_attention`: the stock layers, configs and caches again. Harmless if undone.

    Changes made to ``model.config`` in between are kept.
    """
    for module in model.modules():
        record = vars(module).get(RECORD)
        if record is None:
            continue
        if isinstance(module, PreTrainedModel):
            _copy_changes(module.config, record.config)
        module.config = record.config
        manager = vars(module).pop("_cached_continuous_batching_manager", None)
        if manager is not None:
            manager.destroy()
        for name in INSTANCE_ATTRIBUTES:
            vars(module).pop(name, None)


class _CachePreparer:
    """``_prepare_cache_for_generation`` of one model, with a `LatentCache` as the default."""

    def __init__(self, model: Any, codec: Codec | None, layers: frozenset[int]) -> None:
        self.model, self.codec, self.layers = model, codec, layers

    def __call__(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        model, given = self.model, model_kwargs.get("past_key_values")
        stock = type(model)._prepare_cache_for_generation
        result = stock(model, generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        chosen = generation_config.cache_implementation
        is_default = type(cache) is DynamicCache and chosen is None
        if given is None and (is_default or type(cache) is StaticCache):
            if is_default:
                cache.__class__ = LatentCache
            hold_latents_(cache, self.codec, self.layers)
        return result


def _is_mla_layer(module: nn.Module) -> bool:
    has_sizes = all(isinstance(getattr(module, size, None), int) for size in LAYER_SIZES)
    return has_sizes and hasattr(module, "expand_kv") and hasattr(module, "kv_b_proj")


def _dispatches(module: nn.Module) -> bool:
    """Whether the layer asks transformers' registry for its attention function."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _reason_to_leave(layer: Any, owner: Any) -> str | None:
    """Why this layer cannot be replaced, None if it can."""
    if not _is_mla_layer(layer):
        return "it is not a layer of multi-head latent attention"
    if owner is None:
        return "it is not part of a transformers model"
    if getattr(layer, "indexer", None) is not None or getattr(layer, "skip_topk", False):
        return "its attention is sparse: an indexer selects the keys"
    if getattr(layer, "sinks", None) is not None:
        return "it has attention sinks"
    if "expand_kv" in vars(layer):
        return "expand_kv was replaced by somebody else"
    if not _dispatches(layer):
        return "its forward does not use transformers' attention interface"
    if getattr(layer, "num_key_value_groups", 1) != 1:
        return "it has fewer key-value heads than heads"
    try:
        effective_weight(layer.kv_b_proj)
    except UnsupportedError as error:
        return str(error)
    return None


def _with_owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """Every module once, with its name and the innermost `PreTrainedModel`: it makes the masks."""
    owners: dict[int, Any] = {}
    for module in model.modules():  # outer modules come first
        if isinstance(module, PreTrainedModel):
            owners |= {id(below): module for below in module.modules()}
    for name, module in model.named_modules():
        yield name, module, owners.get(id(module))


def _plan(model: nn.Module) -> tuple[dict[str, tuple[Any, Any]], dict[str, str]]:
    """Layers to replace with their owners, and MLA layers to leave with the reasons.

    The layers of one owner share its mask, so one layer that stays stock keeps all of them so.
    """
    found = {
        name: (module, owner)
        for name, module, owner in _with_owners(model)
        if _is_mla_layer(module) or _dispatches(module)
    }
    reasons = {name: _reason_to_leave(*pair) for name, pair in found.items()}
    stock = {id(found[name][1]): name for name, reason in reasons.items() if reason is not None}
    replaced, left = {}, {}
    for name, (layer, owner) in found.items():
        if not _is_mla_layer(layer):
            continue
        reason = reasons[name]
        if reason is None and id(owner) in stock:
            reason = f"{stock[id(owner)]} keeps stock attention and needs the stock mask"
        if reason is None:
            replaced[name] = (layer, owner)
        else:
            left[name] = reason
    return replaced, left


def _replace_models(
    model: nn.Module, replaced: dict[str, tuple[Any, Any]], codec: Codec | None
) -> None:
    """Give the owners of replaced layers and the models around them configs of their own."""
    owned = {id(owner.config) for _, owner in replaced.values()}
    layers = {id(layer) for layer, _ in replaced.values()}
    copies: dict[int, Any] = {}
    for module in list(model.modules()):
        if not isinstance(module, PreTrainedModel):
            continue
        config = _own_config(module.config, owned, copies)
        if config is module.config:
            continue
        setattr(module, RECORD, _Record(module.config))
        module.config = config
        if hasattr(module, "_prepare_cache_for_generation"):
            below: list[Any] = [x for x in module.modules() if id(x) in layers]
            indices = frozenset(layer.layer_idx for layer in below)
            vars(module)["_prepare_cache_for_generation"] = _CachePreparer(module, codec, indices)
            vars(module)["init_continuous_batching"] = ManagerMaker(module, below, codec)


def _own_config(config: Any, owned: set[int], copies: dict[int, Any]) -> Any:
    """A copy that names our attention in the configs ``owned``; ``config`` itself if in none."""
    if id(config) in copies:
        return copies[id(config)]
    inner = {key: getattr(config, key, None) for key in config.sub_configs}
    inner = {key: sub for key, sub in inner.items() if sub is not None}
    changed = {key: _own_config(sub, owned, copies) for key, sub in inner.items()}
    changed = {key: sub for key, sub in changed.items() if sub is not inner[key]}
    result = config
    if changed or id(config) in owned:
        result = copy.copy(config)
        for key, sub in changed.items():
            setattr(result, key, sub)
    if id(config) in owned:
        result._attn_implementation_internal = IMPLEMENTATION
    copies[id(config)] = result
    return result


def _copy_changes(changed: Any, original: Any) -> None:
    """Carry over what was set on the copy of a config while it was in use."""
    kept = {"_attn_implementation_internal", *original.sub_configs}
    for key, value in vars(changed).items():
        if key not in kept and vars(original).get(key) is not value:
            vars(original)[key] = value
