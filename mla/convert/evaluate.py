"""Perplexity of a language model over windows of tokens, and how much a change of the model costs.

    change_w = mean over tokens of window w of (loss after - loss before)     paired: same tokens
    ratio = exp(mean_w change_w) = perplexity after / perplexity before

The paired difference is far more certain than either perplexity: windows differ in difficulty by
much more than a conversion changes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mla.checks import ShapeError

CHARACTERS_PER_TOKEN = 8  # tokens of English text are about half as long: enough text is taken


class Comparison(NamedTuple):
    """Two models on the same tokens."""

    before: float  # perplexity
    after: float
    ratio: float  # after / before
    ratio_error: float  # standard error of ratio over windows; nan for a single window
    loss_change: float  # mean over tokens, in nats
    num_tokens: int


def token_windows(tokenizer: Any, text: str, *, count: int, length: int) -> Tensor:
    """The first ``count`` windows of ``length`` tokens of ``text``, ``[count, length]`` int64.

    Args:
        tokenizer: of transformers.
        text: at least ``count * length`` tokens long.
        count, length: W and T, at least 1 and 2.

    Raises:
        ValueError: ``text`` is too short or a size too small.
    """
    if count < 1 or length < 2:
        raise ValueError(
            f"token_windows: count and length have values {count} and {length}, "
            "expected at least 1 and 2"
        )
    wanted = count * length
    ids: list[int] = []
    # A long text is not tokenised whole; verbose=False: it is longer than the model's context.
    for share in (text[: wanted * CHARACTERS_PER_TOKEN], text):
        ids = tokenizer(share, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= wanted or len(share) == len(text):
            break
    if len(ids) < wanted:
        raise ValueError(
            f"token_windows: text has {len(ids)} tokens, expected at least {wanted} = "
            f"{count} * {length}"
        )
    return torch.tensor(ids[:wanted]).view(count, length)


@torch.no_grad()
def token_losses(
    model: Any, windows: Tensor, *, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """Cross entropy of every token but the first of each window, in nats.

    Args:
        model: a causal language model of transformers.
        windows: ``[W, T]`` token ids; one forward pass each, without a cache.
        progress: called with (windows done, windows in all) after each one.

    Returns:
        ``[W, T-1]`` float64 on the CPU.

    Raises:
        ShapeError: ``windows`` is not a matrix of at least one window of two tokens.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ShapeError(
            f"token_losses: windows has shape {tuple(windows.shape)}, expected [W, T] with T >= 2"
        )
    losses = []
    for done, window in enumerate(windows, start=1):
        window = window.to(model.device)
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits.float(), window[1:], reduction="none")
        losses.append(loss.double().cpu())
        if progress is not None:
            progress(done, len(windows))
    return torch.stack(losses)


def compare_losses(before: Tensor, after: Tensor) -> Comparison:
    """Perplexities and their ratio from the losses of two models on the same windows.

    Args:
        before, after: ``[W, T-1]`` of `token_losses`.

    Raises:
        ShapeError: the shapes differ.
    """
    if before.shape != after.shape or before.ndim != 2 or before.numel() == 0:
        raise ShapeError(
            f"compare_losses: after has shape {tuple(after.shape)}, expected "
            f"{tuple(before.shape)} as before has, [W, T-1]"
        )
    change = (after - before).mean(1)
    ratio = math.exp(change.mean())
    spread = float(change.std() / len(change) ** 0.5) if len(change) > 1 else math.nan
    return Comparison(
        before=math.exp(before.mean()),
        after=math.exp(after.mean()),
        ratio=ratio,
        ratio_error=ratio * spread,
        loss_change=float(change.mean()),
        num_tokens=before.numel(),
    )
