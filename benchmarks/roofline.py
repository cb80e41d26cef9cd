"""What an ideal kernel reads, writes and computes: bytes and flops of each op, and its bound.

    decode    bytes = B S row + queries + out        flops = 2 H (2 C + R) pairs
    partials  bytes = 2 * 4 X L H (C + 1) a row of the batch, where it has X > 1 splits
    merge     bytes = half of those and out          flops: none that count
    rotate    bytes = rows in and out                flops: none that count
    append    bytes = tokens ((C + R) size + row)    flops: none that count
    expand    bytes = latent, weight and kv          flops = 2 C H (N + V) tokens
    prefill   bytes = q + kv + rope + out            flops = 2 H (N + R + V) pairs + expansion
    backward  bytes = those and their gradients      flops = 2 H (3 (N + R) + 2 V) pairs + 3 times

pairs counts the (query, key) pairs that see each other. A tile of 16 rows that is half empty costs
as much as a full one; the flops here are those of real rows alone.

``python -m benchmarks.roofline`` prints the bound of each case for the data-sheet figures of one
device; a measurement is compared with ceilings measured in the same run instead.

Dims: B batch, L queries, S keys, H heads, C latent, N unrotated, R rotated, V value width, X key
splits.
"""

from __future__ import annotations

from typing import NamedTuple


class Cost(NamedTuple):
    """Of one call."""

    num_bytes: int
    num_flops: int
    partial_bytes: int = 0  # written and read again between two kernels of one call


class Machine(NamedTuple):
    """Ceilings of a device."""

    name: str
    bytes_per_second: float
    flops_per_second: float


H100 = Machine("H100 SXM, data sheet: 3.35 TB/s, 989 TFLOP/s in bfloat16", 3.35e12, 989e12)


def bound(cost: Cost, machine: Machine) -> tuple[float, str]:
    """Seconds that the call takes at least, and what bounds it."""
    by_memory = cost.num_bytes / machine.bytes_per_second
    by_arithmetic = cost.num_flops / machine.flops_per_second
    return max(by_memory, by_arithmetic), "memory" if by_memory > by_arithmetic else "arithmetic"


def causal_pairs(L: int, S: int) -> int:
    """Pairs of L queries at the end of S positions and the keys up to their own."""
    return L * S - L * (L - 1) // 2


def decode(
    B: int, S: int, L: int, H: int, C: int, R: int, *, row_bytes: int, size: int, num_splits: int
) -> Cost:
    """Absorbed decode of ``size``-byte queries on rows of ``row_bytes``."""
    rows = B * L * H
    num_bytes = B * S * row_bytes + rows * (2 * C + R) * size + 4 * rows
    num_flops = 2 * B * H * (2 * C + R) * causal_pairs(L, S)
    partial_bytes = 8 * rows * (C + 1) * num_splits if num_splits > 1 else 0
    return Cost(num_bytes, num_flops, partial_bytes)


def merge(B: int, L: int, H: int, C: int, *, size: int, num_splits: int) -> Cost:
    """Partial results read, the result written, each with its log-sum-exp."""
    rows = B * L * H
    return Cost(rows * (4 * num_splits * (C + 1) + size * C + 4), 0)


def rotate(num_rows: int, C: int, *, size_in: int, size_out: int) -> Cost:
    """Queries or outputs of int4 rows through the Hadamard matrix: 7 additions a number."""
    return Cost(num_rows * C * (size_in + size_out), 0)


def expand(T: int, H: int, C: int, N: int, V: int, *, size: int) -> Cost:
    """Keys and values of H heads from T latents."""
    columns = H * (N + V)
    return Cost(size * (T * C + columns * C + T * columns), 2 * T * C * columns)


def append(num_tokens: int, C: int, R: int, *, row_bytes: int, size: int, fused: bool) -> Cost:
    """New rows read and stored; the fused form also reads cos and sin and returns fresh rows."""
    num_bytes = num_tokens * ((C + R) * size + row_bytes)
    if fused:
        num_bytes += num_tokens * (C + 2 * R) * size
    return Cost(num_bytes, 0)


def prefill(L: int, H: int, C: int, N: int, R: int, V: int, *, size: int) -> Cost:
    """Causal forward over L tokens of one sequence, expansion of keys and values included."""
    first = expand(L, H, C, N, V, size=size)
    attention = size * (L * H * (N + R + V) + L * R + L * H * (N + V))
    num_flops = 2 * H * (N + R + V) * causal_pairs(L, L)
    return Cost(first.num_bytes + attention, first.num_flops + num_flops)


def prefill_backward(L: int, H: int, C: int, N: int, R: int, V: int, *, size: int) -> Cost:
    """Gradients from the saved latent: keys and values are expanded again."""
    forward = prefill(L, H, C, N, R, V, size=size)
    num_flops = 2 * H * (3 * (N + R) + 2 * V) * causal_pairs(L, L) + 6 * C * L * H * (N + V)
    return Cost(3 * forward.num_bytes, num_flops)


def cases() -> list[tuple[str, Cost]]:
    """The cases that have a goal."""
    sizes = {"C": 512, "R": 64}
    found = []
    for H in (16, 128):
        for B, S in ((1, 65536), (64, 4096), (128, 32768)):
            cost = decode(B, S, 1, H, **sizes, row_bytes=1152, size=2, num_splits=1)
            found.append((f"decode H={H} B={B} S={S}", cost))
    for H in (16, 128):
        cost = decode(64, 4096, 1, H, **sizes, row_bytes=656, size=2, num_splits=1)
        found.append((f"decode fp8 H={H} B=64 S=4096", cost))
    merged = merge(64, 1, 16, 512, size=2, num_splits=8)
    found.append(("merge H=16 B=64 S=4096", merged))
    rotated = rotate(64 * 128, 512, size_in=4, size_out=2)
    found.append(("rotate int4 out H=128 B=64", rotated))
    widths = {"C": 512, "N": 128, "R": 64, "V": 128}
    for L in (8192, 16384):
        found.append((f"expand H=16 L={L}", expand(L, 16, 512, 128, 128, size=2)))
        found.append((f"prefill H=16 L={L}", prefill(L, 16, **widths, size=2)))
        found.append((f"backward H=16 L={L}", prefill_backward(L, 16, **widths, size=2)))
    found.append(("append 4096", append(4096, **sizes, row_bytes=1152, size=2, fused=False)))
    found.append(("append 4096 fused", append(4096, **sizes, row_bytes=1152, size=2, fused=True)))
    return found


def main(machine: Machine = H100) -> None:
    """Print the bound of each case."""
    print(machine.name)
    print(f"{'case':28} {'MB':>8} {'GFLOP':>9} {'flop/byte':>9} {'us':>9}  bound by")
    for name, cost in cases():
        seconds, limit = bound(cost, machine)
        print(
            f"{name:28} {cost.num_bytes / 1e6:8.1f} {cost.num_flops / 1e9:9.1f} "
            f"{cost.num_flops / cost.num_bytes:9.1f} {1e6 * seconds:9.1f}  {limit}"
        )


if __name__ == "__main__":
    main()
