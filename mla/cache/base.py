"""What every layout of the cache shares: lengths, reservations and the order of a step.

A step is ``reserve`` once on the host, then ``append`` once for each layer. ``reserve`` decides
whether there is room, allocates all or nothing and moves the lengths; ``append`` only writes.

Dims: B batch, L new tokens, C latent width, R rotated width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mla.checks import FLOAT_DTYPES, ShapeError, UnsupportedError
from mla.codec import Codec, PlainCodec
from mla.config import MLAConfig, Pairing
from mla.ops import mla_append, mla_norm_rope_append
from mla.ops.select import Impl
from mla.view import CacheView


class CacheFull(ValueError):
    """More positions were asked for than the cache can hold; nothing has changed.

    Attributes:
        needed, free: pages, where a pool ran out of them; None for other limits.
    """

    def __init__(self, message: str, *, needed: int | None = None, free: int | None = None) -> None:
        super().__init__(message)
        self.needed, self.free = needed, free


def send(values: Sequence[int], target: Tensor) -> None:
    """Write ``values`` to an int32 tensor, in place and without waiting for the device.

    CUDA stages what lies in pageable memory before the call returns, so it may be freed then.
    """
    target.copy_(torch.tensor(values, dtype=torch.int32), non_blocking=True)


def checked_dtype(name: str, dtype: torch.dtype | None) -> torch.dtype:
    """``dtype`` or PyTorch's default, or ShapeError where rows cannot have it."""
    dtype = dtype or torch.get_default_dtype()
    if dtype not in FLOAT_DTYPES:
        raise ShapeError(f"{name}: dtype has value {dtype}, expected float64 to bfloat16")
    return dtype


class LatentCache:
    """Lengths and reservations; a layout adds the storage.

    Attributes:
        lengths: ``[B]`` int32 on the device, one past the last position of each row, changed in
            place by `reserve`.
        starts: ``[B]`` int32, first visible position of each row, or None for 0.
    """

    def __init__(
        self,
        config: MLAConfig | Sequence[MLAConfig],
        *,
        batch_size: int,
        num_layers: int = 1,
        codec: Codec | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        configs = [config] * num_layers if isinstance(config, MLAConfig) else list(config)
        if batch_size < 1 or not configs:
            raise ShapeError(
                f"{type(self).__name__}: batch_size, layers have values {batch_size}, "
                f"{len(configs)}, expected at least 1 of each"
            )
        self.configs = tuple(configs)
        self.batch_size = batch_size
        self.codec = codec or PlainCodec()
        self.dtype = checked_dtype(type(self).__name__, dtype)
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.starts: Tensor | None = None
        self._new_lengths = torch.zeros_like(self.lengths)
        self._host_lengths = [0] * batch_size
        self._host_starts = [0] * batch_size
        self._is_padded = False  # rows may have fewer new tokens than a step is long
        self._may_pad = False
        self._most_new = 0
        self._is_cold = True  # the current step began with nothing stored
        self._pending = [False] * len(configs)  # layers that have not appended in this step

    @property
    def device(self) -> torch.device:
        return self.lengths.device

    @property
    def num_layers(self) -> int:
        return len(self.configs)

    @property
    def max_length(self) -> int:
        """Host bound of the lengths of all rows."""
        return max(self._host_lengths)

    @property
    def is_cold(self) -> bool:
        """Whether the current step began with an empty cache, so that its tokens see no others."""
        return self._is_cold

    def new_lengths(self, num_tokens: int) -> Tensor | None:
        """``[B]`` int32 new tokens of each row; None where each has all ``num_tokens`` of them."""
        is_full = not self._is_padded and self._most_new == num_tokens
        return None if is_full else self._new_lengths

    def reserve(
        self, new_lengths: int | Sequence[int], *, starts: Sequence[int] | None = None
    ) -> None:
        """Make room for the tokens of one step and count them, before the first layer runs.

        ``lengths`` changes in place, so that a captured CUDA graph sees it.

        Args:
            new_lengths: tokens that each row gets, at least 0; one number for all rows alike. With
                a sequence the step may be padded on the right beyond them.
            starts: first visible position of each row (left padding), only into an empty cache.

        Raises:
            CacheFull: a row would grow beyond the capacity; nothing has changed.
            ShapeError: the number of rows or a value does not fit; nothing has changed.
        """
        name = f"{type(self).__name__}.reserve"
        B = self.batch_size
        counts = self._counts(new_lengths)
        is_cold = self.max_length == 0
        if starts is not None:
            starts = list(starts)
            if not is_cold:
                raise ShapeError(f"{name}: starts has a value, expected None in a filled cache")
            if len(starts) != B or any(
                not 0 <= s <= n for s, n in zip(starts, counts, strict=False)
            ):
                raise ShapeError(
                    f"{name}: starts has value {starts}, expected {B} numbers, "
                    "each at most the new tokens of its row"
                )
        lengths = [old + new for old, new in zip(self._host_lengths, counts, strict=True)]
        self._make_room(lengths)
        self._host_lengths = lengths
        self._is_cold = is_cold
        self._is_padded = len(set(counts)) > 1
        self._may_pad = not isinstance(new_lengths, int)
        self._most_new = max(counts)
        send(lengths, self.lengths)
        send(counts, self._new_lengths)
        if is_cold:
            self._set_starts(starts if starts is not None and any(starts) else [0] * B)
        self._pending = [True] * len(self._pending)

    def _counts(self, new_lengths: int | Sequence[int]) -> list[int]:
        """New tokens of each row, or ShapeError."""
        B = self.batch_size
        counts = [new_lengths] * B if isinstance(new_lengths, int) else list(new_lengths)
        if len(counts) != B or min(counts) < 0:
            raise ShapeError(
                f"{type(self).__name__}.reserve: new_lengths has value {new_lengths}, "
                f"expected {B} numbers of at least 0"
            )
        return counts

    def ensure_reserved(
        self, layer_idx: int, new_lengths: int | Sequence[int], *, starts: Sequence[int] | None
    ) -> None:
        """Reserve for a caller who did not, when ``layer_idx`` begins a new step.

        Raises:
            UnsupportedError: inside a compiled region, where lengths are not to be touched.
        """
        if self._pending[layer_idx]:
            return
        if torch.compiler.is_compiling():
            raise UnsupportedError(
                f"{type(self).__name__}: the step has no reservation, expected "
                "cache.reserve(new_lengths) before the compiled call"
            )
        self.reserve(new_lengths, starts=starts)

    def append(self, layer_idx: int, latent: Tensor, k_rope: Tensor) -> CacheView:
        """Write the new rows of one layer into the reserved positions.

        Args:
            layer_idx: 0 to ``num_layers - 1``.
            latent: ``[B, L, C]`` normalised latents; rows with fewer than L new tokens take their
                first ones.
            k_rope: ``[B, L, R]`` rotated keys.

        Returns:
            The view of the layer, with the new rows.

        Raises:
            ShapeError: nothing is reserved for this layer, or a size does not fit.
        """
        view = self._begin_append("append", layer_idx, "latent", latent)
        mla_append(view, latent, k_rope, new_lengths=self.new_lengths(latent.shape[1]))
        self._pending[layer_idx] = False
        return view

    def append_projected(
        self,
        layer_idx: int,
        kv_a: Tensor,
        norm_weight: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        *,
        eps: float,
        latent_scale: float = 1.0,
        pairing: Pairing,
        impl: Impl = "auto",
    ) -> tuple[CacheView, Tensor, Tensor]:
        """`append` of what ``kv_a_proj_with_mqa`` gives, normalised and rotated in the same pass.

        Args:
            layer_idx: 0 to ``num_layers - 1``.
            kv_a: ``[B, L, C+R]``.
            norm_weight, cos, sin, eps, latent_scale, pairing, impl: see
                `mla.ops.mla_norm_rope_append`.

        Returns:
            The view of the layer, and the new rows ``[B, L, C]`` and ``[B, L, R]`` as they were
            before they were coded.

        Raises:
            ShapeError: as `append`.
        """
        view = self._begin_append("append_projected", layer_idx, "kv_a", kv_a)
        rows = mla_norm_rope_append(
            view,
            kv_a,
            norm_weight,
            cos,
            sin,
            eps=eps,
            latent_scale=latent_scale,
            pairing=pairing,
            new_lengths=self.new_lengths(kv_a.shape[1]),
            impl=impl,
        )
        self._pending[layer_idx] = False
        return view, rows.latent, rows.k_rope

    def _begin_append(self, method: str, layer_idx: int, argument: str, new: Tensor) -> CacheView:
        """The view to write to; refuses what is not reserved."""
        name = f"{type(self).__name__}.{method}"
        self._check_layer(name, layer_idx)
        if not self._pending[layer_idx]:
            raise ShapeError(
                f"{name}: layer_idx={layer_idx} has no reservation, expected reserve(new_lengths) "
                "once before the first layer of a step"
            )
        padding = (new.shape[1] if new.ndim == 3 else -1) - self._most_new
        if padding < 0 or (padding > 0 and not self._may_pad):
            raise ShapeError(
                f"{name}: {argument} has shape {tuple(new.shape)}, "
                f"expected [B={self.batch_size}, L={self._most_new}, width] as reserved"
            )
        return self.view(layer_idx)

    def view(self, layer_idx: int) -> CacheView:
        """What the ops read; stale once the cache has grown."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget all rows; the storage stays."""
        self._set_lengths([0] * self.batch_size)
        self._set_starts([0] * self.batch_size)

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget the last positions of rows, for rejected speculative tokens.

        Raises:
            ShapeError: a length is larger than that of its row, or negative; nothing has changed.
        """
        lengths = list(lengths)
        held = self._host_lengths
        if len(lengths) != len(held) or any(
            not start <= new <= old
            for start, new, old in zip(self._host_starts, lengths, held, strict=False)
        ):
            raise ShapeError(
                f"{type(self).__name__}.truncate: lengths has value {lengths}, "
                f"expected at most {held}, and at least the first visible positions"
            )
        self._set_lengths(lengths)

    def _check_layer(self, name: str, layer_idx: int) -> None:
        if not 0 <= layer_idx < self.num_layers:
            raise ShapeError(
                f"{name}: layer_idx has value {layer_idx}, expected 0 to {self.num_layers - 1}"
            )

    def _set_lengths(self, lengths: list[int]) -> None:
        self._host_lengths = lengths
        self._pending = [False] * len(self._pending)
        send(lengths, self.lengths)

    def _set_starts(self, starts: Sequence[int]) -> None:
        self._host_starts = list(starts)
        if not any(starts):
            self.starts = None
        elif self.starts is None:
            self.starts = torch.tensor(starts, dtype=torch.int32, device=self.device)
        else:
            send(starts, self.starts)

    def _make_room(self, lengths: list[int]) -> None:
        """Allocate for these lengths or raise CacheFull and change nothing."""
        raise NotImplementedError
