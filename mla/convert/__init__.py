"""Convert grouped-query attention to multi-head latent attention, without training.

    weights, second moments of a layer's inputs -> gqa_to_mla -> config, state_dict, fit report

Files, in the order of the method:

    weights.py     the layer as affine maps; checks
    statistics.py  what is measured about the inputs, summed while the model runs
    complexes.py   RoPE pairs as complex numbers
    rotate.py      complex principal components of the keys, frequency by frequency
    choose.py      which of them stay rotated; how a budget is split
    latent.py      one latent for the unrotated keys and the values
    gqa.py         all of it: `gqa_to_mla`
    allocate.py    a budget shared among layers by measured errors
    refit.py       output projections fitted to the original's outputs
    survey.py      what was learnt about the layers, in memory or in a folder
    published.py   a method from the literature, to compare with
    deepseek.py    one layout for all layers: that of DeepSeek-V3
    evaluate.py    perplexity over windows, and its change with a standard error
    checkpoint.py  converted models as folders

Whole models of transformers are converted by `mla.integrations.converted`.
"""

from mla.convert.evaluate import Comparison, compare_losses, token_losses, token_windows
from mla.convert.gqa import ConvertedLayer, FitReport, gqa_to_mla
from mla.convert.statistics import InputMoments, MomentSum, attention_received
from mla.convert.weights import AttentionWeights

__all__ = [
    "AttentionWeights",
    "Comparison",
    "ConvertedLayer",
    "FitReport",
    "InputMoments",
    "MomentSum",
    "attention_received",
    "compare_losses",
    "gqa_to_mla",
    "token_losses",
    "token_windows",
]
