"""Public ops: one name for the mathematics, ``impl=`` for who computes it."""

from mla.ops.append import Rows, mla_append, mla_gather, mla_norm_rope_append
from mla.ops.decode import AttentionOutput, mla_decode
from mla.ops.merge import merge_partials
from mla.ops.prefill import mla_prefill
from mla.ops.select import supported_impls

__all__ = [
    "AttentionOutput",
    "Rows",
    "merge_partials",
    "mla_append",
    "mla_decode",
    "mla_gather",
    "mla_norm_rope_append",
    "mla_prefill",
    "supported_impls",
]
