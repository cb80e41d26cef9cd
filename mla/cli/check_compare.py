"""One comparison of `check`: what was computed against the oracle, and which mistake explains it.

budget = 2 * (error of plain PyTorch in the same dtype + one rounding of the largest value)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from mla.cli.check_oracle import Oracle
from mla.cli.console import one_line

Tensors = Sequence[Tensor]
MAX_EXPLANATIONS = 4
NAMES = ("out", "lse")
# In float64 nothing less precise shows what sums lose, so they get this many roundings.
FLOAT64_ROUNDINGS = 100


class Question(NamedTuple):
    """Something to compare; both sides give the same tensors."""

    stage: str
    case: str
    actual: Callable[[], Tensors]
    expected: Callable[[Oracle], Tensors]
    slack: float = 0.0  # allowed besides rounding, such as the step of a codec


@dataclass
class Answer:
    """Outcome of one question; error and budget are those of the tensor that fits worst."""

    stage: str
    case: str
    error: float = 0.0
    budget: float = 0.0
    problem: str = ""
    explanations: list[str] = field(default_factory=list)
    is_comparison: bool = True  # False: it raised, so there was nothing to compare

    @property
    def passed(self) -> bool:
        return not self.problem

    def sentence(self) -> str:
        """What is wrong, in words."""
        if self.explanations:
            return f"{self.problem}; matches if {', or if '.join(self.explanations)}"
        if self.problem and self.is_comparison:
            return f"{self.problem}; matches under no known mistake"
        return self.problem or "ok"


class Misfit(NamedTuple):
    error: float
    budget: float
    problem: str  # empty when it fits


def judge(
    question: Question,
    truth: Oracle,
    plain: Oracle,
    mistakes: Mapping[str, Oracle],
    suspects: Collection[str] = (),
) -> Answer:
    """Ask once; where the answer is wrong, ask again under each known mistake.

    Args:
        question: what to compare.
        truth: the oracle in float64.
        plain: the oracle in the dtype under test, for the budget.
        mistakes: words and the float64 oracle of each wrong convention.
        suspects: mistakes found before, tried first; the others only if none of them matches.
    """
    answer = Answer(question.stage, question.case)
    try:
        actual = _on_cpu(question.actual())
    except Exception as error:  # whatever a broken step raises is a finding, not our failure
        answer.is_comparison = False
        answer.problem = f"raises {type(error).__name__}: {one_line(error)}"
        return answer
    expected, rounded = (_on_cpu(question.expected(oracle)) for oracle in (truth, plain))
    budgets = [
        _budget(*tensors, question.slack) for tensors in zip(actual, expected, rounded, strict=True)
    ]
    answer.error, answer.budget, answer.problem = _misfit(actual, expected, budgets)
    if answer.problem:

        def matching(words: Collection[str]) -> list[str]:
            others = ((word, _on_cpu(question.expected(mistakes[word]))) for word in words)
            return [word for word, other in others if not _misfit(actual, other, budgets).problem]

        found = matching(suspects) or matching(mistakes)
        answer.explanations = found[:MAX_EXPLANATIONS]
    return answer


def _on_cpu(tensors: Tensors) -> list[Tensor]:
    return [tensor.detach().cpu() for tensor in tensors]


def _budget(actual: Tensor, expected: Tensor, rounded: Tensor, slack: float) -> float:
    finite = expected.double().masked_fill(expected == float("-inf"), 0.0)
    if finite.numel() == 0:
        return slack
    loss = (rounded.double() - finite).masked_fill(expected == float("-inf"), 0.0)
    roundings = FLOAT64_ROUNDINGS if actual.dtype == torch.float64 else 1
    rounding = roundings * torch.finfo(actual.dtype).eps * float(finite.abs().max())
    return 2 * (float(loss.abs().max()) + rounding) + slack


def _misfit(actual: Tensors, expected: Tensors, budgets: Sequence[float]) -> Misfit:
    """The tensor that uses most of its budget; the first that exceeds it."""
    worst = Misfit(0.0, 0.0, "")
    for index, (have, want) in enumerate(zip(actual, expected, strict=True)):
        found = _difference(have, want, budgets[index])
        if found.problem:
            name = f"{NAMES[index]} " if len(actual) > 1 else ""
            return found._replace(problem=name + found.problem)
        if index == 0 or found.error * worst.budget > worst.error * found.budget:
            worst = found
    return worst


def _difference(have: Tensor, want: Tensor, budget: float) -> Misfit:
    if have.shape != want.shape:
        text = f"has shape {tuple(have.shape)}, expected {tuple(want.shape)}"
        return Misfit(float("inf"), budget, text)
    minus = want == float("-inf")
    if bool(((have == float("-inf")) != minus).any()):
        return Misfit(float("inf"), budget, "is -inf at other places")
    have, want = (x.double().masked_fill(minus, 0.0) for x in (have, want))
    if not bool(torch.isfinite(have).all()):
        return Misfit(float("inf"), budget, "has values that are not finite")
    error = float((have - want).abs().max()) if have.numel() else 0.0
    fits = error <= budget
    return Misfit(error, budget, "" if fits else f"is off by {error:.1e}, allowed {budget:.1e}")
