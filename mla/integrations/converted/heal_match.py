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
from mla.integrations.converted.stream import LayerStream


class LayerTask(NamedTuple):
    """What one attention layer is to do."""

    inputs: Tensor  # [W, T, D] after the norm
    outputs: Tensor  # [W, T, D] of the original attention
    weights: Tensor  # [W, T] 1 / |h + y|^2


@torch.no_grad()
def layer_tasks(original: Any, windows: Tensor) -> Iterator[LayerTask]:
    """The task of every layer in turn, from one pass over ``windows [W, T]``."""
    stream = LayerStream(original, windows)
    for _ in stream.layers:
        yield _next_task(stream)


def _next_task(stream: LayerStream) -> LayerTask:
    """Take the stream through its next layer and keep what the attention read and wrote."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    weights: list[Tensor] = []

    def observe(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x, y = args[0] if args else kwargs["hidden_states"], output[0]
        residual = stream.hidden[len(inputs)].to(x.device)
        inputs.append(x)
        outputs.append(y)
        weights.append((residual + y).float().square().sum(-1).reciprocal())

    stream.advance(observe, progress=lambda done: None)
    return LayerTask(torch.cat(inputs), torch.cat(outputs), torch.cat(weights))


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
