"""What a healing is told and what it reports."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from mla.convert import Comparison


class Measure(NamedTuple):
    """The converted model against the original on the held-out windows."""

    step: int  # of the distillation; 0: before the first
    divergence: float  # mean over tokens of KL(original || converted), in nats
    ratio: float  # perplexity of the converted model / of the original


class LayerMatch(NamedTuple):
    """One layer on held-out windows: squared error of its output / squared residual stream."""

    before: float
    after: float  # of the weights that were kept, so at most ``before``


@dataclass(frozen=True, kw_only=True)
class HealOptions:
    """How a healing goes about it; together with steps, text and models it decides the result.

    Rates are relative: AdamW moves an entry of a matrix by about the rate times the root mean
    square of the matrix's entries. The factors of a converted layer differ in scale by a hundred.
    """

    learning_rate: float = 3e-4
    warmup: int = 10  # steps of a rate that grows from 0; a cosine follows, down to a tenth
    clip: float = 1.0  # largest norm of the gradient
    match_rate: float = 3e-4
    match_steps: int = 16  # for each layer; 0: no matching
    match_windows: int = 8  # whose residual stream is kept, beside the held-out ones
    held_out: int = 4  # windows, the last ones
    evaluate_every: int = 25  # steps
    patience: int = 4  # measures without a new best one before it stops
    save_every: int = 50  # layers or steps
    bfloat16: bool = False  # matrix products of a float32 model; trained weights stay float32
    checkpointing: bool = False  # blocks are computed again in the backward pass
    seed: int = 0  # of the order of the windows

    def __post_init__(self) -> None:
        for name in (
            *("learning_rate", "clip", "match_rate", "match_windows"),
            *("held_out", "evaluate_every", "patience", "save_every"),
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"HealOptions: {name} has value {getattr(self, name)}, expected above 0"
                )
        for name in ("warmup", "match_steps"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"HealOptions: {name} has value {getattr(self, name)}, expected at least 0"
                )


class HealReport(NamedTuple):
    """What was done and what it brought, on windows of the text that were not trained on."""

    steps: int  # of the distillation
    tokens: int  # that it read
    stopped: str  # "steps", "time", "no improvement" or "divergence": why it ended
    best_step: int  # whose weights were kept; 0: those before the distillation
    seconds: float
    processor_seconds: float
    before: Comparison  # with the original, before anything
    after: Comparison
    divergence_before: float  # mean KL(original || converted), in nats a token
    divergence_after: float
    layers: tuple[LayerMatch, ...]  # empty without matching
    held_out: tuple[Measure, ...]
    losses: tuple[float, ...]  # KL of each step, on the window it trained on
