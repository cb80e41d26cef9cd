"""An attention backend of vLLM whose decode step is `mla.ops.mla_decode`.

Everything around the step is vLLM's own CPU backend: prompts, and writing rows to the cache.

Dims: B requests that decode, T their new tokens, L most new tokens of one of them, H heads,
P pages, Z positions in one page, M table width, C latent width, R rotated width.
Source: github.com/vllm-project/vllm 0.32.0, vllm/v1/attention/backends/mla/cpu_mla.py and
vllm/model_executor/layers/attention/mla_attention.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonDecodeMetadata,
    MLACommonMetadata,
    MLACommonMetadataBuilder,
    QueryLenSupport,
)
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl

from mla.checks import UnsupportedError
from mla.integrations.faces import refuse
from mla.ops import mla_decode
from mla.view import CacheView

NAME = "mla.integrations.vllm"


class MLABackend(CPUMLABackend):
    """What vLLM may ask of this backend; only what `make test-vllm` tries is said to be there."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[MLAImpl]:
        return MLAImpl

    @staticmethod
    def get_builder_cls() -> type[MLAMetadataBuilder]:
        return MLAMetadataBuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """C + R. The op takes any; vLLM builds metadata for these only."""
        return [320, 512, 576]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        return True

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return False  # GPUs: asked by the CUDA and ROCm platforms only

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False


@dataclass
class DecodeMetadata(MLACommonDecodeMetadata):
    """One step of the requests that decode, besides ``block_table`` and ``seq_lens``.

    Attributes:
        most_queries: L.
        query_lengths: ``[B]`` int32, new tokens of each request, or None where all have L.
        places: ``[T]`` int64, where in ``[B, L]`` each token stands, or None as above.
    """

    most_queries: int = 1
    query_lengths: Tensor | None = None
    places: Tensor | None = None


class MLAMetadataBuilder(MLACommonMetadataBuilder[MLACommonMetadata]):
    """Adds to vLLM's metadata what `DecodeMetadata` has, once a step for all layers."""

    query_len_support: ClassVar[QueryLenSupport] = QueryLenSupport.VARLEN

    def _build_decode(self, *args: Any, **arguments: Any) -> DecodeMetadata:
        common = super()._build_decode(*args, **arguments)
        starts = arguments["query_start_loc_cpu"]
        return decode_metadata(common.block_table, common.seq_lens, starts)


def decode_metadata(block_table: Tensor, seq_lens: Tensor, starts: Tensor) -> DecodeMetadata:
    """The metadata of a step.

    Args:
        block_table: ``[B, M]`` int32 page numbers.
        seq_lens: ``[B]`` int32 cached positions of each request, new tokens included.
        starts: ``[B+1]`` int32 on the host; request b has the tokens from entry b to entry b + 1.
    """
    counts = starts.diff()
    L = int(counts.max())
    metadata = DecodeMetadata(block_table, seq_lens, None, L)
    if bool((counts != L).any()):
        row = torch.repeat_interleave(counts)  # of each token, [T]
        places = row * L + torch.arange(len(row)) - starts[row]
        metadata.places = places.to(seq_lens.device)
        metadata.query_lengths = counts.to(dtype=torch.int32, device=seq_lens.device)
    return metadata


class MLAImpl(CPUMLAImpl):
    """Attention of one layer. The decode step is ours, the rest is inherited.

    Raises:
        UnsupportedError: the engine is configured for something that is not tested.
    """

    can_return_lse_for_decode: bool = True
    lse_base_on_e: bool = True
    supports_pcp: bool = False
    supports_dcp: bool = False

    def __init__(self, *args: Any, **arguments: Any) -> None:
        super().__init__(*args, **arguments)
        config = get_current_vllm_config()
        parallel = config.parallel_config
        refuse(
            NAME,
            kv_transfer_config=config.kv_transfer_config,
            decode_context_parallel_size=parallel.decode_context_parallel_size > 1,
            prefill_context_parallel_size=parallel.prefill_context_parallel_size > 1,
        )
        if self.kv_cache_dtype not in MLABackend.supported_kv_cache_dtypes:
            raise UnsupportedError(
                f"{NAME}: kv_cache_dtype has value {self.kv_cache_dtype!r}, expected 'auto'"
            )

    def forward_mqa(
        self,
        q: Tensor | tuple[Tensor, Tensor],
        kv_c_and_k_pe_cache: Tensor,
        attn_metadata: MLACommonMetadata,
        layer: Any,
    ) -> tuple[Tensor, Tensor]:
        """Attend from the new tokens of the requests that decode to their cached rows.

        Args:
            q: ``[T, H, C]`` absorbed and ``[T, H, R]`` rotated queries, or both in one tensor.
            kv_c_and_k_pe_cache: ``[P, Z, C+R]``, read in place.
            attn_metadata: ``decode`` is `DecodeMetadata`; the new rows are written already.
            layer: not used.

        Returns:
            out ``[T, H, C]`` in the dtype of ``q``, 0 where a token sees no key; lse ``[T, H]``
            float32, natural logarithm, ``-inf`` there.
        """
        step = attn_metadata.decode
        C = self.kv_lora_rank
        R = kv_c_and_k_pe_cache.shape[-1] - C
        queries = q if isinstance(q, tuple) else q.split([C, R], dim=-1)
        B, L = step.seq_lens.shape[0], step.most_queries
        view = CacheView.paged(kv_c_and_k_pe_cache, step.block_table, step.seq_lens, C=C, R=R)
        if step.places is None:
            rows = [x.unflatten(0, (B, L)) for x in queries]
        else:
            rows = [x.new_zeros(B * L, *x.shape[1:]) for x in queries]
            for row, x in zip(rows, queries, strict=True):
                row[step.places] = x
            rows = [row.unflatten(0, (B, L)) for row in rows]
        out, lse = mla_decode(
            rows[0], rows[1], view, scale=self.scale, query_lengths=step.query_lengths
        )
        out, lse = out.flatten(0, 1), lse.flatten(0, 1)
        return (out, lse) if step.places is None else (out[step.places], lse[step.places])
