"""Where the kernels under test run: a GPU, or the CPU tensors of the interpreter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_device(tree: Any) -> Any:
    """A copy of a nested value, views of caches included, with every tensor on `DEVICE`."""
    return pytree.tree_map(lambda x: x.to(DEVICE, copy=True) if isinstance(x, Tensor) else x, tree)


def on_cpu(tree: Any) -> Any:
    return pytree.tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, tree)
