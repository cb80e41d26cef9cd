"""Match the output of each converted attention layer with that of the layer it stands for.

    x = norm(h)    y = original(x)    minimise  mean over tokens of |converted(x) - y|^2 / |h + y|^2

h is the residual stream of the original model, so that layers are independent of each other: one
after the other is trained, and all that is kept is the stream of a few windows.

Dims: W windows, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mla.integrations.converted.heal_records import LayerMatch
from mla.integrations.converted.hosts import decoder_layers


class LayerTask(NamedTuple):
    """What one attention layer is to do."""

    inputs: Tensor  # [W, T, D] after the norm
    outputs: Tensor  # [W, T, D] of the original attention
    weights: Tensor  # [W, T] 1 / |h + y|^2


@torch.no_grad()
def layer_tasks(original: Any, windows: Tensor) -> Iterator[LayerTask]:
    """The task of every layer in turn, from one pass over ``windows [W, T]``."""
    layers, seen = decoder_layers(original), []

    def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        seen.append((stream, kwargs))

    handle = layers[0].register_forward_pre_hook(observe, with_kwargs=True)
    try:
        for window in windows:
            original.base_model(input_ids=window[None], use_cache=False)
    finally:
        handle.remove()
    streams = [stream for stream, _ in seen]
    for layer in layers:
        inputs, outputs, weights = [], [], []
        for index, (_, kwargs) in enumerate(seen):
            x = layer.input_layernorm(streams[index])
            y = layer.self_attn(hidden_states=x, **kwargs)[0]
            inputs.append(x)
            outputs.append(y)
            weights.append((streams[index] + y).float().square().sum(-1).reciprocal())
            streams[index] = layer(streams[index], **kwargs)
        yield LayerTask(torch.cat(inputs), torch.cat(outputs), torch.cat(weights))


def relative_error(attention: nn.Module, task: LayerTask, rows: slice) -> Tensor:
    """Mean over tokens of the squared error relative to the residual stream."""
    difference = attention(task.inputs[rows]).float() - task.outputs[rows].float()
    return (difference.square().sum(-1) * task.weights[rows]).mean()


def match_layer(
    attention: nn.Module,
    task: LayerTask,
    *,
    held_out: int,
    steps: int,
    optimizer: torch.optim.Optimizer,
    set_rate: Callable[[torch.optim.Optimizer, int], None],
) -> LayerMatch:
    """Train one layer, in place, and keep the new weights if they are better on held-out windows.

    Args:
        attention: takes ``[1, T, D]``; all its parameters are trained.
        task: the last ``held_out`` windows are not trained on.
        steps: one window each, in turn.
        optimizer: of all parameters of ``attention``.
        set_rate: called with the optimizer and the number of steps done, before each.
    """
    parameters = list(attention.parameters())
    start = [x.detach().clone() for x in parameters]
    last = slice(len(task.inputs) - held_out, None)
    with torch.no_grad():
        before = relative_error(attention, task, last).item()
    for step in range(steps):
        index = step % (len(task.inputs) - held_out)
        loss = relative_error(attention, task, slice(index, index + 1))
        loss.backward()
        set_rate(optimizer, step)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        after = relative_error(attention, task, last).item()
        if not after < before:  # NaN included
            for parameter, value in zip(parameters, start, strict=True):
                parameter.copy_(value)
    return LayerMatch(before, after if after < before else before)
