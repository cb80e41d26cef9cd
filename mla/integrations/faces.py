"""What the faces of other libraries share: masks they have, arguments they take and we do not.

Dims: B batch, L queries, H heads, C latent width, R rotated width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mla.checks import UnsupportedError
from mla.ops import mla_decode
from mla.ops.decode import AttentionOutput
from mla.view import CacheView


def refuse(op: str, **arguments: Any) -> None:
    """Require that each of these arguments is None or False.

    Raises:
        UnsupportedError: naming the first that has a value.
    """
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise UnsupportedError(
                f"{op}: {name} has a value, expected none; it is not available here"
            )


def decode(
    q_latent: Tensor,
    q_rope: Tensor,
    view: CacheView,
    *,
    scale: float,
    causal: bool,
    query_lengths: Tensor | None = None,
) -> AttentionOutput:
    """`mla.ops.mla_decode`, also where every query of a row sees all its keys.

    Without ``causal`` the queries of a row become heads of one query, so that a row is still read
    once. Queries that do not exist then hold arbitrary numbers.

    Args:
        q_latent, q_rope: ``[B, L, H, C]`` and ``[B, L, H, R]``.
        query_lengths: ``[B]`` int32, how many of the L queries exist in each row; None: all.

    Returns:
        out ``[B, L, H, C]`` and lse ``[B, L, H]``, see `mla.ops.mla_decode`.
    """
    B, L, H, C = q_latent.shape
    if causal or L <= 1:
        return mla_decode(q_latent, q_rope, view, scale=scale, query_lengths=query_lengths)
    folded = [q.reshape(B, 1, L * H, q.shape[-1]) for q in (q_latent, q_rope)]
    out, lse = mla_decode(folded[0], folded[1], view, scale=scale)
    return AttentionOutput(out.view(B, L, H, C), lse.view(B, L, H))
