"""What coded cache rows cost in quality: run a converted model as if every row had been stored.

Attention of a single pass sees its own tokens unquantised, so a perplexity over windows would say
nothing about the codec. Here each row passes through `encode` and `decode` before anything attends
to it, which is what a decoding step finds in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mla.checks import UnsupportedError
from mla.codec import Codec, rotate_latent
from mla.integrations.converted.layer import ConvertedAttention


def through_codec(codec: Codec, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
    """``latent [.., C]`` and ``k_rope [.., R]`` as they come back from coded rows, same dtype."""
    C, R = latent.shape[-1], k_rope.shape[-1]
    rows = codec.decode(codec.encode(latent, k_rope), C, R, latent.dtype)
    decoded, rope = rows.split([C, R], dim=-1)
    return rotate_latent(decoded) if codec.rotation else decoded, rope


@contextmanager
def coded_rows(model: nn.Module, codec: Codec) -> Iterator[None]:
    """Within the block every layer of ``model`` attends to rows as ``codec`` stores them.

    Nothing of the model is changed afterwards. For `mla.convert.token_losses`, without a cache.

    Args:
        model: of `convert_model` or `load_converted`.
        codec: of the cache that is to be judged.

    Raises:
        UnsupportedError: ``model`` has no converted layer.
    """
    layers = [module.mla for module in model.modules() if isinstance(module, ConvertedAttention)]
    if not layers:
        raise UnsupportedError(
            f"coded_rows: model has type {type(model).__name__} without converted attention, "
            "expected a model of convert_model or load_converted"
        )
    for layer in layers:
        vars(layer)["project"] = _CodedProjection(layer.project, codec)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("project", None)


class _CodedProjection:
    """``project`` of one layer, with rows as they come back from the cache."""

    def __init__(self, project: Any, codec: Codec) -> None:
        self.project, self.codec = project, codec

    def __call__(self, hidden_states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, latent, k_rope = self.project(hidden_states, positions)
        return query, *through_codec(self.codec, latent, k_rope)
