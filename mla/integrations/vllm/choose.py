"""Which MLA backend the CPU platform of vLLM takes: ours where CUSTOM is asked for, or its own.

That platform (`CpuPlatform.get_attn_backend_cls`) puts its own backend in the place of every other
name. `mla.integrations.vllm.register` therefore has vLLM look up ``CPU_MLA`` and ``AMX_MLA`` in
this module, and the engine's configuration decides here, once for each layer.
"""

from __future__ import annotations

from typing import Any

from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from mla.checks import UnsupportedError

logger = init_logger("vllm.plugins.mla")  # vLLM prints what is said below its own name


def __getattr__(name: str) -> Any:
    """The backend class for ``CPU_MLA`` or ``AMX_MLA``, as vLLM resolves a path."""
    if name not in ("CPU_MLA", "AMX_MLA"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    attention = get_current_vllm_config().attention_config
    asked = attention.backend_per_kind.get("mla_attention", attention.backend)
    if asked != AttentionBackendEnum.CUSTOM:
        return resolve_obj_by_qualname(AttentionBackendEnum[name].value)
    if name == "AMX_MLA":
        raise UnsupportedError(
            "mla.integrations.vllm: this CPU has AMX, for which vLLM lays weights out in its own "
            "way, expected a CPU without; leave out --attention-backend CUSTOM"
        )
    logger.info_once("CUSTOM instead: MLA layers decode with mla.ops.mla_decode.")
    return resolve_obj_by_qualname(AttentionBackendEnum.CUSTOM.get_path())
