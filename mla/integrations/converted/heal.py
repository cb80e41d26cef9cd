"""Heal a converted model: a short distillation of its attention from the original.

    1. heal_match.py   each layer alone learns the original layer's output
    2. heal_loop.py    all layers learn the original's logits, by KL(original || converted)

Only attention is trained. What is measured on the way is measured on windows that are not trained
on, and the weights that did best there are kept, so a healed model is never worse on them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mla.checks import ShapeError, UnsupportedError
from mla.integrations.converted.heal_freeze import only_attention, share_frozen
from mla.integrations.converted.heal_loop import Healing, HealProgress
from mla.integrations.converted.heal_records import HealOptions, HealReport
from mla.integrations.converted.hosts import decoder_layers, read_host
from mla.integrations.converted.layer import ConvertedAttention

__all__ = ["HealOptions", "HealProgress", "HealReport", "heal"]

OP = "heal"


def heal(
    converted: Any,
    original: Any,
    windows: Tensor,
    *,
    steps: int = 400,
    seconds: float | None = None,
    options: HealOptions | None = None,
    state: Path | None = None,
    resume: bool = False,
    progress: HealProgress | None = None,
) -> HealReport:
    """Train the attention of ``converted``, in place, to do what ``original`` does.

    ``original`` is left as it is, and ``converted`` shares all other parameters with it afterwards.
    Nothing is drawn at random but the order of windows, from the seed: on a CPU with as many
    threads, a healing that was interrupted and resumed ends with the same bits.

    Args:
        converted: a model of `convert_model` or `load_converted`; put into eval mode.
        original: the model that it was converted from; same device and dtype.
        windows: ``[W, T]`` token ids without padding, T about 512; the last ones are held out.
        steps: of the distillation, one window each.
        seconds: on the clock for all of it, resumed parts included; the rate then falls with
            whichever of steps and time is further. None: no limit.
        options: None: the defaults.
        state: a file for what is needed to go on, replaced now and then; its folder is made. It
            stays after the end, when resuming from it gives the result at once.
        resume: start from ``state``.
        progress: called after each layer ("match") and step ("distil").

    Raises:
        UnsupportedError: a model is of the wrong kind.
        ShapeError: ``windows`` is no matrix of token ids, or has too few rows.
        ValueError: ``original`` is not the model that was converted, or ``state`` is of another
            healing.
    """
    options = options or HealOptions()
    _check(converted, original, windows, steps, seconds, options)
    if resume and state is None:
        raise ValueError("heal: state has value None, expected a file to resume from")
    share_frozen(converted, original)
    windows, was_training = windows.to(converted.device), original.training
    original.eval()
    try:
        with only_attention(converted, checkpointing=options.checkpointing) as attentions:
            healing = Healing(converted, original, windows, steps, seconds, options, attentions)
            healing.progress, healing.file = progress, state
            return healing.run(resume)
    finally:
        original.train(was_training)


def _check(
    converted: Any,
    original: Any,
    windows: Tensor,
    steps: int,
    seconds: float | None,
    options: HealOptions,
) -> None:
    read_host(original, OP)
    layers = decoder_layers(converted) if hasattr(converted, "base_model") else []
    if not layers or not all(isinstance(x.self_attn, ConvertedAttention) for x in layers):
        raise UnsupportedError(
            f"{OP}: converted has type {type(converted).__name__} without converted attention, "
            "expected a model of convert_model or load_converted"
        )
    if converted.get_input_embeddings().weight.dtype == torch.float16:
        raise UnsupportedError(
            f"{OP}: converted has dtype torch.float16, expected float32 or bfloat16: gradients "
            "underflow; load both models with another dtype"
        )
    if windows.ndim != 2 or windows.shape[1] < 2 or windows.is_floating_point():
        raise ShapeError(
            f"{OP}: windows has shape {tuple(windows.shape)} and dtype {windows.dtype}, expected "
            "[W, T] token ids with T >= 2"
        )
    if len(windows) <= options.held_out:
        raise ShapeError(
            f"{OP}: windows has {len(windows)} rows, expected more than the "
            f"held_out={options.held_out} that are not trained on"
        )
    if steps < 1 or (seconds is not None and not seconds > 0):
        raise ValueError(
            f"{OP}: steps and seconds have values {steps} and {seconds}, expected at least one "
            "step and some time"
        )
