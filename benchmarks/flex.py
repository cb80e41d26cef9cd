"""FlexAttention as a baseline: compiled for each shape, forward only on a CPU.

PyTorch compiles one kernel for each set of sizes, seconds each; that is done before anything is
timed. Where it refuses a case, the reason is said and the row is absent.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

MOST_SHAPES = 256  # of one process; beyond its default of 8, PyTorch would not compile another


@cache
def reason_absent() -> str | None:
    """Why FlexAttention cannot be compiled here; None: it can."""
    try:
        import torch.nn.attention.flex_attention
    except ImportError as error:
        return f"this PyTorch has no FlexAttention: {error}"
    if torch.cuda.is_available():
        return None
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # of PyTorch's compiler, of several types
        return f"needs a C++ compiler: {error}"
    return None


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = MOST_SHAPES
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@lru_cache(maxsize=4)
def causal_blocks(L: int, S: int, group: int, device: str) -> Any:
    """Which keys a query row sees: ``group`` rows each belong to one of L queries at the end of S.

    A row sees the keys up to the position ``S - L + row // group``.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return key <= S - L + row // group

    return create_block_mask(sees, None, None, L * group, S, device=device)


def attention(
    query: Tensor, keys: Tensor, values: Tensor, *, scale: float, group: int = 1
) -> Callable[[], Tensor]:
    """A call of compiled FlexAttention with bottom-right causal masks.

    Args:
        query: ``[B, heads, L*group, E]``, ``group`` rows for each of L positions.
        keys, values: ``[B, heads, S, *]``.
        scale: multiplies scores.
        group: query rows of one position; 1: heads have dims of their own.
    """
    num_rows, S = query.shape[2], keys.shape[2]
    L = num_rows // group
    blocks = causal_blocks(L, S, group, str(query.device)) if L > 1 else None
    return lambda: _compiled()(query, keys, values, scale=scale, block_mask=blocks)


def refusal(run: Callable[[], Any]) -> str | None:
    """Why a first call of ``run``, which compiles, does not work; None: it does."""
    try:
        run()
    except Exception as error:  # compilers and drivers raise what they like
        # What stopped the compiler stands behind its own explanation.
        return str(error).split("raised exception ")[-1].split("\n", 1)[0]
    return None
