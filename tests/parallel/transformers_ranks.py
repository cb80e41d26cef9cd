"""Models of transformers with sharded heads: stock and replaced layers, one process and ranks."""

from __future__ import annotations

from typing import Any

import hf_models
import torch.distributed as dist
from tensor_ranks import whole, whole_mesh
from torch import Tensor

from mla.integrations.transformers import replace_attention
from mla.parallel import shard_heads


def results(kinds: list[tuple[str, bool]], seed: int) -> list[dict[str, Any]]:
    return [result(kind, is_replaced, seed) for kind, is_replaced in kinds]


def result(kind: str, is_replaced: bool, seed: int) -> dict[str, Any]:
    """Loss, every gradient and greedy tokens of a model, its heads over the ranks if there are."""
    model: Any = hf_models.tiny_model(kind, seed=seed)
    if is_replaced:
        replace_attention(model)
    if dist.is_initialized():
        shard_heads(model, whole_mesh())
    ids = hf_models.tokens(2, 7, seed=seed)
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    found = {name: whole(x.grad) for name, x in model.named_parameters() if x.grad is not None}
    written = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    return {"loss": loss.item(), "written": written, "gradients": found}
