"""FlashInfer's wrapper for paged MLA attention, plan and run, on the ops of this package.

    from mla.integrations.flashinfer import BatchMLAPagedAttentionWrapper

Covered: ``plan`` with indptr arrays, ``run`` over 16-bit caches (32 and 64 too) and over fp8 caches
of 656-byte rows (``512 e4m3 | 4 float32 scales | 64 bf16``, and the same layout for other C and R),
causal or not, any number of queries in each row, any page size, C, R and number of heads, on every
device the package runs on. ``backend`` may be "auto", "fa2" or "fa3" and changes nothing: the
implementation is that of `mla.ops.mla_decode`.

``ckv_cache`` and ``kpe_cache`` are read in place where they are slices of one buffer::

    ckv_cache, kpe_cache = rows[..., :C], rows[..., C:]        # rows [P, Z, C+R]

Of two separate buffers, every ``run`` copies the pages of the plan into one, and warns.

What differs: an fp8 cache is planned with ``kv_data_type=torch.uint8`` and passed whole as
``ckv_cache [P, Z, W]`` with ``kpe_cache=None``. Queries without keys have lse ``-inf``.

Raises `UnsupportedError`, by name: other backends, ``use_cuda_graph``, ``use_profiler``,
``profiler_buffer``, ``kv_len`` and ``page_table`` (cutlass), ``cum_seq_lens_q``, ``block_tables``,
``seq_lens``, ``use_sinks``, ``sinks``, ``kv_data_type=torch.float8_e4m3fn`` and its ``ckv_scale``,
``kpe_scale`` (one scale for a whole tensor), ``o_scale``, ``bmm1_scale``, ``bmm2_scale``,
``skip_softmax_threshold_scale_factor``. The functions beside the class are not here.

At this edge only, the log-sum-exp is in base 2 unless ``return_lse_base_on_e``, as in the original.

Dims: B batch, T query tokens of all rows, L most queries of a row, H heads, P pages, Z positions in
one page, M table width, C latent width, R rotated width, W bytes of an fp8 row.
Source: signatures of github.com/flashinfer-ai/flashinfer, flashinfer/mla.
"""

from __future__ import annotations

import math
import warnings
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mla.checks import (
    FLOAT_DTYPES,
    ShapeError,
    UnsupportedError,
    bind_dims,
    require_device,
)
from mla.codec import Codec, Fp8Codec, PlainCodec
from mla.integrations.faces import decode, refuse
from mla.view import CacheView

NAME = "BatchMLAPagedAttentionWrapper"
SEPARATE = (
    f"{NAME}.run: ckv_cache and kpe_cache are no slices of one buffer, so every run copies the "
    "pages of the plan; keep rows [P, Z, C+R] and pass its two parts"
)


class Plan(NamedTuple):
    """What `run` needs, on its device; the host has the sizes."""

    sizes: dict[str, int]  # T, H, C, R, Z
    most_queries: int  # L
    query_lengths: Tensor | None  # [B] int32; None where all rows have L, as the next
    places: Tensor | None  # [T] int64, place of each token in [B, L]
    kv_lengths: Tensor  # [B] int32
    max_length: int
    kv_indices: Tensor  # [N] int32
    columns: Tensor  # [B, M] int64, where in kv_indices the pages of each row stand
    causal: bool
    scale: float
    q_dtype: torch.dtype
    kv_dtype: torch.dtype

    def require(self, op: str, name: str, tensor: Tensor, dims: str, dtype: torch.dtype) -> None:
        """Require sizes, dtype and device as planned."""
        bind_dims(op, name, tensor, dims, dict(self.sizes))
        if tensor.dtype != dtype:
            raise ShapeError(f"{op}: {name} has dtype {tensor.dtype}, expected {dtype} as planned")
        require_device(op, name, tensor, "the workspace", self.kv_lengths)


class BatchMLAPagedAttentionWrapper:
    """Attention of absorbed queries to a paged cache of latents: plan once a step, run per layer.

    Args:
        float_workspace_buffer: its device is that of the plan; its memory is not used.
        use_cuda_graph: False.
        qo_indptr, kv_indptr, kv_indices, kv_len_arr: buffers for graphs; not used.
        backend: "auto", "fa2" or "fa3"; changes nothing.

    Raises:
        UnsupportedError: ``use_cuda_graph``, or another backend.
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        use_cuda_graph: bool = False,
        qo_indptr: Tensor | None = None,
        kv_indptr: Tensor | None = None,
        kv_indices: Tensor | None = None,
        kv_len_arr: Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        if use_cuda_graph:
            raise UnsupportedError(
                f"{NAME}: use_cuda_graph has value True, expected False; "
                "capture mla.ops.mla_decode on a view with tables of your own"
            )
        if backend not in ("auto", "fa2", "fa3"):
            raise UnsupportedError(
                f"{NAME}: backend has value {backend!r}, expected 'auto', 'fa2' or 'fa3'"
            )
        self.device = float_workspace_buffer.device
        self._plan: Plan | None = None

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        kv_len_arr: Tensor,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        use_profiler: bool = False,
        *,
        cum_seq_lens_q: Tensor | None = None,
        block_tables: Tensor | None = None,
        seq_lens: Tensor | None = None,
        use_sinks: bool = False,
    ) -> None:
        """Fix the rows of the following runs. Reads the index arrays on the host.

        Args:
            qo_indptr: ``[B+1]`` integers, row b has the query tokens from entry b to entry b + 1.
            kv_indptr: ``[B+1]`` integers, row b has the pages
                ``kv_indices[kv_indptr[b] : kv_indptr[b+1]]``.
            kv_indices: at least ``[kv_indptr[B]]`` page numbers.
            kv_len_arr: ``[B]`` integers, cached positions of each row, its new tokens included.
            num_heads, head_dim_ckv, head_dim_kpe, page_size: H, C, R, Z.
            causal: query l of n in row b sees keys up to position ``kv_len_arr[b] - n + l``;
                otherwise all queries of a row see all its keys.
            sm_scale: multiplies scores.
            q_data_type: of the queries and the output, float64 to bfloat16.
            kv_data_type: of the cache: ``q_data_type``, or ``torch.uint8`` for rows of
                `mla.Fp8Codec`.

        Raises:
            ShapeError: the arrays do not fit each other; the plan before stays.
            UnsupportedError: something that is not here; the plan before stays.
        """
        op = f"{NAME}.plan"
        refuse(
            op,
            use_profiler=use_profiler,
            cum_seq_lens_q=cum_seq_lens_q,
            block_tables=block_tables,
            seq_lens=seq_lens,
            use_sinks=use_sinks,
        )
        _check_dtypes(op, q_data_type, kv_data_type)
        widths = (num_heads, head_dim_ckv, head_dim_kpe, page_size)
        if min(num_heads, head_dim_ckv, head_dim_kpe + 1, page_size) < 1:
            raise ShapeError(
                f"{op}: num_heads, head_dim_ckv, head_dim_kpe, page_size have values {widths}, "
                "expected positive sizes"
            )
        lengths = _host_list(op, "kv_len_arr", kv_len_arr)
        query_ends = _host_list(op, "qo_indptr", qo_indptr, len(lengths) + 1)
        page_ends = _host_list(op, "kv_indptr", kv_indptr, len(lengths) + 1)
        counts = [end - begin for begin, end in pairwise(query_ends)]
        num_pages = [end - begin for begin, end in pairwise(page_ends)]
        bind_dims(op, "kv_indices", kv_indices, "N", {})
        if page_ends[-1] > kv_indices.shape[0]:
            raise ShapeError(
                f"{op}: kv_indices has shape {tuple(kv_indices.shape)}, expected at least "
                f"kv_indptr[-1]={page_ends[-1]} entries"
            )
        for b, (length, pages) in enumerate(zip(lengths, num_pages, strict=True)):
            if not 0 <= length <= pages * page_size:
                raise ShapeError(
                    f"{op}: kv_len_arr has value {length} in row {b}, expected 0 to "
                    f"{pages * page_size}, {pages} pages of {page_size}"
                )
        # Columns beyond the pages of a row show those of others; nothing reads them.
        columns = torch.tensor(page_ends[:-1], dtype=torch.int64)[:, None]
        columns = columns + torch.arange(max(num_pages, default=0))
        L = max(counts, default=0)
        is_ragged = any(count != L for count in counts)
        self._plan = Plan(
            sizes=dict(zip("HCRZ", widths, strict=True)) | {"T": query_ends[-1]},
            most_queries=L,
            query_lengths=_int32(counts).to(self.device) if is_ragged else None,
            places=_places(counts, L).to(self.device) if is_ragged else None,
            kv_lengths=_int32(lengths).to(self.device),
            max_length=max(lengths, default=0),
            kv_indices=kv_indices[: page_ends[-1]].to(device=self.device, dtype=torch.int32),
            columns=columns.clamp(max=max(page_ends[-1] - 1, 0)).to(self.device),
            causal=causal,
            scale=float(sm_scale),
            q_dtype=q_data_type,
            kv_dtype=kv_data_type,
        )

    def run(
        self,
        q_nope: Tensor,
        q_pe: Tensor,
        ckv_cache: Tensor,
        kpe_cache: Tensor | None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        profiler_buffer: Tensor | None = None,
        kv_len: Tensor | None = None,
        page_table: Tensor | None = None,
        return_lse_base_on_e: bool = False,
        o_scale: float | None = None,
        *,
        ckv_scale: float | None = None,
        kpe_scale: float | None = None,
        sinks: Tensor | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        bmm1_scale: float | Tensor | None = None,
        bmm2_scale: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend as planned.

        Args:
            q_nope, q_pe: ``[T, H, C]`` absorbed and ``[T, H, R]`` rotated queries.
            ckv_cache, kpe_cache: ``[P, Z, C]`` and ``[P, Z, R]``, slices of one buffer; for fp8
                ``[P, Z, W]`` rows in uint8, and None.
            out, lse: written and returned where given; ``[T, H, C]`` of the queries' dtype and
                ``[T, H]`` float32 (float64 for float64 queries).
            return_lse: return ``lse`` too.
            return_lse_base_on_e: natural logarithm instead of base 2.

        Returns:
            out ``[T, H, C]``, 0 where a query sees no key; with ``return_lse`` also lse
            ``[T, H]``, ``-inf`` there.

        Raises:
            ShapeError: nothing is planned, or an argument does not fit the plan.
            UnsupportedError: an argument has a value that is not here.
        """
        op = f"{NAME}.run"
        refuse(
            op,
            profiler_buffer=profiler_buffer,
            kv_len=kv_len,
            page_table=page_table,
            o_scale=o_scale,
            ckv_scale=ckv_scale,
            kpe_scale=kpe_scale,
            sinks=sinks,
            skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor,
            bmm1_scale=bmm1_scale,
            bmm2_scale=bmm2_scale,
        )
        plan = self._plan
        if plan is None:
            raise ShapeError(f"{op}: the wrapper has no plan, expected a call of plan before")
        lse_dtype = torch.promote_types(plan.q_dtype, torch.float32)
        for name, tensor, dims, dtype in (
            ("q_nope", q_nope, "T H C", plan.q_dtype),
            ("q_pe", q_pe, "T H R", plan.q_dtype),
            ("out", out, "T H C", plan.q_dtype),
            ("lse", lse, "T H", lse_dtype),
        ):
            if tensor is not None:
                plan.require(op, name, tensor, dims, dtype)
        result = _attend(plan, q_nope, q_pe, self._view(op, plan, ckv_cache, kpe_cache))
        if not return_lse_base_on_e:
            result = result[0], result[1] * math.log2(math.e)
        written = [
            value if target is None else target.copy_(value)
            for target, value in zip((out, lse), result, strict=True)
        ]
        return (written[0], written[1]) if return_lse else written[0]

    def _view(self, op: str, plan: Plan, ckv: Tensor, kpe: Tensor | None) -> CacheView:
        """The cache as the ops see it; a copy only of two separate buffers."""
        C, R = plan.sizes["C"], plan.sizes["R"]
        codec: Codec = PlainCodec()
        rows, pages, table = ckv, plan.kv_indices, None
        if plan.kv_dtype == torch.uint8:
            codec = Fp8Codec()
            plan.require(op, "ckv_cache", ckv, f"P Z {codec.row_width(C, R)}", torch.uint8)
            if kpe is not None:
                raise ShapeError(
                    f"{op}: kpe_cache has a value, expected None: ckv_cache has whole fp8 rows"
                )
        elif kpe is None:
            raise ShapeError(f"{op}: kpe_cache has value None, expected a tensor")
        else:
            plan.require(op, "ckv_cache", ckv, "P Z C", plan.kv_dtype)
            plan.require(op, "kpe_cache", kpe, f"{ckv.shape[0]} Z R", plan.kv_dtype)
            if _are_neighbours(ckv, kpe):
                rows = ckv.as_strided((*ckv.shape[:2], C + R), ckv.stride())
            else:
                warnings.warn(SEPARATE, stacklevel=3)
                _check_pages(op, pages, ckv.shape[0])
                rows = torch.cat([ckv[pages.long()], kpe[pages.long()]], dim=-1)
                table = plan.columns.to(torch.int32)
        return CacheView.paged(
            rows,
            pages[plan.columns] if table is None else table,
            plan.kv_lengths,
            C=C,
            R=R,
            codec=codec,
            max_length=plan.max_length,
        )


def _attend(plan: Plan, q_nope: Tensor, q_pe: Tensor, view: CacheView) -> tuple[Tensor, Tensor]:
    """out ``[T, H, C]`` and natural lse ``[T, H]``."""
    B, L, H = view.batch_size, plan.most_queries, plan.sizes["H"]
    queries = [q_nope, q_pe]
    if plan.places is not None:  # rows differ: room for L queries in each
        places = plan.places
        queries = [q.new_zeros(B * L, *q.shape[1:]).index_copy_(0, places, q) for q in queries]
    q_latent, q_rope = (q.reshape(B, L, H, q.shape[-1]) for q in queries)
    out, lse = decode(
        q_latent,
        q_rope,
        view,
        scale=plan.scale,
        causal=plan.causal,
        query_lengths=plan.query_lengths,
    )
    out, lse = out.reshape(B * L, H, view.C), lse.reshape(B * L, H)
    return (out, lse) if plan.places is None else (out[plan.places], lse[plan.places])


def _check_dtypes(op: str, q_dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    if q_dtype not in FLOAT_DTYPES:
        raise UnsupportedError(
            f"{op}: q_data_type has value {q_dtype}, expected float64 to bfloat16"
        )
    if kv_dtype not in (q_dtype, torch.uint8):
        raise UnsupportedError(
            f"{op}: kv_data_type has value {kv_dtype}, expected {q_dtype} as q_data_type, or "
            "torch.uint8 for fp8 rows with their own scales"
        )


def _host_list(op: str, name: str, tensor: Tensor, size: int | None = None) -> list[int]:
    """Integers of an index array; an indptr of ``size`` entries begins at 0 and never falls."""
    bind_dims(op, name, tensor, "B" if size is None else str(size), {})
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ShapeError(f"{op}: {name} has dtype {tensor.dtype}, expected torch.int32")
    values: list[int] = tensor.tolist()
    if size is not None and (values[0] != 0 or sorted(values) != values):
        raise ShapeError(
            f"{op}: {name} has values {values}, expected numbers from 0 on that never fall"
        )
    return values


def _int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _places(counts: list[int], L: int) -> Tensor:
    """``[T]`` place of each token in ``[B, L]``."""
    return torch.tensor(
        [b * L + i for b, count in enumerate(counts) for i in range(count)], dtype=torch.int64
    )


def _check_pages(op: str, pages: Tensor, num_pages: int) -> None:
    """On a CPU: page numbers exist. A negative one would wrap around."""
    if pages.is_cpu and pages.numel() > 0:
        low, high = int(pages.min()), int(pages.max())
        if low < 0 or high >= num_pages:
            raise ShapeError(
                f"{op}: kv_indices has pages {low} to {high}, expected 0 to {num_pages - 1}"
            )


def _are_neighbours(ckv: Tensor, kpe: Tensor) -> bool:
    """Whether both are slices of one ``[P, Z, C+R]`` buffer, the latent first."""
    return (
        ckv.device == kpe.device
        and ckv.untyped_storage().data_ptr() == kpe.untyped_storage().data_ptr()
        and kpe.storage_offset() == ckv.storage_offset() + ckv.shape[2]
        and ckv.stride() == kpe.stride()
        and ckv.stride(2) == 1
    )
