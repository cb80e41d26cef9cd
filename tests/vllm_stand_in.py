"""The few names of vLLM that our backend uses, with its signatures, for where it is not installed.

`make test-vllm` runs the same checks on the real ones, which is what keeps this file honest.
Source: github.com/vllm-project/vllm 0.32.0, the modules named below.
"""

from __future__ import annotations

import enum
import importlib
import logging
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

OURS = "mla.integrations.vllm"


class AttentionBackendEnum(enum.Enum):
    """vllm.v1.attention.backends.registry: names, and the paths that plugins put in their place."""

    CPU_MLA = "vllm.v1.attention.backends.mla.cpu_mla.CPUMLABackend"
    AMX_MLA = "vllm.v1.attention.backends.mla.amx_mla.AMXMLABackend"
    TRITON_MLA = "vllm.v1.attention.backends.mla.triton_mla.TritonMLABackend"
    CUSTOM = None

    def get_path(self) -> str:
        return OVERRIDES.get(self, self.value)

    def is_overridden(self) -> bool:
        return self in OVERRIDES


OVERRIDES: dict[AttentionBackendEnum, str] = {}


def register_backend(backend: AttentionBackendEnum, class_path: str) -> None:
    OVERRIDES[backend] = class_path


def resolve(path: str) -> Any:
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


class MultipleOf:
    def __init__(self, base: int) -> None:
        self.base = base


@dataclass
class MLACommonDecodeMetadata:
    block_table: Tensor
    seq_lens: Tensor
    dcp_tot_seq_lens: Tensor | None


class MLACommonMetadataBuilder:
    def __class_getitem__(cls, item: Any) -> type:
        return cls

    def _build_decode(
        self,
        block_table_tensor: Tensor,
        seq_lens_device: Tensor,
        max_seq_len: int,
        query_start_loc_cpu: Tensor,
        query_start_loc_device: Tensor,
        num_decode_tokens: int,
        max_query_len: int,
        dcp_tot_seq_lens_device: Tensor | None,
    ) -> MLACommonDecodeMetadata:
        return MLACommonDecodeMetadata(block_table_tensor, seq_lens_device, dcp_tot_seq_lens_device)


class CPUMLABackend:
    """What it does not override comes from vLLM's base class, which says yes to some of it."""


class AMXMLABackend:
    pass


class CPUMLAImpl:
    def __init__(self, scale: float, kv_cache_dtype: str = "auto", **mla_args: Any) -> None:
        self.scale, self.kv_cache_dtype = scale, kv_cache_dtype
        self.kv_lora_rank = mla_args["kv_lora_rank"]


class Logger(logging.Logger):
    def info_once(self, message: str) -> None:
        self.info(message)


def forget() -> None:
    """Have the next import of our modules load them anew."""
    for name in [name for name in sys.modules if name.startswith(OURS)]:
        del sys.modules[name]


def install(monkeypatch: pytest.MonkeyPatch, *, is_cpu: bool = True) -> SimpleNamespace:
    """Put the stand-in where imports find it, and return the configuration that it answers with."""
    assert "vllm" not in sys.modules, "the real one is loaded"
    forget()
    OVERRIDES.clear()
    config = SimpleNamespace(
        attention_config=SimpleNamespace(backend=None, backend_per_kind={}),
        kv_transfer_config=None,
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1
        ),
    )
    attention = "vllm.model_executor.layers.attention.mla_attention"
    modules: dict[str, dict[str, Any]] = {
        "vllm.config": {"get_current_vllm_config": lambda: config},
        "vllm.logger": {"init_logger": Logger},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: is_cpu)},
        "vllm.utils.import_utils": {"resolve_obj_by_qualname": resolve},
        "vllm.v1.attention.backend": {"MultipleOf": MultipleOf},
        "vllm.v1.attention.backends.registry": {
            "AttentionBackendEnum": AttentionBackendEnum,
            "register_backend": register_backend,
        },
        "vllm.v1.attention.backends.mla.cpu_mla": {
            "CPUMLABackend": CPUMLABackend,
            "CPUMLAImpl": CPUMLAImpl,
        },
        "vllm.v1.attention.backends.mla.amx_mla": {"AMXMLABackend": AMXMLABackend},
        attention: {
            "MLACommonDecodeMetadata": MLACommonDecodeMetadata,
            "MLACommonMetadata": object,
            "MLACommonMetadataBuilder": MLACommonMetadataBuilder,
            "QueryLenSupport": enum.Enum("QueryLenSupport", ["SINGLE_ONLY", "VARLEN"]),
        },
    }
    for path, names in modules.items():
        parts = path.split(".")
        for count in range(1, len(parts) + 1):
            name = ".".join(parts[:count])
            if name not in sys.modules:
                module = ModuleType(name)
                module.__spec__ = ModuleSpec(name, None)
                module.__path__ = []  # type: ignore[attr-defined]
                monkeypatch.setitem(sys.modules, name, module)
        sys.modules[path].__dict__.update(names)
    return config
