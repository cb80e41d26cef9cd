"""transformers' masks as one run of visible keys per row, without ``[B, 1, L, T]`` tensors.

A mask that is causal over one run of keys per row travels through transformers as a small int32
tensor; every other mask stays the boolean one that transformers makes for SDPA. The small tensor:

    shape [B, 1, K, 0]   no padding: query l sits at position T - L + l of all T keys
    shape [B, 1, K, 2]   (start, length) of each row: query l sits at position length - L + l and
                         sees keys from start up to its own; K > 1 is a host bound of the lengths

Queries that are padding themselves (right padding) get an output that nobody should read.

Dims: B batch, L queries, T cached keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.utils.import_utils import is_tracing


class KeyRuns(NamedTuple):
    """Which keys a causal query may see in each row; None stands for the first and the last key."""

    starts: Tensor | None  # [B] int32
    lengths: Tensor | None  # [B] int32
    num_keys: int  # host bound of lengths


def key_run_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """Build the mask of a model with replaced attention; registered in `AttentionMaskInterface`.

    Under tracing the values of ``attention_mask`` cannot be looked at: there, a row that is not
    one run of keys fails an assertion of the graph.

    Args:
        attention_mask: ``[B, seen + L]`` bool, False where a token is padding, or None.
        mask_function: what transformers combined; only plain causal becomes a run.

    Returns:
        The int32 tensor of the file's head, or ``[B, 1, L, T]`` bool.
    """
    arguments = (batch_size, q_length, kv_length, q_offset, kv_offset, mask_function)
    causal = mask_function is causal_mask_function and isinstance(kv_offset, int) and kv_offset == 0
    if not causal or (attention_mask is not None and attention_mask.ndim != 2):
        return _boolean_mask(*arguments, attention_mask, device, kwargs)
    if attention_mask is None:
        starts = ends = None
    else:
        starts, ends, is_run = _runs(attention_mask[:, :kv_length])
        if is_tracing(attention_mask):
            torch._assert_async(
                is_run.all(), "mla: attention_mask has a row with holes, expected one run of ones"
            )
        elif not bool(is_run.all()):
            return _boolean_mask(*arguments, attention_mask, device, kwargs)
        elif bool((ends - starts == kv_length).all()):
            starts = ends = None
    if starts is None and isinstance(q_offset, int) and q_offset + q_length == kv_length:
        return torch.empty(batch_size, 1, 1, 0, dtype=torch.int32, device=device)
    return _pack(batch_size, q_length, kv_length, q_offset, starts, ends, device)


def _boolean_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None,
    device: torch.device | str,
    kwargs: dict[str, Any],
) -> Tensor:
    """transformers' own mask, always formed: a missing one would be taken for plain causal."""
    never_skip = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    options = kwargs | never_skip
    mask: Tensor = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        device=device,
        **options,
    )
    return mask


def _runs(visible_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First visible key, one past the last, and whether all between are visible, each ``[B]``."""
    T = visible_BT.shape[1]
    position = torch.arange(T, device=visible_BT.device)
    starts = torch.where(visible_BT, position, T).amin(1)
    ends = torch.where(visible_BT, position + 1, 0).amax(1)
    is_run = visible_BT.sum(1) == (ends - starts).clamp(min=0)
    return starts, ends, is_run


def _pack(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    device: torch.device | str,
) -> Tensor:
    zeros = torch.zeros(batch_size, dtype=torch.int64, device=device)
    lengths = zeros + (q_offset + q_length)
    if q_length == 1 and ends is not None:
        lengths = torch.minimum(lengths, ends)  # a lone query may itself be padding
    packed = torch.stack((zeros if starts is None else starts, lengths), dim=-1)
    packed = packed.to(torch.int32)[:, None, None]
    if q_length > 1 and not is_tracing(lengths):
        # A static cache has far more slots than a first prefill fills; transformers' own mask
        # waits for the device here too. Powers of two keep the number of compiled shapes small.
        bound = 1 << (int(q_offset) + q_length - 1).bit_length()
        if 1 < bound < kv_length:
            packed = packed.expand(-1, -1, bound, -1)
    return packed


def key_runs(mask: Tensor | None, num_queries: int, num_keys: int) -> KeyRuns | None:
    """Read a mask as runs of keys; None where it is something else.

    Args:
        mask: what an attention layer of transformers receives. None means, as for SDPA there,
            every key for one query, and causal from the first key on for several.
        num_queries, num_keys: L and T of the layer.
    """
    if mask is None:
        if num_queries == 1:
            return KeyRuns(None, None, num_keys)
        return KeyRuns(None, None, num_queries) if num_queries <= num_keys else None
    if not is_packed(mask):
        return None
    if mask.shape[3] == 0:
        return KeyRuns(None, None, num_keys)
    starts, lengths = mask[:, 0, 0].unbind(-1)
    bound = mask.shape[2]
    return KeyRuns(starts, lengths, num_keys if bound == 1 else min(bound, num_keys))


def is_packed(mask: Tensor | None) -> bool:
    """Whether this is the small tensor of `key_run_mask`."""
    return mask is not None and mask.dtype == torch.int32 and mask.ndim == 4


def boolean_mask(mask: Tensor | None, num_queries: int, num_keys: int) -> Tensor | None:
    """A mask that SDPA takes: the small tensor spelled out, everything else as it is."""
    if mask is None or not is_packed(mask):
        return mask
    position = torch.arange(num_keys, device=mask.device)
    query = torch.arange(num_queries, device=mask.device)[:, None]
    if mask.shape[3] == 0:
        visible_LT = position <= num_keys - num_queries + query
        return visible_LT.expand(mask.shape[0], 1, -1, -1)
    starts, lengths = (x[:, None, None, None] for x in mask[:, 0, 0].unbind(-1))
    return (position >= starts) & (position <= lengths - num_queries + query)
