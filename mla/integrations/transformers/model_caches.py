"""Latent caches of a whole model, in place of transformers' `DynamicCache` and `StaticCache`."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache, StaticLayer

from mla.codec import Codec
from mla.integrations.transformers.caches import LatentCacheLayer, StaticLatentLayer


class LatentCache(DynamicCache):
    """A `DynamicCache` whose full-attention layers are `LatentCacheLayer`.

    ``model.generate`` makes one by itself after `replace_attention`; with plain rows a model that
    was not replaced can use one too. Linear and sliding layers of hybrid models keep the cache that
    transformers gives them.

    Args:
        config: of the model, or of one with a text model inside.
        codec: how latent rows are stored; None: plain values. Coded rows need a model of
            `replace_attention`, with whatever codec: rows are read as the cache says.
        offloading: as in `DynamicCache`.
    """

    def __init__(self, config: Any, *, codec: Codec | None = None, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        hold_latents_(self, codec)

    @property
    def nbytes(self) -> int:
        """Bytes of all latent buffers, unused rows included."""
        return _latent_bytes(self)


class StaticLatentCache(StaticCache):
    """A `StaticCache` whose full-attention layers are `StaticLatentLayer`.

    ``model.generate(..., cache_implementation="static")`` makes such layers by itself after
    `replace_attention`.

    Args:
        config: of the model, or of one with a text model inside.
        max_cache_len: capacity in tokens.
        codec: as in `LatentCache`.
        offloading: as in `StaticCache`.
    """

    def __init__(
        self, config: Any, max_cache_len: int, *, codec: Codec | None = None, **kwargs: Any
    ) -> None:
        super().__init__(config, max_cache_len, **kwargs)
        hold_latents_(self, codec)

    @property
    def nbytes(self) -> int:
        """Bytes of all latent buffers, unused rows included."""
        return _latent_bytes(self)


def hold_latents_(
    cache: Any, codec: Codec | None = None, coded_layers: Container[int] | None = None
) -> None:
    """Give an empty dynamic or static cache of transformers latent layers for full attention.

    Args:
        cache: changed in place.
        codec: how rows are stored; None: plain values.
        coded_layers: indices of the layers whose attention can read coded rows; None: all.
    """
    cache.layers = [
        _latent_layer(layer, codec if coded_layers is None or index in coded_layers else None)
        for index, layer in enumerate(cache.layers)
    ]


def _latent_layer(layer: Any, codec: Codec | None) -> Any:
    if type(layer) is DynamicLayer:
        return LatentCacheLayer(codec)
    return StaticLatentLayer(layer.max_cache_len, codec) if type(layer) is StaticLayer else layer


def _latent_bytes(cache: Any) -> int:
    kinds = (LatentCacheLayer, StaticLatentLayer)
    return sum(layer.nbytes for layer in cache.layers if isinstance(layer, kinds))
