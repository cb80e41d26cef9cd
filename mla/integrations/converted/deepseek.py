"""A converted model as a stock `DeepseekV3ForCausalLM`: in memory, or as a folder.

    conversion = convert_model(model, windows, kv_budget=0.75, layout="deepseek_v3")
    export_deepseek_v3(conversion, "exported", tokenizer=tokenizer)
    AutoModelForCausalLM.from_pretrained("exported")          # no code of ours is needed

The folder holds what ``save_pretrained`` writes, and the reports of the conversion.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GenerationConfig,
)

from mla.checks import ShapeError, UnsupportedError
from mla.config import MLAConfig
from mla.convert import token_losses
from mla.convert.checkpoint import LAYER_PREFIX, check_folder, whole_folder
from mla.convert.deepseek import (
    QUERY_PADDING,
    common_config,
    deepseek_layer,
    longrope_parameters,
)
from mla.integrations.converted.calibrate import Progress
from mla.integrations.converted.hosts import decoder_layers
from mla.integrations.converted.layer import ConvertedAttention
from mla.integrations.converted.model import (
    Conversion,
    check_tensors,
    convert_model,
    stored_tensors,
)

REPORT_FILE = "conversion.json"
OP = "export_deepseek_v3"
FORMAT = "mla-deepseek-v3"
CHECKED = 256  # tokens read after an export
HOST_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act"),
    *("max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "attention_dropout"),
)


class ExportCheck(NamedTuple):
    """The stock model read back from a folder, beside the converted one, on the same tokens."""

    logit_difference: float  # largest absolute one
    largest_logit: float
    loss: float  # mean cross entropy of the converted model, in nats
    exported_loss: float


def convert_to_deepseek_v3(
    model: Any,
    windows: Tensor,
    path: Path | str,
    *,
    kv_budget: float | tuple[int, int] = 0.75,
    tokenizer: Any = None,
    overwrite: bool = False,
    calibrate_progress: Progress | None = None,
    layout_progress: Progress | None = None,
    convert_progress: Progress | None = None,
) -> tuple[Conversion, ExportCheck]:
    """Convert a Llama-type model, write it as a stock DeepSeek-V3 model, read that back.

    Args:
        model, windows, kv_budget: as for `convert_model`.
        path, tokenizer, overwrite: as for `export_deepseek_v3`.
        calibrate_progress, layout_progress, convert_progress: as for `convert_model`.

    Returns:
        The conversion in our own form, and how the folder compares on the first 256 tokens.

    Raises:
        UnsupportedError: the model's attention or MLPs have no place in the layout.
        ShapeError, ValueError: ``windows`` or ``kv_budget`` does not fit, or ``path`` is taken.
    """
    check_target(path, overwrite)
    check_mlps(model)
    if windows.ndim == 2 and windows.shape[1] < 2:
        raise ShapeError(
            f"{OP}: windows has shape {tuple(windows.shape)}, expected [W, T] with T >= 2"
        )
    conversion = convert_model(
        model,
        windows,
        kv_budget=kv_budget,
        layout="deepseek_v3",
        calibrate_progress=calibrate_progress,
        layout_progress=layout_progress,
        convert_progress=convert_progress,
    )
    export_deepseek_v3(conversion, path, tokenizer=tokenizer, overwrite=overwrite)
    return conversion, check_export(conversion, path, windows[:1, :CHECKED])


def export_deepseek_v3(
    conversion: Conversion, path: Path | str, *, tokenizer: Any = None, overwrite: bool = False
) -> None:
    """Write a converted model as a folder of a stock `DeepseekV3ForCausalLM`, all or nothing.

    Args:
        conversion: of `convert_model` with ``layout="deepseek_v3"``, or of `load_converted`.
        path: a folder that does not exist or is empty.
        tokenizer: of transformers, saved along with the model.
        overwrite: replace an exported model that is there.

    Raises:
        UnsupportedError: the layers have no layout in common, or the MLPs have biases.
        ValueError: ``path`` is taken; nothing is written.
    """
    check_target(path, overwrite)
    stock = to_deepseek_v3(conversion.model)
    values = {"format": FORMAT, "reports": [report._asdict() for report in conversion.reports]}
    with whole_folder(path, OP, overwrite=overwrite, recognise=_recognise) as unfinished:
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        stock.save_pretrained(unfinished)
        (unfinished / REPORT_FILE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def check_export(conversion: Conversion, path: Path | str, windows: Tensor) -> ExportCheck:
    """Load an exported folder with stock transformers and compare it with the converted model.

    Args:
        conversion: what was exported.
        path: the folder.
        windows: ``[W, T]`` token ids, one forward pass each.
    """
    stock = AutoModelForCausalLM.from_pretrained(path, dtype="auto", local_files_only=True)
    stock = stock.to(conversion.model.device).eval()
    differences, sizes = [], []
    for window in windows.to(stock.device):
        expected, actual = (
            model(input_ids=window[None], use_cache=False).logits.float()
            for model in (conversion.model, stock)
        )
        differences.append((actual - expected).abs().max())
        sizes.append(expected.abs().max())
    difference, largest = (float(torch.stack(x).max()) for x in (differences, sizes))
    losses = (float(token_losses(model, windows).mean()) for model in (conversion.model, stock))
    return ExportCheck(difference, largest, *losses)


@torch.no_grad()
def to_deepseek_v3(model: Any) -> Any:
    """The stock model that computes what ``model`` does; what is not attention is shared.

    Args:
        model: of `convert_model` with ``layout="deepseek_v3"``, or of `load_converted`.

    Returns:
        A `DeepseekV3ForCausalLM` in eval mode, dtype and device of ``model``.

    Raises:
        UnsupportedError: the layers have no layout in common, or the MLPs have biases.
    """
    layers = decoder_layers(model)
    if not all(isinstance(layer.self_attn, ConvertedAttention) for layer in layers):
        raise UnsupportedError(
            f"{OP}: model has unconverted attention, expected that of convert_model"
        )
    check_mlps(model)
    config = common_config([layer.self_attn.mla.config for layer in layers])
    tensors = stored_tensors(model)
    for index, layer in enumerate(layers):
        prefix = LAYER_PREFIX.format(index)
        tensors = {name: x for name, x in tensors.items() if not name.startswith(prefix)}
        weights = deepseek_layer(
            config, layer.self_attn.mla.state_dict(), layer.input_layernorm.weight
        )
        tensors |= {prefix + name: x for name, x in weights.items()}
    stock_config = _stock_config(model, config)
    with torch.device("meta"):
        stock: Any = DeepseekV3ForCausalLM(stock_config)
    check_tensors(stock, tensors, OP)
    stock.model.rotary_emb = type(stock.model.rotary_emb)(stock_config)  # in no file
    stock.load_state_dict(tensors, strict=False, assign=True)
    stock.tie_weights()
    stock.generation_config = GenerationConfig.from_dict(model.generation_config.to_dict())
    return stock.to(model.device).eval()


def check_target(path: Path | str, overwrite: bool) -> None:
    """Refuse a taken folder before the work; see `export_deepseek_v3`."""
    check_folder(Path(path), OP, overwrite, _recognise)


def check_mlps(model: Any) -> None:
    """Refuse biases that the layout has no place for."""
    if getattr(model.config, "mlp_bias", False):
        raise UnsupportedError(
            f"{OP}: model has mlp_bias True, expected False: MLPs of DeepSeek-V3 have no biases"
        )


def _stock_config(model: Any, config: MLAConfig) -> Any:
    host = model.config
    theta = float(host.rope_parameters["rope_theta"])
    assert config.rope.inv_freq is not None  # common_config has looked
    return DeepseekV3Config(
        **{name: getattr(host, name) for name in HOST_FIELDS},
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        q_lora_rank=config.hidden_size + QUERY_PADDING if config.query_bias else None,
        kv_lora_rank=config.kv_lora_rank + 1,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        attention_bias=True,
        rope_interleave=True,
        rope_parameters=longrope_parameters(
            config.rope.inv_freq, theta, host.max_position_embeddings
        ),
        first_k_dense_replace=host.num_hidden_layers,  # no experts; the sizes below are unused
        n_routed_experts=1,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=1,
        num_mtp_layers=0,
        dtype=model.dtype,
        architectures=["DeepseekV3ForCausalLM"],
    )


def _recognise(path: Path) -> None:
    """Raise ValueError if ``path`` holds no exported model."""
    values = json.loads((path / REPORT_FILE).read_text(encoding="utf-8"))
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"{OP}: {path} holds no exported model")
