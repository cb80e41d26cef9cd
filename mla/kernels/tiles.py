"""Tiles of cached rows: how a codec's bytes become numbers and back, and how keys are split.

A latent row is read in tiles of W columns, one dot product each; a tile of coded values is one
scale group. Codes are loaded four at a time, become numbers two at a time and are joined in the
order of the columns: without joins the compiler no longer loads ahead.

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
def load_scale(
    row_S,  # [S] pointers to the bytes of the rows
    is_stored_S,  # [S]
    g: tl.constexpr,  # which scale
    SCALES_AT: tl.constexpr,
    SCALE_BITS: tl.constexpr,
):
    """Scale ``g`` of each row, ``[S]`` float32; 0 where no key is stored."""
    if SCALE_BITS == 32:
        scale_S = (row_S + SCALES_AT).to(tl.pointer_type(tl.float32), bitcast=True) + g
        return tl.load(scale_S, mask=is_stored_S, other=0.0)
    else:
        # Two at a time: nothing below 4 bytes is loaded ahead of its use.
        word_S = (row_S + SCALES_AT).to(tl.pointer_type(tl.uint32), bitcast=True) + g // 2
        word = tl.load(word_S, mask=is_stored_S, other=0)
        half = (word >> (16 * (g % 2))).to(tl.uint16)
        return half.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def load_tile(
    row_S,  # [S] pointers to the rows: elements (plain) or bytes
    is_stored_S,  # [S]
    t: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    KIND: tl.constexpr,
    SCALES_AT: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    ONCE: tl.constexpr,  # so many tiles of coded rows are converted once, see DecodePlan
    dtype: tl.constexpr,
):
    """Values of tile ``t``, ``[S, W]`` of ``dtype``; 0 where no key is stored."""
    if KIND == PLAIN:
        column = t * W + tl.arange(0, W)
        mask = is_stored_S[:, None] & (column < C)[None, :]
        return tl.load(row_S[:, None] + column[None, :], mask=mask, other=0).to(dtype)
    else:
        # Word j holds 4 codes. It may end in padding: the sections of a row are multiples of 16.
        word_type: tl.constexpr = tl.uint16 if KIND == INT4 else tl.uint32
        word_S = row_S.to(tl.pointer_type(word_type), bitcast=True)
        j = t * (W // 4) + tl.arange(0, W // 4)
        mask = is_stored_S[:, None] & (j < (C + 3) // 4)[None, :]
        word = tl.load(word_S[:, None] + j[None, :], mask=mask, other=0).to(tl.uint32)
        scale_S = load_scale(row_S, is_stored_S, t, SCALES_AT, SCALE_BITS)
        if t < ONCE:
            # Changes no number. The compiler converts codes twice, into the registers of either
            # product, where nothing but loads lies behind the numbers; otherwise once, and keeps
            # them in shared memory (Triton 3.6.0 and 3.7.1).
            scale_S = tl.where(is_stored_S, scale_S, 0.0)
        scale_S1 = scale_S[:, None]
        if KIND == INT4:
            word |= word << 12  # the second code 16 bits from the first, the last from the third
            n0, n1 = code_pair(word, scale_S1, KIND, dtype)
            n2, n3 = code_pair(word >> 8, scale_S1, KIND, dtype)
        else:
            n0, n2 = code_pair(word << 8, scale_S1, KIND, dtype)
            n1, n3 = code_pair(word, scale_S1, KIND, dtype)
        return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [row_S.shape[0], W])


@triton.jit
def load_rope(
    row_S,
    is_stored_S,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    KIND: tl.constexpr,
    ROPE_AT: tl.constexpr,
    ROPE_BITS: tl.constexpr,
    SCALES_AT: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    scale_idx: tl.constexpr,  # of 8-bit values
    dtype: tl.constexpr,
):
    """Rotated keys, ``[S, BLOCK_R]`` of ``dtype``; 0 where no key is stored."""
    r = tl.arange(0, BLOCK_R)
    mask = is_stored_S[:, None] & (r < R)[None, :]
    rope_S = row_S + ROPE_AT
    if ROPE_BITS == 8:
        code = tl.load(rope_S[:, None] + r[None, :], mask=mask, other=0).to(tl.int8, bitcast=True)
        scale_S = load_scale(row_S, is_stored_S, scale_idx, SCALES_AT, SCALE_BITS)
        return (code.to(tl.float32) * scale_S[:, None]).to(dtype)
    else:
        if KIND != PLAIN:
            rope_S = rope_S.to(tl.pointer_type(tl.bfloat16), bitcast=True)
        return tl.load(rope_S[:, None] + r[None, :], mask=mask, other=0).to(dtype)


@triton.jit
def code_pair(word, scale, KIND: tl.constexpr, dtype: tl.constexpr):
    """One code of each half of ``word`` times ``scale``: the lowest 4 bits, or the highest 8.

    Exact in float32. Codes become the bits of float16 numbers two at a time, which all targets
    convert; sm80 cannot load e4m3 itself. 1024 + n for int4, whose products with a float16 scale
    have 22 bits; e4m3 values times 2**-8, those below the normal ones too.
    """
    if KIND == INT4:
        low, high = float16_pair((word & 0x000F000F) | 0x64006400)
        low = low * scale - 1032.0 * scale
        high = high * scale - 1032.0 * scale
    elif KIND == FP8:
        low, high = float16_pair((word & 0x80008000) | ((word >> 1) & 0x3F803F80))
        low *= 256.0 * scale
        high *= 256.0 * scale
    else:
        low = ((word << 16).to(tl.int32, bitcast=True) >> 24).to(tl.float32) * scale
        high = (word.to(tl.int32, bitcast=True) >> 24).to(tl.float32) * scale
    return low.to(dtype), high.to(dtype)


@triton.jit
def float16_pair(word):
    """The two float16 numbers whose bits ``word`` holds, as float32."""
    low = word.to(tl.uint16).to(tl.float16, bitcast=True)
    high = (word >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def nearest(x, ptr, ROUND_BF16: tl.constexpr):
    """float32 ``x`` on the grid of the dtype behind ``ptr``; the interpreter truncates bfloat16."""
    if ROUND_BF16 and ptr.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def hadamard(x, BLOCK_C: tl.constexpr, SIZE: tl.constexpr):
    """Blocks of ``SIZE`` numbers of ``x [BLOCK_C]`` times the orthonormal Hadamard matrix."""
    for i in tl.static_range(7):
        if (1 << i) < SIZE:
            pairs = tl.reshape(x, [BLOCK_C // (2 << i), 2, 1 << i])
            first, second = tl.split(tl.permute(pairs, (0, 2, 1)))
            pairs = tl.permute(tl.join(first + second, first - second), (0, 2, 1))
            x = tl.reshape(pairs, [BLOCK_C])
    return x


@triton.jit
def split_size(length, SPLIT_KEYS: tl.constexpr, MAX_SPLITS: tl.constexpr, BLOCK_S: tl.constexpr):
    """Keys in one split of a row: a function of its length alone, a multiple of ``BLOCK_S``."""
    size = tl.maximum(SPLIT_KEYS, (length + MAX_SPLITS - 1) // MAX_SPLITS)
    return (size + BLOCK_S - 1) // BLOCK_S * BLOCK_S


@triton.jit
def local_count(position, index, COUNT: tl.constexpr, Z: tl.constexpr):
    """How many positions below ``position`` shard ``index`` of ``COUNT`` holds."""
    position = tl.maximum(position, 0)
    if COUNT == 1:
        return position
    else:
        rest = position % (Z * COUNT) - index * Z
        return position // (Z * COUNT) * Z + tl.minimum(tl.maximum(rest, 0), Z)
