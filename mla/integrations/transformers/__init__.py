"""Drop-in attention for the MLA models of transformers (5.15 and newer).

Two lines change a loaded model:

    from mla.integrations.transformers import replace_attention

    report = replace_attention(model)     # in place; restore_attention(model) undoes it
    model.generate(...)                   # decodes from the compressed cache, absorbed
    model.generate_batch(...)             # continuous batching, from latents in pages

Files:

    replace.py   patches instances of attention layers, never classes, and reports what it did
    dispatch.py  the function that transformers calls instead, and the keywords it accepts
    masks.py     transformers' masks as runs of visible keys
    attend.py    absorbed or expanded attention over cached latents
    caches.py    growing latent buffers under transformers' cache contract
    coded.py     what those layers hand out when their rows are 8- or 4-bit
    model_caches.py  the caches of whole models
    paged.py     attention of continuous batching, over the pages of transformers' pool
    continuous.py  ``generate_batch`` and its manager
"""

from mla.integrations.transformers.caches import LatentCacheLayer, StaticLatentLayer
from mla.integrations.transformers.masks import key_run_mask
from mla.integrations.transformers.model_caches import LatentCache, StaticLatentCache
from mla.integrations.transformers.replace import (
    ReplacementReport,
    replace_attention,
    restore_attention,
)

__all__ = [
    "LatentCache",
    "LatentCacheLayer",
    "ReplacementReport",
    "StaticLatentCache",
    "StaticLatentLayer",
    "key_run_mask",
    "replace_attention",
    "restore_attention",
]
