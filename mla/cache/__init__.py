"""Caches of latents: layouts that hold rows and show them to the ops as a `CacheView`."""

from mla.cache.base import CacheFull, LatentCache
from mla.cache.batch import PagedBatch
from mla.cache.dense import DenseLatentCache
from mla.cache.files import load_cache, save_cache
from mla.cache.paged import PagedLatentCache

__all__ = [
    "CacheFull",
    "DenseLatentCache",
    "LatentCache",
    "PagedBatch",
    "PagedLatentCache",
    "load_cache",
    "save_cache",
]
