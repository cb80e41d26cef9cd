"""The comparisons of `check` for the whole layer: all its forms give the same result.

    expanded = absorbed = chunked = cached = padded = packed = the oracle

Dims: B batch, L tokens of a sequence, D model width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mla.cache import DenseLatentCache
from mla.cli.check_compare import Question
from mla.cli.check_oracle import Oracle
from mla.cli.check_setup import Setup
from mla.ops.select import Impl
from mla.plan import should_absorb

B, L = 2, 20
CALLS: dict[str, tuple[int, ...]] = {
    "prompt in one call": (L,),
    "prompt, then tokens": (L - 4, 1, 1, 1, 1),
    "token by token": (1,) * L,
    "chunks of 7": (7, 7, 6),
    "a token, then the rest": (1, L - 1),
}


def layer_stage(setup: Setup, impl: Impl) -> Iterator[Question]:
    """Every way to call the layer, on the same input."""
    layer = setup.layer(impl)
    hidden = setup.draw(B, L, setup.config.hidden_size, salt=9)
    # cos and sin are rounded to the dtype, which moves scores of the rotated part.
    slack = 16 * torch.finfo(setup.dtype).eps

    def at_once() -> list[Tensor]:
        with torch.no_grad():
            return [layer(hidden)]

    def expected(oracle: Oracle, chunks: Sequence[int] = (L,)) -> list[Tensor]:
        return [oracle.layer(hidden, chunks=chunks, absorbs=_absorbs(setup, chunks))]

    yield Question("layer", "no cache (expanded)", at_once, expected, slack)
    for case, chunks in CALLS.items():

        def in_calls(chunks: Sequence[int] = chunks) -> list[Tensor]:
            cache = DenseLatentCache(
                setup.config, batch_size=B, device=setup.device, dtype=setup.dtype
            )
            with torch.no_grad():
                return [
                    torch.cat([layer(x, cache=cache) for x in hidden.split(list(chunks), 1)], 1)
                ]

        def expected_calls(oracle: Oracle, chunks: Sequence[int] = chunks) -> list[Tensor]:
            return expected(oracle, chunks)

        forms = " and ".join(_forms(setup, chunks))
        yield Question("layer", f"{case} ({forms})", in_calls, expected_calls, slack)
    yield _padded_question(setup, impl, slack)
    yield _packed_question(setup, impl, slack)


def _forms(setup: Setup, chunks: Sequence[int]) -> list[str]:
    """The forms that these calls run in."""
    ends = itertools.accumulate(chunks)
    absorbs = {
        should_absorb(size, end, setup.config) for size, end in zip(chunks, ends, strict=True)
    }
    return ["absorbed" if form else "expanded" for form in sorted(absorbs)]


def _absorbs(setup: Setup, chunks: Sequence[int]) -> bool:
    """Whether the last of these calls runs absorbed."""
    return should_absorb(chunks[-1], sum(chunks), setup.config)


def _padded_question(setup: Setup, impl: Impl, slack: float) -> Question:
    """Left padding, prompt and tokens, only the real tokens compared."""
    layer, starts, chunks = setup.layer(impl), (0, 9), (L - 3, 1, 1, 1)
    hidden = setup.draw(B, L, setup.config.hidden_size, salt=10)
    real = torch.arange(L) >= torch.tensor(starts)[:, None]

    def actual() -> list[Tensor]:
        cache = DenseLatentCache(setup.config, batch_size=B, device=setup.device, dtype=setup.dtype)
        parts, end = [], 0
        with torch.no_grad():
            for part in hidden.split(chunks, 1):
                end += part.shape[1]
                mask = real[:, :end].to(setup.device)
                parts.append(layer(part, cache=cache, attn_mask=mask))
        return [torch.cat(parts, 1).cpu()[real]]

    def expected(oracle: Oracle) -> list[Tensor]:
        begin = setup.integers(starts)
        whole = oracle.layer(hidden, chunks=chunks, starts=begin, absorbs=True)
        return [whole.cpu()[real]]

    return Question("layer", "left padding", actual, expected, slack)


def _packed_question(setup: Setup, impl: Impl, slack: float) -> Question:
    """Two sequences in one row."""
    layer, sizes = setup.layer(impl), (11, L - 11)
    hidden = setup.draw(1, L, setup.config.hidden_size, salt=11)
    ends = setup.integers((0, sizes[0], L))

    def actual() -> list[Tensor]:
        with torch.no_grad():
            return [layer(hidden, cu_seqlens=ends)]

    def expected(oracle: Oracle) -> list[Tensor]:
        parts = hidden.split(sizes, 1)
        return [torch.cat([oracle.layer(x, chunks=(x.shape[1],)) for x in parts], 1)]

    return Question("layer", "packed sequences", actual, expected, slack)
