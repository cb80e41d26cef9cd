"""The attention function that replaced layers name, and what it accepts.

transformers calls it with a layer's latents in place of keys, its shared rotated keys in place of
values, and every keyword that the model was called with. A keyword that may change the mathematics
is refused: ignoring one gives wrong tokens silently.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from mla.checks import UnsupportedError
from mla.integrations.transformers.attend import CodedKeys, PlainKeys, attend_keys
from mla.integrations.transformers.masks import boolean_mask, is_packed, key_run_mask
from mla.integrations.transformers.paged import PagedLatents, attend_batch
from mla.view import CacheView

IMPLEMENTATION = "mla"  # the name in config._attn_implementation
MASKS = (IMPLEMENTATION, "sdpa", "eager")  # whose masks replaced layers can read
RECORD = "_mla_record"  # the attribute that marks a replaced layer, with its options
# Keywords that stock attention ignores too and that do not change the mathematics.
HARMLESS = {
    "cache_position",
    "labels",
    "mm_token_type_ids",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "token_type_ids",
    "use_cache",
}
# Boundaries of packed sequences: fine where the mask carries them as well.
# What a manager of continuous batching passes along; `paged` has its own tables.
BATCHING = {
    "cache",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "logits_indices",
    "logits_processor_args",
    "max_length_k",
    "max_length_q",
    "read_index",
    "write_index",
}
PACKING = {"cu_seq_lens_k", "cu_seq_lens_q", "max_length_k", "max_length_q", "seq_idx"}


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of replaced layers; ``key`` and ``value`` are latent and shared key.

    From a cache of coded rows they are the `CacheView` of the rows and the new tokens unquantised.
    A layer that was not replaced gets here when its model was built from the config of one that
    was: it is given transformers' own attention.
    """
    record = getattr(module, RECORD, None)
    if record is None:
        mask = boolean_mask(attention_mask, query.shape[2], key.shape[2])
        options = {"scaling": scaling, "dropout": dropout, "is_causal": is_causal}
        stock = AttentionInterface()["sdpa"]
        result: tuple[Tensor, None] = stock(module, query, key, value, mask, **options, **kwargs)
        return result
    layer: Any = module
    implementation = record.mask_config._attn_implementation
    if implementation not in MASKS:
        raise UnsupportedError(
            f"mla attention: config._attn_implementation has value {implementation!r}, expected "
            f"one of {MASKS} beside replaced layers; call replace_attention(model) again, or "
            "restore_attention(model) to use the other attention"
        )
    cache, scale = kwargs.get("cache"), query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(cache, PagedLatents):
        others = {name: x for name, x in kwargs.items() if name not in BATCHING}
        _check_keywords(others, None, key.shape[2])
        out = attend_batch(
            query,
            key,
            value,
            layer.kv_b_proj,
            cache,
            layer.layer_idx,
            nope_dim=layer.qk_nope_head_dim,
            value_dim=layer.v_head_dim,
            scale=scale,
            impl=record.impl,
        )
        return out, None
    keys = CodedKeys(key, value) if isinstance(key, CacheView) else PlainKeys(key, value)
    _check_keywords(kwargs, attention_mask, keys.num_keys)
    out = attend_keys(
        query,
        keys,
        layer.kv_b_proj,
        nope_dim=layer.qk_nope_head_dim,
        value_dim=layer.v_head_dim,
        mask=_mask_for(layer, attention_mask, is_causal, query, keys.num_keys),
        scale=scale,
        dropout=dropout,
        impl=record.impl,
    )
    return out, None


def _mask_for(
    layer: Any, mask: Tensor | None, is_causal: bool | None, query: Tensor, num_keys: int
) -> Tensor | None:
    """The mask, spelled out where a missing one means that every query sees every key."""
    num_queries = query.shape[2]
    if is_causal is None:
        is_causal = getattr(layer, "is_causal", True)
    if is_causal or num_queries == 1:
        return mask
    if mask is not None and is_packed(mask):
        raise UnsupportedError(
            "mla attention: is_causal has value False beside a causal mask, expected True; set "
            "config.is_causal = False for bidirectional attention"
        )
    if mask is None:
        mask = torch.ones(1, 1, num_queries, num_keys, dtype=torch.bool, device=query.device)
    return mask


def _check_keywords(kwargs: dict[str, Any], mask: Tensor | None, num_keys: int) -> None:
    """Refuse what may change the mathematics and is not implemented."""
    for name, value in kwargs.items():
        if value is None or value is False or name in HARMLESS:
            continue
        is_in_mask = mask is not None and not is_packed(mask)
        if name in PACKING and is_in_mask:
            continue
        if name == "sliding_window" and (is_in_mask or value >= num_keys):
            continue
        raise UnsupportedError(
            f"mla attention: {name} has a value of type {type(value).__name__}, expected None: it "
            "is not implemented; restore_attention(model) gives back the stock attention"
        )


AttentionInterface.register(IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, key_run_mask)
