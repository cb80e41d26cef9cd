"""Tiles of prefill: which tokens belong together, and rows cut into parts of powers of two.

A row of any width is held as one or two tiles whose widths are powers of two, so that 192 columns
cost 128 + 64 and not 256. Unrotated and rotated parts of a key are tiles of their own: they are
read from where they lie and never joined in memory.

Dims: L queries, S keys, T tokens of one tile, N unrotated width, R rotated width, V value width.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Sizes that change from call to call: a kernel for 1, one for multiples of 16 and one for the rest
# of each would compile for seconds in the middle of a run, and none of them would be faster.
VARYING = ["L", "S", "H", "first_head", "num_heads", "num_tiles"]


@triton.constexpr_function
def parts(width: int) -> tuple[int, ...]:
    """Widths of the tiles that hold ``width`` columns: powers of two, at least 16, at most two."""
    if width == 0:
        return ()
    whole = max(16, 1 << (width - 1).bit_length())
    half = whole // 2
    if half < 16 or width <= half:
        return (whole,)
    rest = max(16, 1 << (width - half - 1).bit_length())
    return (half, rest) if rest < half else (whole,)


@triton.constexpr_function
def num_parts(width: int) -> int:
    return len(parts(width))


@triton.constexpr_function
def part_width(width: int, i: int) -> int:
    return parts(width)[i]


@triton.constexpr_function
def part_begin(width: int, i: int) -> int:
    return sum(parts(width)[:i])


@triton.jit
def zero_parts(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Accumulators for ``WIDTH`` columns."""
    tiles = ()
    for i in tl.static_range(num_parts(WIDTH)):
        tiles += (tl.zeros([ROWS, part_width(WIDTH, i)], dtype=tl.float32),)
    return tiles


@triton.jit
def load_parts(
    ptr,  # first element of the first row
    offset_T,  # [T] begin of each row
    is_row_T,  # [T]; looked at with MASKED
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
    dtype: tl.constexpr,
):
    """``WIDTH`` columns of each row as a tuple of tiles; 0 outside."""
    tiles = ()
    for i in tl.static_range(num_parts(WIDTH)):
        column = part_begin(WIDTH, i) + tl.arange(0, part_width(WIDTH, i))
        place = ptr + offset_T[:, None] + column[None, :]
        if part_begin(WIDTH, i) + part_width(WIDTH, i) > WIDTH:
            is_inside = (column < WIDTH)[None, :]
            if MASKED:
                is_inside = is_row_T[:, None] & is_inside
            tile = tl.load(place, mask=is_inside, other=0.0)
        elif MASKED:
            tile = tl.load(place, mask=is_row_T[:, None], other=0.0)
        else:  # a mask that is always true would cost registers
            tile = tl.load(place)
        tiles += (tile.to(dtype),)
    return tiles


@triton.jit
def store_parts(ptr, offset_T, is_row_T, tiles, WIDTH: tl.constexpr):
    """Write a tuple of tiles as ``WIDTH`` columns of each row."""
    for i in tl.static_range(num_parts(WIDTH)):
        column = part_begin(WIDTH, i) + tl.arange(0, part_width(WIDTH, i))
        inside = is_row_T[:, None] & (column < WIDTH)[None, :]
        place = ptr + offset_T[:, None] + column[None, :]
        tl.store(place, tiles[i].to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def dot_rows(a, b, PARTS: tl.constexpr):
    """Products of each row of ``a`` with each row of ``b``, both tuples of tiles."""
    products = tl.dot(a[0], b[0].T, input_precision="ieee")
    for i in tl.static_range(1, PARTS):
        products = tl.dot(a[i], b[i].T, products, input_precision="ieee")
    return products


@triton.jit
def add_product(acc, weights, rows, FIRST: tl.constexpr, PARTS: tl.constexpr):
    """``acc[i] + weights @ rows[FIRST + i]`` for each tile."""
    tiles = ()
    for i in tl.static_range(PARTS):
        tiles += (tl.dot(weights, rows[FIRST + i], acc[i], input_precision="ieee"),)
    return tiles


@triton.jit
def sequence_span(row, L, S, starts_ptr, lengths_ptr, cu_q_ptr, cu_k_ptr):
    """First query, number of queries, first key, number of visible keys of one sequence.

    Firsts are tokens of the flattened tensors, int64. Absent pointers are None.
    """
    row = row.to(tl.int64)
    if cu_q_ptr is not None:
        q_begin = tl.load(cu_q_ptr + row)
        q_count = tl.load(cu_q_ptr + row + 1) - q_begin
        k_begin = tl.load(cu_k_ptr + row)
        k_count = tl.load(cu_k_ptr + row + 1) - k_begin
        return q_begin.to(tl.int64), q_count, k_begin.to(tl.int64), k_count
    else:
        start = 0
        if starts_ptr is not None:
            start = tl.load(starts_ptr + row)
        end = S
        if lengths_ptr is not None:
            end = tl.minimum(tl.load(lengths_ptr + row), S)
        return row * L, L, row * S + start, tl.maximum(end - start, 0)


@triton.jit
def visible_limits(
    l_begin,  # first query of the tile
    q_count,
    k_count,
    CAUSAL: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Keys each query sees, ``[L]``; end of the tiles that all see whole; one past the last key.

    Bottom-right causal: the last query sees all ``k_count`` keys, the one before it all but one.
    """
    l = l_begin + tl.arange(0, BLOCK_L)  # noqa: E741
    if CAUSAL:
        past = k_count - q_count  # keys before the first query; negative: queries without keys
        limit_L = tl.minimum(tl.maximum(past + l + 1, 0), k_count)
        whole = tl.maximum(past + l_begin + 1, 0)
        end = tl.minimum(tl.maximum(past + l_begin + BLOCK_L, 0), k_count)
    else:
        limit_L = tl.zeros_like(l) + k_count
        whole = k_count
        end = k_count
    return limit_L, whole // BLOCK_S * BLOCK_S, end


@triton.jit
def scaled_parts(tiles, scale, N: tl.constexpr, R: tl.constexpr):
    """The tiles of N + R columns times ``scale``, as two tuples."""
    nope = ()
    for i in tl.static_range(num_parts(N)):
        nope += (tiles[i] * scale,)
    rope = ()
    for i in tl.static_range(num_parts(R)):
        rope += (tiles[num_parts(N) + i] * scale,)
    return nope, rope
