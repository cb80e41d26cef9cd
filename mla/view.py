"""CacheView: what a cache shows to the ops, the narrow waist between the two.

Dims: B batch, P pages, Z positions in one page, M page-table width, W row width (C + R values,
or the bytes of a coded row), C latent width, R rotated width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mla.checks import FLOAT_DTYPES, ShapeError, bind_dims, require_device, require_int32
from mla.codec import Codec, PlainCodec, codec_from_spec


@dataclass(frozen=True, kw_only=True)
class CacheView:
    """A frozen record of the tensors of one layer's cache; the cache owns the storage.

    Table entries and rows outside ``[starts, lengths)`` may be anything, NaN included. When a
    cache grows it returns a new view and the old ones are stale.

    Attributes:
        rows: ``[P, Z, W]``, last dim contiguous. Plain codec: float64 to bfloat16, W = C + R,
            latent first. Other codecs: uint8, W = ``codec.row_width(C, R)``, 16-byte aligned.
        page_table: ``[B, M]`` int32, or None for the dense layout, where row b is page b.
        lengths: ``[B]`` int32 on the device, one past the last written position.
        starts: ``[B]`` int32, first visible position (left padding), or None for 0.
        C, R: latent width and rotated width.
        codec: how a row is stored.
        max_length: host bound of ``lengths``; it sizes loops and never changes a result.
        shard: (index, count); slot z of table column m holds position
            ``(m * count + index) * Z + z``. Sharded views are paged.
    """

    rows: Tensor
    page_table: Tensor | None
    lengths: Tensor
    starts: Tensor | None
    C: int
    R: int
    codec: Codec
    max_length: int
    shard: tuple[int, int] = (0, 1)

    @staticmethod
    def dense(
        rows: Tensor,
        lengths: Tensor,
        *,
        C: int,
        R: int,
        codec: Codec | None = None,
        starts: Tensor | None = None,
        max_length: int | None = None,
    ) -> CacheView:
        """View of ``rows [B, Z, W]``, one long page for each sequence.

        Raises:
            ShapeError: a size, dtype or device does not fit.
        """
        return CacheView(
            rows=rows,
            page_table=None,
            lengths=lengths,
            starts=starts,
            C=C,
            R=R,
            codec=codec or PlainCodec(),
            max_length=rows.shape[1] if max_length is None else max_length,
        ).validated()

    @staticmethod
    def paged(
        rows: Tensor,
        page_table: Tensor,
        lengths: Tensor,
        *,
        C: int,
        R: int,
        codec: Codec | None = None,
        starts: Tensor | None = None,
        max_length: int | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> CacheView:
        """View of the pool ``rows [P, Z, W]`` through ``page_table [B, M]``.

        Raises:
            ShapeError: a size, dtype or device does not fit.
        """
        capacity = page_table.shape[-1] * rows.shape[1] * shard[1]
        return CacheView(
            rows=rows,
            page_table=page_table,
            lengths=lengths,
            starts=starts,
            C=C,
            R=R,
            codec=codec or PlainCodec(),
            max_length=capacity if max_length is None else max_length,
            shard=shard,
        ).validated()

    @property
    def batch_size(self) -> int:
        return self.lengths.shape[0]

    @property
    def capacity(self) -> int:
        """Positions that one row can hold, all shards together."""
        columns = 1 if self.page_table is None else self.page_table.shape[1]
        return columns * self.rows.shape[1] * self.shard[1]

    def with_length(self, max_length: int) -> CacheView:
        """The same view with another host bound."""
        return replace(self, max_length=max_length)

    def bind_dims(self, op: str, sizes: dict[str, int]) -> None:
        """Compare B, C and R with the letters bound so far."""
        for letter, have in (("B", self.batch_size), ("C", self.C), ("R", self.R)):
            want = sizes.setdefault(letter, have)
            if want != have:
                raise ShapeError(f"{op}: view has {letter}={have}, expected {letter}={want}")

    def validated(self) -> CacheView:
        """Return self, or raise ShapeError for the first field that does not fit."""
        sizes: dict[str, int] = {}
        bind_dims("CacheView", "rows", self.rows, "P Z W", sizes)
        width = self.codec.row_width(self.C, self.R)
        if sizes["W"] != width:
            raise ShapeError(
                f"CacheView: rows has shape {tuple(self.rows.shape)}, expected a last dim of "
                f"{width} ({self.codec.kind} codec, C={self.C}, R={self.R})"
            )
        storage_dtype = self.codec.storage_dtype(self.rows.dtype)
        if self.rows.dtype != storage_dtype or (
            self.codec.kind == "plain" and self.rows.dtype not in FLOAT_DTYPES
        ):
            raise ShapeError(
                f"CacheView: rows has dtype {self.rows.dtype}, expected "
                f"{'float64 to bfloat16' if self.codec.kind == 'plain' else storage_dtype} "
                f"for the {self.codec.kind} codec"
            )
        if self.rows.stride(-1) != 1 and self.rows.numel() > 0:
            raise ShapeError(f"CacheView: rows has last stride {self.rows.stride(-1)}, expected 1")
        if self.codec.kind != "plain" and not self._is_aligned():
            raise ShapeError(
                f"CacheView: rows has strides {self.rows.stride()} from offset "
                f"{self.rows.storage_offset()}, expected rows at multiples of 16 bytes"
            )
        sizes = {"B": sizes["P"]} if self.page_table is None else {}
        tables = (("page_table", "B M"), ("lengths", "B"), ("starts", "B"))
        for name, dims in tables:
            tensor = getattr(self, name)
            if tensor is not None:
                bind_dims("CacheView", name, tensor, dims, sizes)
                require_int32("CacheView", name, tensor)
                require_device("CacheView", name, tensor, "rows", self.rows)
        self._validate_shard()
        return self

    def _is_aligned(self) -> bool:
        places = zip(self.rows.shape[:2], self.rows.stride()[:2], strict=True)
        strides = [stride for size, stride in places if size > 1]
        return all(place % 16 == 0 for place in [*strides, self.rows.storage_offset()])

    def _validate_shard(self) -> None:
        check_shard("CacheView", self.shard)
        if self.shard[1] > 1 and self.page_table is None:
            raise ShapeError(
                f"CacheView: shard has value {self.shard}, expected (0, 1) for the dense layout"
            )
        if not 0 <= self.max_length <= self.capacity:
            raise ShapeError(
                f"CacheView: max_length has value {self.max_length}, expected 0 to {self.capacity}"
            )


def check_shard(name: str, shard: tuple[int, int]) -> None:
    """Require an (index, count) that exists."""
    index, count = shard
    if not 0 <= index < count:
        raise ShapeError(
            f"{name}: shard has value {shard}, expected (index, count) with 0 <= index < count"
        )


_LEAVES = ("rows", "page_table", "lengths", "starts", "max_length")


def _flatten(view: CacheView) -> tuple[list[Any], tuple[Any, ...]]:
    return [getattr(view, name) for name in _LEAVES], (view.C, view.R, view.codec.spec, view.shard)


def _flatten_with_keys(view: CacheView) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
    leaves, context = _flatten(view)
    keys = [pytree.GetAttrKey(name) for name in _LEAVES]
    return list(zip(keys, leaves, strict=True)), context


def _unflatten(leaves: Any, context: tuple[Any, ...]) -> CacheView:
    C, R, spec, shard = context
    fields = dict(zip(_LEAVES, leaves, strict=True))
    return CacheView(**fields, C=C, R=R, codec=codec_from_spec(spec), shard=tuple(shard))


pytree.register_pytree_node(
    CacheView,
    _flatten,
    _unflatten,
    serialized_type_name="mla.view.CacheView",
    flatten_with_keys_fn=_flatten_with_keys,
    to_dumpable_context=lambda context: [*context[:3], list(context[3])],
    from_dumpable_context=lambda dumped: (*dumped[:3], tuple(dumped[3])),
)


def positions_of(view: CacheView, num_columns: int) -> Tensor:
    """Position held by each slot of the first ``num_columns`` table columns, ``[columns, Z]``."""
    index, count = view.shard
    Z = view.rows.shape[1]
    device = view.rows.device
    column = torch.arange(num_columns, device=device)[:, None] * count + index
    return column * Z + torch.arange(Z, device=device)
