"""mla: multi-head latent attention with a small KV cache and fast decoding.

    hidden_states [B, L, D]
      -> module.py   q_a_proj, q_a_layernorm, q_b_proj      queries  [B, L, H, N+R]
      -> module.py   kv_a_proj_with_mqa, kv_a_layernorm     latent   [B, L, C]   k_rope [B, L, R]
      -> rope.py     rotate the R parts
      -> cache/      append(latent, k_rope) -> CacheView    S cached rows of C + R numbers
      -> absorb.py   W_UK onto the queries                  q_latent [B, L, H, C]
      -> ops/        mla_decode  (or mla_prefill)           out      [B, L, H, C]
      -> absorb.py   W_UV onto the output                   values   [B, L, H, V]
      -> module.py   o_proj                                 [B, L, D]

Dims: B batch, L new tokens, S cached positions, D model width, H heads, C latent width,
N unrotated, R rotated and V value width of a head.
"""

from mla import ops
from mla.cache import CacheFull, DenseLatentCache, PagedLatentCache
from mla.checks import ShapeError, UnsupportedError
from mla.codec import Fp8Codec, Int4Codec, Int8Codec, PlainCodec
from mla.config import MLAConfig, RopeConfig
from mla.module import MultiheadLatentAttention
from mla.view import CacheView

__version__ = "0.1.0"

__all__ = [
    "CacheFull",
    "CacheView",
    "DenseLatentCache",
    "Fp8Codec",
    "Int4Codec",
    "Int8Codec",
    "MLAConfig",
    "MultiheadLatentAttention",
    "PagedLatentCache",
    "PlainCodec",
    "RopeConfig",
    "ShapeError",
    "UnsupportedError",
    "ops",
]
