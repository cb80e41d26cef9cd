"""Decoding speed of several models on the same text, in turns.

On a machine that does other things too, times drift by more than models differ. So one step of
each model follows the other, and what is compared is the median over such rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

WARM_UP = 1  # rounds that are not counted
PREFILL_CHUNK = 1024


class Decoding:
    """One model with its cache, advanced along a fixed text."""

    def __init__(self, model: Any, ids: Tensor, cache: Any) -> None:
        self.model, self.ids, self.cache = model, ids.to(model.device), cache
        self.length = 0

    @torch.no_grad()
    def advance(self, count: int) -> float:
        """Read ``count`` more tokens in one call; returns seconds."""
        tokens = self.ids[None, self.length : self.length + count]
        _wait(tokens)
        start = time.perf_counter()
        result = self.model(
            input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        result.logits.argmax(-1)
        _wait(tokens)
        self.cache = result.past_key_values
        self.length += count
        return time.perf_counter() - start


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def decode_speeds(
    models: Mapping[str, Any],
    ids: Tensor,
    contexts: Sequence[int],
    *,
    steps: int,
    caches: Mapping[str, Any] | None = None,
    on_step: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Seconds and tokens per second of single decode steps at each context.

    Args:
        models: name and model.
        ids: ``[T]`` text, at least the longest context and a few tokens long.
        contexts: cached tokens, rising.
        steps: counted rounds at each context.
        caches: an empty cache for each model that shall not make its own.
        on_step: called after every chunk and round, `num_steps` times.

    Returns:
        For each context ``seconds`` (medians), ``tokens_per_second`` and ``rounds``, by model.
    """
    given = caches or {}
    runs = {name: Decoding(model, ids, given.get(name)) for name, model in models.items()}
    found: dict[str, dict[str, Any]] = {}
    for context in contexts:
        for run in runs.values():
            while run.length < context:
                run.advance(min(PREFILL_CHUNK, context - run.length))
                on_step()
        rounds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(WARM_UP + steps):
            for name, run in runs.items():
                rounds[name].append(run.advance(1))
            on_step()
        rounds = {name: times[WARM_UP:] for name, times in rounds.items()}
        medians = {name: statistics.median(times) for name, times in rounds.items()}
        found[str(context)] = {
            "seconds": medians,
            "tokens_per_second": {name: 1 / seconds for name, seconds in medians.items()},
            "rounds": rounds,
        }
    return found


def num_steps(num_models: int, contexts: Sequence[int], steps: int) -> int:
    """How often `decode_speeds` calls ``on_step``."""
    total, length = 0, 0
    for context in contexts:
        chunks = -(-(context - length) // PREFILL_CHUNK)
        total += num_models * max(chunks, 0) + WARM_UP + steps
        length = max(length, context) + WARM_UP + steps
    return total
