"""Tiles of cached rows: where they lie, how a codec's values become numbers, how keys are split.

A latent row is read in tiles of W columns, one dot product each; a tile of coded values is one
scale group. They are used raw: the group's scale multiplies its part of the scores and, for the
value product, the probabilities. Scaling the tile instead spills registers on every target.

Dims: S keys of one tile, W columns of one tile, T tiles of a row, C latent width, Z positions in
one page. Source: layouts of mla.codec; oracle mla.reference.decode_row.
"""

import triton
import triton.language as tl

PLAIN = tl.constexpr(0)
FP8 = tl.constexpr(1)
INT8 = tl.constexpr(2)
INT4 = tl.constexpr(3)


@triton.jit
def load_tile(
    values_ptr,  # rows as elements (plain) or bytes
    offset_S,  # [S] int64, begin of each row in elements of values_ptr
    is_stored_S,  # [S]
    t: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    KIND: tl.constexpr,
    dtype: tl.constexpr,
):
    """Raw values of tile ``t``, ``[S, W]`` of ``dtype``; 0 where no key is stored."""
    if KIND == INT4:
        # Byte j of the row holds columns 2j and 2j + 1. A masked byte would mean -8 and -8, which
        # is harmless: scale and probability of the key are 0.
        j = t * (W // 2) + tl.arange(0, W // 2)
        mask = is_stored_S[:, None] & (2 * j < C)[None, :]
        byte = tl.load(values_ptr + offset_S[:, None] + j[None, :], mask=mask, other=0)
        low = (byte & 15).to(tl.int8) - 8
        high = (byte >> 4).to(tl.int8) - 8
        return tl.reshape(tl.join(low, high), [offset_S.shape[0], W]).to(dtype)
    else:
        column = t * W + tl.arange(0, W)
        mask = is_stored_S[:, None] & (column < C)[None, :]
        raw = tl.load(values_ptr + offset_S[:, None] + column[None, :], mask=mask, other=0)
        if KIND == PLAIN:
            return raw.to(dtype)
        elif KIND == INT8:
            return raw.to(tl.int8, bitcast=True).to(dtype)
        else:
            return e4m3_to_float(raw).to(dtype)


@triton.jit
def e4m3_to_float(byte):
    """e4m3 bytes as float32, exact for all finite codes; sm80 cannot load the type itself."""
    wide = byte.to(tl.int32)
    bits = ((wide & 0x80) << 24) | ((wide & 0x7F) << 20)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120


@triton.jit
def split_size(length, SPLIT_KEYS: tl.constexpr, MAX_SPLITS: tl.constexpr, BLOCK_S: tl.constexpr):
    """Keys in one split of a row: a function of its length alone, a multiple of ``BLOCK_S``."""
    size = tl.maximum(SPLIT_KEYS, (length + MAX_SPLITS - 1) // MAX_SPLITS)
    return (size + BLOCK_S - 1) // BLOCK_S * BLOCK_S


@triton.jit
def local_count(position, index, COUNT: tl.constexpr, Z):
    """How many positions below ``position`` shard ``index`` of ``COUNT`` holds."""
    position = tl.maximum(position, 0)
    if COUNT == 1:
        return position
    else:
        rest = position % (Z * COUNT) - index * Z
        return position // (Z * COUNT) * Z + tl.minimum(tl.maximum(rest, 0), Z)
