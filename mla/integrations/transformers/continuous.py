"""Continuous batching of transformers for models with replaced attention.

``model.generate_batch`` and ``model.init_continuous_batching`` make a `LatentBatchingManager`: all
of transformers' scheduling, prefix sharing and forking, over a pool of latent rows. While the pool
is made, the manager is shown a config with one head of half a row, so that transformers reserves
exactly one row for each token and layer; nobody else ever sees that config.

Source: transformers 5.23, generation/continuous_batching.
"""

from __future__ import annotations

import copy
import importlib.util
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers.generation.continuous_batching import ContinuousBatchingManager

from mla.checks import UnsupportedError
from mla.codec import Codec, PlainCodec
from mla.integrations.transformers.paged import PagedLatents

OP = "generate_batch"  # what errors are about
POOL_MODULE = "transformers.generation.continuous_batching.cache_allocators"


class LatentBatchingManager(ContinuousBatchingManager):
    """transformers' manager over a pool of latent rows.

    Args:
        model: a causal language model whose every attention layer was replaced.
        layers: these layers.
        codec: how rows are stored.
        generation_config, continuous_batching_config, workload_hints: as transformers has them.

    Raises:
        UnsupportedError: transformers is too old, the model has other layers, rows cannot be cut
            in two halves, or the config asks for graphs or compilation.
    """

    model: Any

    def __init__(
        self,
        model: Any,
        layers: list[Any],
        codec: Codec,
        generation_config: Any,
        continuous_batching_config: Any,
        workload_hints: Any = None,
    ) -> None:
        check_transformers()
        self._pool_config = pool_config(model, layers, codec)
        self._codec = codec
        super().__init__(
            model=model,
            generation_config=generation_config,
            continuous_batching_config=continuous_batching_config,
            workload_hints=workload_hints,
        )
        _check_runner(self.continuous_batching_config)

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """Keep the attention: the one that was put there can read the pool."""

    def _create_batch_processor(self) -> Any:
        if self.batch_processor is not None:
            return super()._create_batch_processor()
        model: Any = self.model
        keeps_logits = getattr(model, "_supports_logits_to_keep", None)
        self.model = SimpleNamespace(
            config=self._pool_config,
            device=model.device,
            dtype=model.dtype,
            _supports_logits_to_keep=keeps_logits,
        )
        try:
            processor = super()._create_batch_processor()
        finally:
            self.model = model
        processor.cache.__class__ = PagedLatents
        processor.cache.hold_latents_(self._codec, row_bytes(self._pool_config, model.dtype))
        inputs = processor.inputs_and_outputs
        inputs.get_model_kwargs = _WithoutMask(inputs.get_model_kwargs, model.device)
        return processor


class _WithoutMask:
    """``get_model_kwargs`` of a batch, with a mask of no elements that models pass on as it is.

    Without one, every forward pass would build a ``[T, T]`` mask of packed sequences.
    """

    def __init__(self, stock: Any, device: torch.device) -> None:
        self.stock = stock
        self.mask = torch.empty(1, 1, 1, 0, dtype=torch.int32, device=device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.stock(*args, **kwargs) | {"attention_mask": self.mask}


class ManagerMaker:
    """``init_continuous_batching`` of one model with replaced attention."""

    def __init__(self, model: Any, layers: list[Any], codec: Codec | None) -> None:
        self.model, self.layers, self.codec = model, layers, codec or PlainCodec()

    def __call__(
        self,
        generation_config: Any = None,
        continuous_batching_config: Any = None,
        workload_hints: Any = None,
    ) -> LatentBatchingManager:
        held = getattr(self.model, "_cached_continuous_batching_manager", None)
        if isinstance(held, LatentBatchingManager):
            return held
        check_transformers()
        generation_config = copy.copy(generation_config or self.model.generation_config)
        if generation_config.eos_token_id is None:
            generation_config.eos_token_id = -1  # how transformers says that there is none here
        return LatentBatchingManager(
            self.model,
            self.layers,
            self.codec,
            generation_config,
            continuous_batching_config or transformers.ContinuousBatchingConfig(),
            workload_hints,
        )


def check_transformers() -> None:
    """Raise UnsupportedError where the pool of transformers is laid out in another way."""
    if importlib.util.find_spec(POOL_MODULE) is None:
        raise UnsupportedError(
            f"{OP}: transformers has version {transformers.__version__}, expected 5.23 or newer "
            "for models with replaced attention; generate() works with this one"
        )


def pool_config(model: Any, layers: list[Any], codec: Codec) -> Any:
    """A copy of the text config under which transformers reserves one latent row a token.

    Raises:
        UnsupportedError: a layer is not full attention that was replaced, or a row has no halves.
    """
    text = model.config.get_text_config()
    found = {layer.layer_idx for layer in layers}
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if getattr(text, "layer_types", None) is None and getattr(text, "sliding_window", None):
        kinds = {"sliding_attention"}
    if found != set(range(text.num_hidden_layers)) or kinds != {"full_attention"}:
        raise UnsupportedError(
            f"{OP}: model has {len(found)} replaced layers and layer types {sorted(kinds)}, "
            f"expected full attention replaced in all {text.num_hidden_layers} layers; use "
            "generate()"
        )
    widths = [codec.row_width(x.kv_lora_rank, x.qk_rope_head_dim) for x in layers]
    itemsize = codec.storage_dtype(model.dtype).itemsize
    num_bytes = max(widths) * itemsize
    halves = 2 * model.dtype.itemsize
    if num_bytes % halves:
        raise UnsupportedError(
            f"{OP}: cached rows have width C+R={max(widths)}, expected an even number: "
            "transformers keeps them as two halves; rows of a codec can be halved"
        )
    config = copy.copy(text)
    config.num_key_value_heads, config.head_dim = 1, num_bytes // halves
    config.layer_types = ["full_attention"] * text.num_hidden_layers
    # Like flash attention, ours needs no mask and no repeated heads: plan memory as for that.
    config._attn_implementation_internal = "flash_attention_2"
    return config


def row_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of one token in one layer under `pool_config`: keys and values of its one head."""
    return 2 * int(config.head_dim) * dtype.itemsize


def _check_runner(config: Any) -> None:
    """Each batch has tables of its own, made on the host: a recorded step would use old ones."""
    compiled = config.varlen_compile_config is not None or config.decode_compile_config is not None
    if compiled or any(config.cuda_graph_booleans):
        raise UnsupportedError(
            f"{OP}: continuous_batching_config asks for "
            f"{'compilation' if compiled else 'CUDA graphs'}, expected neither with replaced "
            "attention; leave use_cuda_graph, default_compile_level and compile configs unset"
        )
