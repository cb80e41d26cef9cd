"""Layers of latent caches under transformers' cache contract, one growing buffer each.

    rows [B, capacity, C+R]   latent first, then the shared rotated key; the first T are filled
    rows [B, capacity, W]     the same as uint8, W bytes each, with a codec of `mla.codec`

transformers' own `DynamicCache` copies all it holds at every token; here a token is written into
a buffer that grows by half when it is full. Plain rows are handed out as two views of it, coded
ones as one `CacheView`, which only replaced attention layers can read (see `coded`).

Dims: B batch, L new tokens, T cached tokens, C latent width, R rotated width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, StaticLayer

from mla.checks import ShapeError
from mla.codec import Codec, PlainCodec
from mla.integrations.transformers.coded import append_coded, refuse_gradient
from mla.ops import mla_gather
from mla.view import CacheView

GROWTH = 1.5  # a full buffer is replaced by one of this many times its rows


class LatentCacheLayer(CacheLayerMixin):
    """The cache of one MLA layer: latents and shared keys side by side, written in place.

    Takes what the attention layers of transformers pass to ``update``, ``[B, 1, L, C]`` and
    ``[B, 1, L, R]``; sizes, dtype and device are those of the first call. Outside ``torch.no_grad``
    plain rows are joined into a new buffer instead: a recorded step may need the old one again.
    Coded rows carry no gradient: an update that would need one raises.

    Args:
        codec: how rows are stored; None: plain values.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, codec: Codec | None = None) -> None:
        # Not the parent's: it assigns ``keys`` and ``values``, which are views here.
        self.codec = codec or PlainCodec()
        self.rows: Tensor | None = None  # [B, capacity, C+R], or [B, capacity, W] uint8
        self.length = 0
        self.latent_width = self.rope_width = 0
        self.is_initialized = False
        self.is_recorded = False  # autograd may need the buffer as it is

    @property
    def keys(self) -> Tensor | None:
        """``[B, 1, T, C]`` latents, None before the first token; coded rows are decoded anew."""
        return None if self.rows is None else self._views()[0]

    @property
    def values(self) -> Tensor | None:
        """``[B, 1, T, R]`` shared keys, None before the first token; see `keys`."""
        return None if self.rows is None else self._views()[1]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Set widths, dtype and device from the first tokens; allocates no rows."""
        B, _, _, C = key_states.shape
        dtype = torch.promote_types(key_states.dtype, value_states.dtype)
        self.latent_width, self.rope_width = C, value_states.shape[-1]
        width = self.codec.row_width(C, self.rope_width)
        self.rows = key_states.new_empty(B, 0, width, dtype=self.codec.storage_dtype(dtype))
        self.dtype, self.device = dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Append ``[B, 1, L, C]`` and ``[B, 1, L, R]``.

        Returns:
            Plain rows: views of all T tokens, ``[B, 1, T, C]`` and ``[B, 1, T, R]``. Coded rows:
            the `CacheView` of all T tokens and the L new ones unquantised.

        Raises:
            ShapeError: sizes other than those of the rows held; the cache stays as it was.
            UnsupportedError: a gradient would have to pass through coded rows.
        """
        _check_states(key_states, value_states, self)
        if self.codec.kind != "plain":
            return self._update_coded(key_states, value_states)
        if self.rows is None:
            self.lazy_initialization(key_states, value_states)
        begin, end = self.length, self.length + key_states.shape[2]
        held, C = self.rows, self.latent_width
        assert held is not None
        if torch.is_grad_enabled():
            new_rows = torch.cat((key_states[:, 0], value_states[:, 0]), dim=-1)
            self.rows = torch.cat((held[:, :begin], new_rows.to(held.dtype)), dim=1)
            self.is_recorded = True
        else:
            self.rows = self._reserved(held, end)
            self.rows[:, begin:end, :C] = key_states[:, 0]
            self.rows[:, begin:end, C:] = value_states[:, 0]
        self.length = end
        return self._views()

    def _update_coded(self, key_states: Tensor, value_states: Tensor) -> tuple[Any, Any]:
        refuse_gradient(key_states, value_states)
        if self.rows is None:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        assert self.rows is not None
        self.rows = self._reserved(self.rows, end)
        result = append_coded(
            self.rows,
            self._lengths(end),
            end,
            key_states.to(self.dtype),
            value_states.to(self.dtype),
            self.codec,
        )
        self.length = end
        return result

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the next ``query_length`` queries will meet, and the first one's position."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """T, the tokens held."""
        return self.length

    def get_max_length(self) -> int:
        """-1: grows without a bound."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens; the buffer stays.

        Raises:
            ValueError: a positive count, which transformers no longer takes for a final length.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"LatentCacheLayer.crop: tokens_to_remove has value {tokens_to_remove}, expected "
                "0 or the negative number of tokens to remove"
            )
        self.length = max(0, self.length + tokens_to_remove)

    def reset(self) -> None:
        """Forget everything, the buffer too: the next batch may have another size."""
        self.rows, self.length, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row ``beam_idx[b]`` was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times, copies side by side."""
        if self.rows is not None:
            index = torch.arange(self.rows.shape[0], device=self.rows.device)
            self.batch_select_indices(index.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` (integers or a bool mask), in that order."""
        if self.rows is None:
            return
        filled = self.rows[:, : self.length][indices.to(self.rows.device)]
        rows = filled.new_empty(filled.shape[0], self.rows.shape[1], filled.shape[2])
        rows[:, : self.length] = filled
        self.rows, self.is_recorded = rows, torch.is_grad_enabled()

    def offload(self) -> None:
        """Move the rows to the CPU."""
        if self.rows is not None:
            self.rows = self.rows.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        """Move the rows back to their device."""
        if self.rows is not None and self.rows.device != self.device:
            self.rows = self.rows.to(self.device, non_blocking=True)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer, unused rows included."""
        return 0 if self.rows is None else self.rows.nbytes

    def _views(self) -> tuple[Tensor, Tensor]:
        assert self.rows is not None
        if self.codec.kind != "plain":
            return _decoded(self, self._lengths(self.length), self.length)
        filled = self.rows[:, None, : self.length]
        return filled[..., : self.latent_width], filled[..., self.latent_width :]

    def _lengths(self, length: int) -> Tensor:
        assert self.rows is not None
        B = self.rows.shape[0]
        return torch.full((B,), length, dtype=torch.int32, device=self.rows.device)

    def _reserved(self, held: Tensor, length: int) -> Tensor:
        """A buffer with room for ``length`` rows that may be written in place."""
        B, capacity, width = held.shape
        # A buffer made under inference_mode cannot be written outside of it.
        is_frozen = held.is_inference() and not torch.is_inference_mode_enabled()
        if length <= capacity and not is_frozen and not self.is_recorded:
            return held
        self.is_recorded = False
        new_capacity = max(length, int(GROWTH * capacity)) if length > capacity else capacity
        rows = held.new_empty(B, new_capacity, width)
        rows[:, : self.length] = held[:, : self.length]
        return rows


class StaticLatentLayer(StaticLayer):
    """A `LatentCacheLayer` of fixed capacity, for compiled decoding: addresses never change.

    Args:
        max_cache_len: capacity in tokens.
        codec: how rows are stored; None: plain values.
    """

    def __init__(self, max_cache_len: int, codec: Codec | None = None) -> None:
        # Not the parent's: it assigns ``keys`` and ``values``, which are views here.
        self.max_cache_len = max_cache_len
        self.codec = codec or PlainCodec()
        self.cumulative_length = torch.tensor(0, dtype=torch.int64)
        self.rows: Tensor | None = None  # [B, max_cache_len, C+R], or [B, max_cache_len, W] uint8
        self.latent_width = self.rope_width = 0
        self.is_initialized = False

    @property
    def keys(self) -> Tensor | None:
        """``[B, 1, max_cache_len, C]`` latents, None before the first token; see `values`."""
        return None if self.rows is None else self._views()[0]

    @property
    def values(self) -> Tensor | None:
        """``[B, 1, max_cache_len, R]`` shared keys, None before the first token.

        Coded rows are decoded anew, with 0 in the slots that are not filled.
        """
        return None if self.rows is None else self._views()[1]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the rows for the batch, widths, dtype and device of the first tokens."""
        self.batch_size, _, _, C = key_states.shape
        self.dtype = torch.promote_types(key_states.dtype, value_states.dtype)
        self.device, self.latent_width = key_states.device, C
        self.rope_width = value_states.shape[-1]
        width = self.codec.row_width(C, self.rope_width)
        shape, stored = (self.batch_size, self.max_cache_len, width), self.codec.storage_dtype
        self.rows = torch.zeros(shape, dtype=stored(self.dtype), device=self.device)
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not torch.compiler.is_compiling():  # keeps CUDA graphs from copying their inputs
            torch._dynamo.mark_static_address(self.rows)
            torch._dynamo.mark_static_address(self.cumulative_length)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Write ``[B, 1, L, C]`` and ``[B, 1, L, R]``; returns what `LatentCacheLayer` does.

        Views are of all slots.
        """
        _check_states(key_states, value_states, self)
        is_coded = self.codec.kind != "plain"
        if is_coded:
            refuse_gradient(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        L, rows = key_states.shape[2], self.rows
        assert rows is not None
        if is_coded:
            self.cumulative_length.add_(L)
            key_states, value_states = (x.to(self.dtype) for x in (key_states, value_states))
            lengths, capacity = self._lengths(), self.max_cache_len
            return append_coded(rows, lengths, capacity, key_states, value_states, self.codec)
        positions = torch.arange(L, device=self.device) + self.cumulative_length
        self.cumulative_length.add_(L)
        new_rows = torch.cat((key_states[:, 0], value_states[:, 0]), dim=-1)
        rows.index_copy_(1, positions, new_rows.to(rows.dtype))
        return self._views()

    def reset(self) -> None:
        """Forget everything; the buffer stays and is zeroed."""
        if self.rows is not None:
            self.rows.zero_()
        self.cumulative_length.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row ``beam_idx[b]`` was, in place."""
        if self.rows is not None:
            self.rows.copy_(self.rows[beam_idx.to(self.rows.device)])

    def offload(self) -> None:
        """Move the rows to the CPU."""
        if self.rows is not None:
            self.rows = self.rows.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        """Move the rows back to their device."""
        if self.rows is not None and self.rows.device != self.device:
            self.rows = self.rows.to(self.device, non_blocking=True)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer, unused rows included."""
        return 0 if self.rows is None else self.rows.nbytes

    def _views(self) -> tuple[Tensor, Tensor]:
        assert self.rows is not None
        if self.codec.kind != "plain":
            return _decoded(self, self._lengths(), self.max_cache_len)
        slots = self.rows[:, None]
        return slots[..., : self.latent_width], slots[..., self.latent_width :]

    def _lengths(self) -> Tensor:
        assert self.rows is not None
        return self.cumulative_length.to(torch.int32).repeat(self.rows.shape[0])


def _decoded(
    layer: LatentCacheLayer | StaticLatentLayer, lengths: Tensor, num_slots: int
) -> tuple[Tensor, Tensor]:
    """Coded rows of a layer as latents ``[B, 1, slots, C]`` and keys ``[B, 1, slots, R]``."""
    assert layer.rows is not None
    C, R = layer.latent_width, layer.rope_width
    view = CacheView.dense(layer.rows, lengths, C=C, R=R, codec=layer.codec)
    latent, k_rope = mla_gather(view, 0, num_slots, dtype=layer.dtype)
    return latent[:, None], k_rope[:, None]


def _check_states(
    key_states: Tensor, value_states: Tensor, layer: LatentCacheLayer | StaticLatentLayer
) -> None:
    B, L = key_states.shape[0], key_states.shape[2]
    C, R = key_states.shape[-1], value_states.shape[-1]
    fits = key_states.shape == (B, 1, L, C) and value_states.shape == (B, 1, L, R)
    rows = layer.rows
    if rows is not None:
        fits = fits and rows.shape[0] == B and (layer.latent_width, layer.rope_width) == (C, R)
    if not fits:
        held = "nothing yet" if rows is None else f"rows of shape {tuple(rows.shape)}"
        raise ShapeError(
            f"LatentCache.update: key_states has shape {tuple(key_states.shape)} and value_states "
            f"{tuple(value_states.shape)}, expected [B, 1, L, C] and [B, 1, L, R] beside {held}; "
            "it holds latents of MLA layers, not heads of keys"
        )
