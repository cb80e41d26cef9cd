"""The residual stream of calibration text on its way through a model, one layer at a time.

    hidden [W, T, D] -> layer 0 -> hidden -> layer 1 -> ..      all windows through one layer first

So only one layer and the stream are needed at any time, and the inputs of a layer are there when
it is looked at. In a folder the stream is a memory-mapped file, two of them in turns, so that what
one layer left behind stays whole until the next has passed.

Dims: W windows, T tokens of a window, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mla.integrations.converted.hosts import decoder_layers

Hook = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]


class _Reached(Exception):
    """The first layer has been called."""


class LayerStream:
    """Windows of tokens in front of layer ``index`` of a model.

    Args:
        model: a Llama-type causal language model of transformers, in eval mode.
        windows: ``[W, T]`` token ids without padding.
        folder: where the stream lies, None: in memory.
        index: layer whose inputs the folder holds already; 0: the embeddings are computed.
    """

    def __init__(
        self, model: Any, windows: Tensor, *, folder: Path | None = None, index: int = 0
    ) -> None:
        self.layers = decoder_layers(model)
        self.folder, self.index = folder, index
        first, self.arguments = _first_call(model, windows[:1])
        self.shape, self.dtype = (len(windows), *first.shape[1:]), first.dtype
        self.hidden = self._storage(index)
        if index == 0:
            for row, window in zip(self.hidden, windows, strict=True):
                row.copy_(_first_call(model, window[None])[0][0])

    def advance(self, hook: Hook, *, progress: Callable[[int], None]) -> None:
        """Take every window through the next layer.

        Args:
            hook: a forward hook, with keywords, of the layer's attention; called window by window.
            progress: called after each window with its number from 1.
        """
        layer = self.layers[self.index]
        following = self._storage(self.index + 1)
        device = next(layer.parameters()).device
        handle = layer.self_attn.register_forward_hook(hook, with_kwargs=True)
        try:
            for done, (row, window) in enumerate(zip(following, self.hidden, strict=True), start=1):
                result = layer(window[None].to(device), **self.arguments)
                row.copy_((result[0] if isinstance(result, tuple) else result)[0])
                progress(done)
        finally:
            handle.remove()
        self.hidden, self.index = following, self.index + 1

    def _storage(self, index: int) -> Tensor:
        """What holds the inputs of layer ``index``; in memory the place of those before."""
        if self.folder is None:
            held: Tensor | None = getattr(self, "hidden", None)
            return torch.empty(self.shape, dtype=self.dtype) if held is None else held
        path = self.folder / f"stream-{index % 2}.bin"
        size = math.prod(self.shape)
        return torch.from_file(str(path), shared=True, size=size, dtype=self.dtype).view(self.shape)


def _first_call(model: Any, window: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Hidden states ``[1, T, D]`` and keyword arguments that reach the first layer."""
    seen: list[tuple[Tensor, dict[str, Any]]] = []

    def stop(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        seen.append((hidden, kwargs))
        raise _Reached

    handle = decoder_layers(model)[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model.base_model(input_ids=window.to(model.device), use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0]
