"""Refit the output projections of a converted model, one layer after the other.

    original   h -> layer -> ..          y   what its attention gives
    converted  h~ -> layer~ -> ..        z   what its output projection reads

Both residual streams pass the layers together; a layer of the converted model is refitted before
its stream goes on, so that later layers see what earlier ones have become. No gradients.

Dims: W windows, T tokens, D model width, H heads, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mla.checks import ShapeError, UnsupportedError
from mla.convert.refit import OutputRefit, Refit
from mla.integrations.converted.calibrate import Progress
from mla.integrations.converted.hosts import decoder_layers, read_host
from mla.integrations.converted.layer import ConvertedAttention
from mla.integrations.converted.stream import LayerStream

OP = "refit_model"


@torch.no_grad()
def refit_model(
    converted: Any, original: Any, windows: Tensor, *, progress: Progress | None = None
) -> list[Refit]:
    """Change the output projections of ``converted``, in place; ``original`` stays as it is.

    In memory are both residual streams and one layer's attention outputs, ``[W, T, D]`` each.

    Args:
        converted: a model of `convert_model` or `load_converted`.
        original: what it was converted from.
        windows: ``[W, T]`` token ids without padding, W at least 2: every eighth is held out.
            Fewer than about 32,768 tokens gain little, as E = H*V + 1 numbers are fitted for each
            output.
        progress: called after each layer.

    Returns:
        What each layer gained on the windows held out.

    Raises:
        UnsupportedError: ``converted`` is not a converted model.
        ShapeError: ``windows`` does not fit.
    """
    host = read_host(original, OP)
    layers = decoder_layers(converted) if hasattr(converted, "base_model") else []
    if not layers or not all(isinstance(layer.self_attn, ConvertedAttention) for layer in layers):
        raise UnsupportedError(
            f"{OP}: converted has type {type(converted).__name__} without converted attention, "
            "expected a model of convert_model or load_converted"
        )
    if windows.ndim != 2 or len(windows) < 2 or windows.is_floating_point():
        raise ShapeError(
            f"{OP}: windows has shape {tuple(windows.shape)} and dtype {windows.dtype}, expected "
            "[W, T] token ids with W >= 2"
        )
    was_training = converted.training, original.training
    converted.eval()
    original.eval()
    try:
        streams = LayerStream(original, windows), LayerStream(converted, windows)
        found = []
        for index, layer in enumerate(layers):
            found.append(_refit_layer(layer, *streams))
            if progress is not None:
                progress(index + 1, host.num_layers)
    finally:
        converted.train(was_training[0])
        original.train(was_training[1])
    return found


def _refit_layer(layer: Any, original: LayerStream, converted: LayerStream) -> Refit:
    """One layer, and both streams behind it."""
    outputs: list[Tensor] = []
    values: list[Tensor] = []

    def keep_output(module: Any, args: Any, kwargs: Any, result: Any) -> None:
        outputs.append(result[0][0].clone())

    def keep_values(module: Any, args: Any) -> None:
        values.append(args[0][0])

    original.advance(keep_output, progress=lambda done: None)
    projection = layer.self_attn.mla.o_proj
    total = OutputRefit(projection.in_features, projection.out_features)
    handle = projection.register_forward_pre_hook(keep_values)
    try:
        for index, window in enumerate(converted.hidden):
            inputs = layer.input_layernorm(window[None].to(projection.weight.device))
            layer.self_attn(hidden_states=inputs, **converted.arguments)
            is_held_out = index % 8 == 7 or index == len(outputs) - 1
            total.add(values.pop(), outputs[index], is_held_out=is_held_out)
    finally:
        handle.remove()
    result = total.solve(projection.weight, projection.bias)
    # Not in place: the original may share the storage of the old one.
    projection.weight.data = result.weight
    projection.bias.data = result.bias
    converted.advance(lambda *call: None, progress=lambda done: None)
    return result
