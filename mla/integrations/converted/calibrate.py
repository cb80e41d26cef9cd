"""Run a model over calibration text once and sum what `mla.convert` needs to know of its layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mla.checks import ShapeError
from mla.convert import InputMoments, MomentSum, attention_received
from mla.integrations.converted.hosts import HostAttention, decoder_layers, read_host
from mla.rope import rotate

Progress = Callable[[int, int], None]  # (steps done, steps in all)


@torch.no_grad()
def calibrate(
    model: Any, windows: Tensor, *, progress: Progress | None = None
) -> list[InputMoments]:
    """Statistics of the inputs of every attention layer of an unconverted model.

    Nothing is kept but two ``[D+1, D+1]`` sums a layer; the model is as before afterwards.

    Args:
        model: a Llama-type causal language model of transformers; put into eval mode meanwhile.
        windows: ``[W, T]`` token ids without padding, one forward pass each. 8 windows of 1024
            tokens are enough; T should be about the context that matters.
        progress: called after each window.

    Raises:
        UnsupportedError: the model's attention cannot be converted.
        ShapeError: ``windows`` is not a filled matrix of integers.
    """
    host = read_host(model, "calibrate")
    if windows.ndim != 2 or windows.numel() == 0 or windows.is_floating_point():
        raise ShapeError(
            f"calibrate: windows has shape {tuple(windows.shape)} and dtype {windows.dtype}, "
            "expected [W, T] token ids"
        )
    layers = decoder_layers(model)
    sums = [MomentSum(host.hidden_size, windows.shape[1]) for _ in layers]
    handles = [
        layer.self_attn.register_forward_pre_hook(_Observer(host, total), with_kwargs=True)
        for layer, total in zip(layers, sums, strict=True)
    ]
    was_training = model.training
    model.eval()
    try:
        for done, window in enumerate(windows, start=1):
            model.base_model(input_ids=window[None].to(model.device), use_cache=False)
            if progress is not None:
                progress(done, len(windows))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return [total.result() for total in sums]


class _Observer:
    """A hook that adds the inputs of one attention layer to its sums."""

    def __init__(self, host: HostAttention, total: MomentSum) -> None:
        self.host, self.total = host, total

    def __call__(self, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cos, sin = (x[..., : x.shape[-1] // 2] for x in kwargs["position_embeddings"])

        def heads(projection: Any) -> Tensor:
            rows = projection(inputs)[0].unflatten(-1, (-1, self.host.head_dim)).transpose(0, 1)
            return rotate(rows, cos, sin, "half").float()

        query, key = heads(attention.q_proj), heads(attention.k_proj)
        weights, distances = attention_received(query, key, attention.scaling)
        self.total.add(inputs[0].float(), weights, distances)
