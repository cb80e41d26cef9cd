"""Convert a grouped-query model of transformers, save the result, load it again.

    model, windows -> calibrate -> gqa_to_mla, layer by layer -> Checkpoint -> build_model
                                    save_checkpoint, load_checkpoint -> Checkpoint -> build_model

Everything but the attention is the original's: the converted model shares those parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig

from mla.checks import ShapeError
from mla.convert import FitReport, gqa_to_mla
from mla.convert.allocate import allocate
from mla.convert.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mla.convert.choose import split_candidates
from mla.convert.deepseek import shared_layout
from mla.convert.published import published_layer
from mla.convert.survey import Survey
from mla.integrations.converted.calibrate import Progress, survey_model
from mla.integrations.converted.hosts import (
    MODEL_TYPES,
    HostAttention,
    attention_weights,
    check_host_config,
    decoder_layers,
    read_host,
)
from mla.integrations.converted.layer import ConvertedAttention
from mla.integrations.transformers import replace_attention

Layout = Literal["free", "deepseek_v3"]
Objective = Literal["output", "published"]


class Conversion(NamedTuple):
    """A converted model and what each of its layers lost."""

    model: Any
    reports: tuple[FitReport, ...]


def convert_model(
    model: Any,
    windows: Tensor,
    *,
    kv_budget: float | tuple[int, int] | list[tuple[int, int]] = 0.75,
    layout: Layout = "free",
    objective: Objective = "output",
    fold: int = 1,
    survey: Survey | None = None,
    folder: Path | None = None,
    calibrate_progress: Progress | None = None,
    layout_progress: Progress | None = None,
    convert_progress: Progress | None = None,
) -> Conversion:
    """Convert all attention layers of a Llama-type model, without training.

    ``model`` is left as it is. The new one shares its embeddings, norms, MLPs and output
    projections, so take a deep copy before training either.

    Args:
        model: a causal language model of transformers (Llama, Mistral, Qwen2).
        windows: ``[W, T]`` token ids of text like that to be read, see `survey_model`.
        kv_budget: share of the cached numbers to keep, all layers together; (R, C) for every
            layer; or a list of them, one for each layer.
        layout: "free": sizes and frequencies of each layer's own; "deepseek_v3": those that
            `export_deepseek_v3` can write, the same in all layers.
        objective: "output": the error of each layer's output; "published": that of its keys and
            values, every layer alike, for comparison (`mla.convert.published`).
        fold: of the published objective, see `mla.convert.published.published_layer`; else 1.
        survey: of `survey_model` with this ``kv_budget`` among others, ``windows`` are not
            read again; None: made here.
        folder: for the survey, which then goes on after an interruption; None: in memory.
        calibrate_progress: called after each window of each layer.
        layout_progress: called after each fit of a layer while a common layout is sought.
        convert_progress: called after each layer.

    Returns:
        A model of the same class, in eval mode, that decodes absorbed; and a report per layer.

    Raises:
        UnsupportedError: the model's attention cannot be converted.
        ShapeError, ValueError: ``windows`` or ``kv_budget`` does not fit.
    """
    host = read_host(model)
    if layout not in get_args(Layout):
        raise ValueError(
            f"convert_model: layout has value {layout!r}, expected one of {list(get_args(Layout))}"
        )
    if objective not in get_args(Objective) or (objective == "published" and layout != "free"):
        raise ValueError(
            f"convert_model: objective has value {objective!r} with layout={layout!r}, expected "
            f"one of {list(get_args(Objective))}, the last for the free layout only"
        )
    if fold != 1 and objective != "published":
        raise ValueError(f"convert_model: fold has value {fold}, expected 1 for our objective")
    is_measured = layout == "free" and objective == "output"
    if isinstance(kv_budget, list) and (len(kv_budget) != host.num_layers or not is_measured):
        raise ShapeError(
            f"convert_model: kv_budget has {len(kv_budget)} pairs with layout={layout!r} and "
            f"objective={objective!r}, expected {host.num_layers}, one for each layer, for the "
            "free layout and our objective"
        )
    if survey is None:
        budgets = []
        if isinstance(kv_budget, float) and kv_budget < 1.0 and is_measured:
            split_candidates(kv_budget, host.num_kv_heads, host.head_dim)  # refuses what is too low
            budgets = [kv_budget]
        survey = survey_model(
            model, windows, kv_budgets=budgets, folder=folder, progress=calibrate_progress
        )
    weights = [attention_weights(layer.self_attn) for layer in decoder_layers(model)]
    sizes: list[Any] = [kv_budget] * len(weights)
    frequencies = None
    if layout == "deepseek_v3":
        layers = [(w, layer.moments) for w, layer in zip(weights, survey, strict=True)]
        assert not isinstance(kv_budget, list)
        shared = shared_layout(layers, kv_budget=kv_budget, progress=layout_progress, **host.shape)
        sizes, frequencies = [shared.sizes] * len(layers), shared.rotated_frequencies
    elif is_measured:
        sizes = _sizes(survey, kv_budget, host)
    names = {id(module): name for name, module in model.named_modules()}
    tensors = stored_tensors(model)
    configs, reports = [], []
    for index, layer in enumerate(decoder_layers(model)):
        moments, shape = survey[index].moments, {"kv_budget": sizes[index], **host.shape}
        if objective == "published":
            converted = published_layer(weights[index], moments, fold=fold, **shape)
        else:
            converted = gqa_to_mla(
                weights[index], moments, rotated_frequencies=frequencies, **shape
            )
        prefix = names[id(layer.self_attn)] + "."
        tensors = {name: x for name, x in tensors.items() if not name.startswith(prefix)}
        tensors |= {f"{prefix}mla.{name}": x for name, x in converted.state_dict.items()}
        configs.append(converted.config)
        reports.append(converted.report)
        if convert_progress is not None:
            convert_progress(index + 1, host.num_layers)
    checkpoint = Checkpoint(
        host_config=_host_config(model),
        generation_config=model.generation_config.to_dict(),
        layers=tuple(configs),
        reports=tuple(reports),
        tensors=tensors,
    )
    return Conversion(build_model(checkpoint), checkpoint.reports)


def _sizes(survey: Survey, kv_budget: Any, host: HostAttention) -> list[tuple[int, int]]:
    """(R, C) of each layer, so that all together keep ``kv_budget`` of the cached numbers."""
    if isinstance(kv_budget, tuple):
        return [kv_budget] * len(survey)
    if isinstance(kv_budget, list):
        return kv_budget
    half = host.num_kv_heads * host.head_dim
    if kv_budget == 1.0:
        return [(half, half)] * len(survey)
    options = [layer.options for layer in survey]
    if not all(options):
        raise ValueError(
            "convert_model: survey has layers without options, expected that of "
            f"survey_model with {kv_budget} among its kv_budgets"
        )
    chosen = allocate(options, int(kv_budget * 2 * half * len(options)))
    return [(option.rope_dim, option.latent_dim) for option in chosen]


def save_converted(
    conversion: Conversion, path: Path | str, *, tokenizer: Any = None, overwrite: bool = False
) -> None:
    """Write a converted model as a folder, all or nothing.

    Args:
        conversion: of `convert_model` or `load_converted`.
        path: a folder that does not exist or is empty.
        tokenizer: of transformers, saved along with the model.
        overwrite: replace a converted model that is there.

    Raises:
        ValueError: ``path`` is taken; nothing is written.
    """
    model = conversion.model
    attentions = [layer.self_attn for layer in decoder_layers(model)]
    checkpoint = Checkpoint(
        host_config=_host_config(model),
        generation_config=model.generation_config.to_dict(),
        layers=tuple(attention.mla.config for attention in attentions),
        reports=conversion.reports,
        tensors=stored_tensors(model),
    )
    extra = None if tokenizer is None else tokenizer.save_pretrained
    save_checkpoint(path, checkpoint, overwrite=overwrite, write_extra=extra)


def load_converted(
    path: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Conversion:
    """Load a folder of `save_converted` as a model of transformers that decodes absorbed.

    Args:
        path: the folder.
        dtype: of all weights, None: as stored.
        device: where to.

    Raises:
        ValueError: the folder is not a complete converted model; the message names what is wrong.
    """
    checkpoint = load_checkpoint(path)
    model = build_model(checkpoint, op=f"load_converted: {path}")
    return Conversion(model.to(device=device, dtype=dtype), checkpoint.reports)


def build_model(checkpoint: Checkpoint, op: str = "build_model") -> Any:
    """A model of transformers around the tensors of a checkpoint, which are not copied.

    Raises:
        ValueError: tensors are missing, left over or of the wrong shape, or the host is unknown.
    """
    config = _config_of(checkpoint.host_config, op)
    if config.num_hidden_layers != len(checkpoint.layers):
        raise ValueError(
            f"{op}: host has {config.num_hidden_layers} layers, expected {len(checkpoint.layers)}, "
            "one for each layer config"
        )
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        for index, layer in enumerate(decoder_layers(model)):
            if checkpoint.layers[index].hidden_size != config.hidden_size:
                raise ValueError(
                    f"{op}: layer {index} has hidden_size {checkpoint.layers[index].hidden_size}, "
                    f"expected {config.hidden_size} as the host has"
                )
            layer.self_attn = ConvertedAttention(config, checkpoint.layers[index], index)
    check_tensors(model, checkpoint.tensors, op)
    rotary = model.base_model.rotary_emb
    model.base_model.rotary_emb = type(rotary)(config)  # its buffers are not in any file
    model.load_state_dict(checkpoint.tensors, strict=False, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig.from_dict(checkpoint.generation_config)
    replace_attention(model)
    return model.eval()


def _config_of(values: dict[str, Any], op: str) -> Any:
    """The config object of transformers, built from plain values only."""
    model_type = values.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"{op}: host has model_type {model_type!r}, expected one of {list(MODEL_TYPES)}"
        )
    try:
        config = CONFIG_MAPPING[model_type].from_dict(values)
    except Exception as error:  # transformers validates with exceptions of several libraries
        fact = " ".join(str(error).split())
        raise ValueError(f"{op}: host config is not one of {model_type} ({fact})") from error
    check_host_config(config, op)
    return config


def _host_config(model: Any) -> dict[str, Any]:
    values: dict[str, Any] = model.config.to_dict()
    return {name: value for name, value in values.items() if name not in ("dtype", "auto_map")}


def stored_tensors(model: Any) -> dict[str, Tensor]:
    """Parameters by name, detached; of several names of one tensor the first only."""
    tied = {name for name, _ in model.named_parameters()}
    return {name: x.detach() for name, x in model.state_dict().items() if name in tied}


def check_tensors(model: Any, tensors: dict[str, Tensor], op: str) -> None:
    """Compare with the parameters that the model needs, tied ones counted once."""
    model.tie_weights()
    expected = stored_tensors(model)
    missing, extra = sorted(expected.keys() - tensors), sorted(tensors.keys() - expected)
    if missing or extra:
        raise ValueError(
            f"{op}: weights have {len(missing)} missing {missing[:3]} and {len(extra)} unknown "
            f"{extra[:3]} tensors, expected the {len(expected)} of the model"
        )
    for name, want in expected.items():
        if tensors[name].shape != want.shape:
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensors[name].shape)}, expected {tuple(want.shape)}"
            )
