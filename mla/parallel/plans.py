"""Which part of an MLA layer is sharded how, as data.

    TP_PLAN             name of a submodule -> name of a style, for one layer
    head_plan(model)    full names, for every MLA layer of a model

The names of the styles are those of transformers, whose own styles of these names do the same.
There names have wildcards: ``{f"layers.*.self_attn.{part}": TP_PLAN[part] for part in TP_PLAN}``.

    sharded      rows of q_proj or q_b_proj and of kv_b_proj, columns of o_proj: H / ranks heads
    replicated   everything before them, so each rank has the whole latent, and caches it
    all-reduced  forward: the output of o_proj. Backward: the inputs of q_proj or q_b_proj and of
                 kv_b_proj, and the shared rotated key, which bypasses kv_b_proj. Without the last
                 each rank trains the R rotary rows of kv_a_proj_with_mqa for its own heads alone,
                 and nothing complains.

Dims: H heads, R rotated width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from mla.checks import UnsupportedError

TP_PLAN: Mapping[str, str] = {
    "q_proj": "colwise",
    "q_a_proj": "replicate",
    "q_a_layernorm": "replicate",
    "q_b_proj": "colwise",
    "kv_a_proj_with_mqa": "mla_kv_a_proj",
    "kv_a_layernorm": "replicate",
    "kv_b_proj": "colwise",
    "o_proj": "rowwise",
}
_REQUIRED = ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


def mla_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every MLA layer in ``model``, itself included, with its name: those with our submodules."""
    for name, module in model.named_modules():
        if all(isinstance(getattr(module, part, None), nn.Module) for part in _REQUIRED):
            yield name, module


def head_plan(model: nn.Module) -> dict[str, str]:
    """Full names of the submodules of every MLA layer in ``model``, with the names of their styles.

    Args:
        model: a `mla.MultiheadLatentAttention`, or a model with MLA layers inside, also those of
            transformers.

    Returns:
        A plan, empty where there is no such layer. Entries for other layers can be added.

    Raises:
        UnsupportedError: a layer has parameters outside the submodules of `TP_PLAN`.
    """
    plan = {}
    for layer_name, layer in mla_layers(model):
        for name, weight in layer.named_parameters():
            part = name.rpartition(".")[0]
            if part not in TP_PLAN:
                raise UnsupportedError(
                    f"head_plan: {layer_name or 'module'} has the parameter {name} of shape "
                    f"{tuple(weight.shape)}, expected those of {', '.join(TP_PLAN)} only; shard "
                    "before adapters are added, or after they are merged"
                )
            plan[f"{layer_name}.{part}" if layer_name else part] = TP_PLAN[part]
    return plan
