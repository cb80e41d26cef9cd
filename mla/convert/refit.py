"""Fit the output projection of a converted layer to what the original layer gave.

    minimise  sum |U z - y|^2 + ridge * |(U - U_0) diag(sum z z^T)^1/2|^2        z = [values | 1]

z is what the projection reads in the converted model, whose earlier layers are converted too, so
that part of their errors is undone; y is the output of the original layer. The ridge is the one
that does best on windows that were not fitted, and none where the old projection does better.

Dims: T tokens, H heads, V value width, D model width, E = H*V + 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)


class Refit(NamedTuple):
    """A projection and its relative squared errors on held-out windows."""

    weight: Tensor  # [D, H*V]
    bias: Tensor  # [D]
    ridge: float | None  # None: the old projection was best
    before: float
    after: float


class OutputRefit:
    """Sums of one layer while windows pass.

    Args:
        num_inputs: H*V.
        hidden_size: D.
    """

    def __init__(self, num_inputs: int, hidden_size: int) -> None:
        E = num_inputs + 1
        # Fitted windows, then those held out.
        self.inputs = torch.zeros(2, E, E, dtype=torch.float64)
        self.products = torch.zeros(2, hidden_size, E, dtype=torch.float64)
        self.energy = torch.zeros(2, dtype=torch.float64)

    def add(self, values: Tensor, outputs: Tensor, *, is_held_out: bool) -> None:
        """Add one window, in place: ``values [T, H*V]`` and ``outputs [T, D]``."""
        values, outputs = values.float(), outputs.float()
        extended = torch.cat([values, values.new_ones(len(values), 1)], dim=1)
        at = int(is_held_out)
        self.inputs[at] += (extended.mT @ extended).to(self.inputs)
        self.products[at] += (outputs.mT @ extended).to(self.products)
        self.energy[at] += outputs.square().sum().to(self.energy)

    def solve(self, weight: Tensor, bias: Tensor | None) -> Refit:
        """The best projection; ``weight [D, H*V]`` and ``bias [D]`` are the old one.

        Windows have to be there of both kinds.
        """
        old_bias = weight.new_zeros(len(weight)) if bias is None else bias
        old = torch.cat([weight, old_bias[:, None]], dim=1).to(self.products)
        before = best = self._held_out_error(old)
        chosen, ridge = old, None
        energies = self.inputs[0].diagonal()
        for candidate in RIDGES:
            penalty = candidate * (energies + 1e-3 * energies[:-1].mean())
            penalty[-1] = 0.0  # the bias is free
            factor = torch.linalg.cholesky(self.inputs[0] + torch.diag(penalty))
            new = torch.cholesky_solve((self.products[0] + old * penalty).mT, factor).mT
            error = self._held_out_error(new)
            if error < best:
                chosen, best, ridge = new, error, candidate
        fitted = chosen.to(weight)
        return Refit(fitted[:, :-1].contiguous(), fitted[:, -1].contiguous(), ridge, before, best)

    def _held_out_error(self, projection: Tensor) -> float:
        quadratic = ((projection @ self.inputs[1]) * projection).sum()
        error = quadratic - 2 * (projection * self.products[1]).sum() + self.energy[1]
        return float(error / self.energy[1].clamp_min(1e-300))
