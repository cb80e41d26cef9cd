"""The attention layers of a whole model: of a preset, of a transformers config, of a converted one.

Source of the layer counts: ``num_hidden_layers`` of each model's published ``config.json``. Of
Kimi-Linear's 27 layers the 7 in ``full_attn_layers`` are MLA; a layer of LongCat-Flash has two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mla.checks import UnsupportedError
from mla.config import MLAConfig
from mla.presets import PRESETS

NUM_LAYERS: dict[str, int] = {
    "deepseek-v2-lite": 27,
    "deepseek-v2": 60,
    "deepseek-v3": 61,
    "deepseek-r1": 61,
    "kimi-k2": 61,
    "mistral-small-4": 36,
    "minicpm3-4b": 62,
    "youtu-2b": 32,
    "glm-4.7-flash": 47,
    "glm-5": 78,
    "kimi-linear": 7,
    "longcat-flash": 56,
}


def preset_layers(name: str) -> tuple[MLAConfig, ...]:
    """One config for each MLA layer of a published model.

    Raises:
        UnsupportedError: there is no such preset; the message lists those that there are.
    """
    if name not in PRESETS:
        raise UnsupportedError(
            f"preset_layers: name has value {name!r}, expected one of {sorted(PRESETS)}"
        )
    return (MLAConfig.preset(name),) * NUM_LAYERS[name]


def config_layers(config: Any) -> tuple[MLAConfig, ...]:
    """One config for each MLA layer, layers of other kinds left out.

    Args:
        config: a transformers config object, the dict of its ``config.json``, or the dict that a
            converted model has there.

    Raises:
        UnsupportedError: the model has no MLA layer, or one that this package lacks; the reason
            is that of its last layer.
        ValueError: the config does not say how many layers there are.
    """

    def get(name: str) -> Any:
        return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)

    if get("layers") is not None:  # a converted model: sizes differ between layers
        return tuple(MLAConfig.from_dict(layer) for layer in get("layers"))
    if get("text_config") is not None:
        return config_layers(get("text_config"))
    count = get("num_hidden_layers")
    if count is None and get("num_layers") is not None:
        count = 2 * get("num_layers")  # LongCat-Flash
    if count is None:
        raise ValueError(
            "config_layers: config has no num_hidden_layers, expected the number of layers"
        )
    found, refusal = [], None
    for index in range(count):
        try:
            found.append(MLAConfig.from_hf(config, index))
        except UnsupportedError as error:
            refusal = error
    if not found:
        raise refusal or ValueError("config_layers: num_hidden_layers has value 0, expected more")
    return tuple(found)
