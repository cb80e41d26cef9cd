"""How far a converted model's predictions are from the original's.

    divergence of a token = sum over the vocabulary of p (log p - log q)     p original, q converted

Dims: W windows, T tokens, D model width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mla.integrations.converted.heal_records import Measure


class Judge:
    """The original model, and what it says of the held-out windows.

    Args:
        original: a causal language model of transformers.
        windows: ``[W, T]`` token ids, held out.
        bfloat16: compute products of a float32 model in bfloat16; a bfloat16 model always does.
    """

    def __init__(self, original: Any, windows: Tensor, *, bfloat16: bool) -> None:
        self.original, self.windows = original, windows
        dtype = original.get_input_embeddings().weight.dtype
        self.autocast = bfloat16 or dtype == torch.bfloat16
        with torch.no_grad(), self.arithmetic():
            self.targets = [self.hidden(window) for window in windows]
        self.losses = self.evaluate(original)[1]  # [W, T-1] nats, of the original

    def arithmetic(self) -> torch.autocast:
        """The context of everything that is computed with either model."""
        kind = self.original.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=self.autocast)

    def hidden(self, window: Tensor) -> Tensor:
        """``[T, D]`` of the original before its head."""
        hidden: Tensor = self.original.base_model(input_ids=window[None], use_cache=False)[0][0]
        return hidden

    def divergence(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """``[T]`` in float32 or the wider dtype of ``logits``, differentiable in them."""
        with torch.no_grad():
            wanted = self.original.get_output_embeddings()(hidden)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        found, wanted = (F.log_softmax(x, dim=-1, dtype=dtype) for x in (logits, wanted))
        return F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)

    @torch.no_grad()
    def evaluate(self, model: Any) -> tuple[float, Tensor]:
        """Mean divergence, and the ``[W, T-1]`` losses in nats, on the held-out windows."""
        divergences, losses = [], []
        with self.arithmetic():
            for window, hidden in zip(self.windows, self.targets, strict=True):
                logits = logits_of(model, window)
                divergences.append(self.divergence(hidden, logits).mean())
                loss = F.cross_entropy(logits[:-1].float(), window[1:], reduction="none")
                losses.append(loss.double().cpu())
        return float(torch.stack(divergences).mean()), torch.stack(losses)

    def measure(self, model: Any, step: int) -> tuple[Measure, Tensor]:
        """`evaluate` as a record, and the losses."""
        divergence, losses = self.evaluate(model)
        change = float((losses - self.losses).mean())
        return Measure(step, divergence, math.exp(change) if change < 100 else math.inf), losses


def logits_of(model: Any, window: Tensor) -> Tensor:
    """``[T, vocabulary]`` of one window ``[T]``, without a cache."""
    logits: Tensor = model(input_ids=window[None], use_cache=False).logits[0]
    return logits
