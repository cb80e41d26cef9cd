"""Which parameters of a converted model are its own, which are trained, and in which dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mla.integrations.converted.hosts import decoder_layers


def share_frozen(converted: Any, original: Any) -> None:
    """Let ``converted`` use the storage of ``original`` for all that is not attention.

    Raises:
        ValueError: the models differ in anything but attention; nothing is changed.
    """
    theirs = dict(original.named_parameters())
    shared = []
    for name, mine in converted.named_parameters():
        if ".self_attn." in name:
            continue
        other = theirs.get(name)
        facts = [None if x is None else (tuple(x.shape), x.dtype, x.device) for x in (other, mine)]
        if other is None or facts[0] != facts[1]:
            raise ValueError(
                f"heal: original has {name} {facts[0]}, expected {facts[1]} as in converted: the "
                "model that was converted, with its dtype and device"
            )
        if mine.data_ptr() != other.data_ptr() and not torch.equal(mine, other):
            raise ValueError(
                f"heal: original has other values of {name} than converted, expected the model "
                "that was converted"
            )
        shared.append((mine, other))
    for mine, other in shared:
        mine.data = other.data


@contextmanager
def only_attention(converted: Any, *, checkpointing: bool) -> Iterator[list[nn.Module]]:
    """Within the block attention alone is trained, in float32 or wider and its own storage."""
    layers = decoder_layers(converted)
    attentions = [layer.self_attn.mla for layer in layers]
    wanted = {parameter: parameter.requires_grad for parameter in converted.parameters()}
    dtypes = {parameter: parameter.dtype for parameter in wanted}
    converted.eval().requires_grad_(False)
    for attention in attentions:
        attention.requires_grad_(True)
        for parameter in attention.parameters():
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            parameter.data = parameter.data.to(dtype, copy=True)
    if checkpointing:
        for layer in layers:
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
            layer.gradient_checkpointing = True
            layer.training = True  # the block alone: what is inside stays in eval mode
    try:
        yield attentions
    finally:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = False
        for parameter, requires_grad in wanted.items():
            parameter.requires_grad_(requires_grad)
            parameter.data = parameter.data.to(dtypes[parameter])
            parameter.grad = None
