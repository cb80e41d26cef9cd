"""Grouped-query models of transformers converted to multi-head latent attention.

    from mla.integrations.converted import convert_model, load_converted, save_converted

    conversion = convert_model(model, windows, kv_budget=0.75)
    save_converted(conversion, "converted", tokenizer=tokenizer)
    model = load_converted("converted").model
    model.generate(...)                       # decodes absorbed, from a latent cache

Files:

    hosts.py      which models, and what is read from them
    stream.py     calibration text on its way through a model, one layer at a time
    calibrate.py  what is measured of every layer meanwhile
    layer.py      a converted layer under transformers' calling convention
    model.py      convert, build, save, load
    refit.py      output projections fitted to the original's outputs
    coded.py      the quality of 8- and 4-bit rows
    deepseek.py   a converted model as a stock `DeepseekV3ForCausalLM`
    heal.py       a short distillation of the converted attention; heal_*.py are its parts
"""

from mla.integrations.converted.calibrate import Progress, calibrate, survey_model
from mla.integrations.converted.coded import coded_rows, through_codec
from mla.integrations.converted.deepseek import (
    ExportCheck,
    check_export,
    convert_to_deepseek_v3,
    export_deepseek_v3,
    to_deepseek_v3,
)
from mla.integrations.converted.heal import HealOptions, HealReport, heal
from mla.integrations.converted.hosts import HostAttention, read_host
from mla.integrations.converted.layer import ConvertedAttention
from mla.integrations.converted.model import (
    Conversion,
    build_model,
    convert_model,
    load_converted,
    save_converted,
)
from mla.integrations.converted.refit import refit_model

__all__ = [
    "Conversion",
    "ConvertedAttention",
    "ExportCheck",
    "HealOptions",
    "HealReport",
    "HostAttention",
    "Progress",
    "build_model",
    "calibrate",
    "check_export",
    "coded_rows",
    "convert_model",
    "convert_to_deepseek_v3",
    "export_deepseek_v3",
    "heal",
    "load_converted",
    "read_host",
    "refit_model",
    "save_converted",
    "survey_model",
    "through_codec",
    "to_deepseek_v3",
]
