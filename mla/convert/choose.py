"""Which components keep their rotation, and how a budget is split between rope and latent.

A component that loses its rotation is multiplied by mu, the mean of its rotation over the distances
attended to. What cannot be kept is the spread around that mean:

    loss_j = energy_j * (1 - |mu_l|^2)

Slow pairs hardly turn, so they lose little. The R/2 components with the largest loss stay rotated.

Dims: R rotated width, C latent width, J components of a layer.
Source: the loss extends the pair choice of MHA2MLA, arXiv:2502.14837.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from mla.checks import ShapeError
from mla.convert.rotate import KeyComponents

Fit = TypeVar("Fit")


class Choice(NamedTuple):
    """Indices of components, ascending, and the loss of those that are unrotated."""

    kept: Tensor
    dropped: Tensor
    lost_energy: float


def rotation_losses(components: KeyComponents, rotation: Tensor) -> Tensor:
    """``[J]``: what each component loses without its rotation.

    Args:
        components: of the layer's keys.
        rotation: mu, complex ``[d/2]``.
    """
    spread = (1.0 - rotation.abs().square()).clamp_min(0.0)  # rounding may take it below 0
    loss = components.energy * spread[components.frequency]
    return loss


def choose_rotated(
    components: KeyComponents,
    rotation: Tensor,
    rope_dim: int,
    frequencies: Sequence[int] | None = None,
) -> Choice:
    """Keep the rotation of the ``rope_dim / 2`` components that lose most without it.

    Args:
        components: of the layer's keys.
        rotation: mu, complex ``[d/2]``.
        rope_dim: R.
        frequencies: the pairs l to keep, R/2 of them with repeats; the choice is then which
            components of each.
    """
    loss = rotation_losses(components, rotation)
    order = loss.argsort(descending=True, stable=True)
    if frequencies is not None:
        order = _listed_first(order, components.frequency, frequencies)
    kept, dropped = order[: rope_dim // 2], order[rope_dim // 2 :]
    return Choice(kept.sort().values, dropped.sort().values, float(loss[dropped].sum()))


def _listed_first(order: Tensor, frequency: Tensor, listed: Sequence[int]) -> Tensor:
    """``order`` with as many components of each frequency in front as are ``listed``."""
    wanted = torch.bincount(torch.tensor(listed, dtype=torch.int64), minlength=len(order))
    is_kept = torch.zeros_like(order, dtype=torch.bool)
    for index, component in enumerate(order.tolist()):
        is_kept[index] = wanted[frequency[component]] > 0
        wanted[frequency[component]] -= 1
    return torch.cat([order[is_kept], order[~is_kept]])


def split_candidates(
    kv_budget: float | tuple[int, int], num_kv_heads: int, head_dim: int
) -> list[tuple[int, int]]:
    """Pairs (R, C) that a budget allows, R ascending.

    Args:
        kv_budget: share of the 2*G*d numbers that keys and values take now, or (R, C) itself.
        num_kv_heads, head_dim: G and d.
    """
    if isinstance(kv_budget, tuple):
        R, C = kv_budget
        if R % 2 or not 0 <= R <= num_kv_heads * head_dim or C < 1:
            raise ShapeError(
                f"gqa_to_mla: kv_budget has value {kv_budget}, expected an even R of at most "
                f"{num_kv_heads * head_dim} = num_kv_heads * head_dim and a C of at least 1"
            )
        return [(R, C)]
    if not 0.0 < kv_budget <= 1.0:
        raise ValueError(f"gqa_to_mla: kv_budget has value {kv_budget}, expected 0 < share <= 1")
    sizes = _budget_sizes(kv_budget, num_kv_heads, head_dim)
    if not sizes:
        raise ValueError(
            f"gqa_to_mla: kv_budget has value {kv_budget}, expected room for a rotated pair"
        )
    return sizes


def check_frequencies(
    listed: Sequence[int], sizes: Sequence[tuple[int, int]], num_kv_heads: int, head_dim: int
) -> None:
    """Refuse a list that is not R/2 long for the one (R, C), or that no layer can give."""
    rope_dims = [R for R, _ in sizes]
    if rope_dims != [2 * len(listed)]:
        raise ShapeError(
            f"gqa_to_mla: rotated_frequencies has {len(listed)} values, expected R/2 of one "
            f"kv_budget (R, C), got R in {rope_dims}"
        )
    most = max((listed.count(index) for index in set(listed)), default=0)
    if most > num_kv_heads or not set(listed) <= set(range(head_dim // 2)):
        raise ShapeError(
            f"gqa_to_mla: rotated_frequencies has values {sorted(set(listed))}, {most} times at "
            f"most, expected 0 to {head_dim // 2 - 1}, each at most {num_kv_heads} times"
        )


def size_step(num_kv_heads: int, head_dim: int) -> int:
    """What R and C are multiples of: 16 in real models, which fits the tiles of the kernels."""
    step = 16
    while step > 2 and num_kv_heads * head_dim < 8 * step:
        step //= 2
    return step


def _budget_sizes(fraction: float, num_kv_heads: int, head_dim: int) -> list[tuple[int, int]]:
    """Pairs (R, C) that fit into ``fraction`` of the numbers that keys and values take now."""
    half, step = num_kv_heads * head_dim, size_step(num_kv_heads, head_dim)
    total = 2 * half if fraction == 1.0 else int(fraction * 2 * half) // step * step
    rope_dims = {*range(0, half, step), half}
    return [(R, total - R) for R in sorted(rope_dims) if total - R >= 1]


def best_split(
    sizes: Sequence[tuple[int, int]], fit: Callable[[int, int], Fit], error: Callable[[Fit], float]
) -> Fit:
    """The fit with the smallest error along a list of sizes on which it first falls, then rises.

    More rotated numbers leave fewer for the latent, so one error falls while the other rises: walk
    downhill from a third of the budget, which is where the minimum often is.
    """
    fits: dict[int, Fit] = {}

    def error_at(index: int) -> float:
        if index not in fits:
            fits[index] = fit(*sizes[index])
        return error(fits[index])

    total = sum(sizes[0])
    at = min(range(len(sizes)), key=lambda index: abs(3 * sizes[index][0] - total))
    while True:
        best = min((i for i in (at, at - 1, at + 1) if 0 <= i < len(sizes)), key=error_at)
        if best == at:
            return fits[at]
        at = best
