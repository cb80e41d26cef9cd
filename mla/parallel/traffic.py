"""Bytes that the collectives of a block of code move, counted as they are called.

    all-gather       (k-1) * n        n bytes that each rank gives
    reduce-scatter   (k-1) * n        n bytes that each rank keeps
    all-to-all       (k-1)/k * n      n bytes that each rank gives, in even parts
    all-reduce       2 (k-1)/k * n    n bytes that each rank has: a reduce-scatter, an all-gather
    broadcast        n                that each rank but the source gets; scatter likewise

Payload that one rank receives from the others (and sends to them) where no byte travels twice, the
least that any algorithm can do; what a backend adds is its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mla.checks import UnsupportedError

# Names of ops of c10d and _c10d_functional, without a last underscore -> kind of collective.
KINDS = {
    "_allgather_base": "all_gather",
    "allgather": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "broadcast": "broadcast",
    "scatter": "scatter",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
}
SILENT = {"barrier", "monitored_barrier", "wait_tensor", "_wrap_tensor_autograd"}
NAMESPACES = ("c10d", "_c10d_functional")


class TrafficCounter(TorchDispatchMode):
    """Counts while it is entered; `count_traffic` makes one.

    Attributes:
        calls: how often each kind of collective was called.
        bytes: payload of each kind that this rank received.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Bytes of all kinds together."""
        return sum(self.bytes.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(kind, _distributed_tensor()) for kind in types):
            return NotImplemented  # its collectives come here as ops on its parts
        if func.namespace in NAMESPACES:
            self._count(func, args)
        return func(*args, **(kwargs or {}))

    def _count(self, func: Any, args: tuple[Any, ...]) -> None:
        name = func._opname
        if name in SILENT:
            return
        kind = KINDS.get(name.removesuffix("_"))
        if kind is None:
            raise UnsupportedError(
                f"count_traffic: code has a call of {func}, expected one of {sorted(KINDS)}"
            )
        self.calls[kind] += 1
        self.bytes[kind] += _received(kind, func, args)


@contextmanager
def count_traffic() -> Iterator[TrafficCounter]:
    """Count collectives of this rank, functional ones and those of backward passes included.

        with count_traffic() as traffic:
            loss(model(x)).backward()
        print(traffic.total, traffic.calls)

    Inside compiled code nothing is seen.

    Raises:
        UnsupportedError: a collective that it does not know, before it runs.
    """
    with TrafficCounter() as traffic:
        yield traffic


def _distributed_tensor() -> type:
    from torch.distributed.tensor import DTensor

    return DTensor


def _received(kind: str, func: Any, args: tuple[Any, ...]) -> int:
    """Bytes of one call."""
    given, kept, size = _operands(kind, func, args)
    if kind == "all_gather":
        return (size - 1) * given
    if kind == "reduce_scatter":
        return (size - 1) * (given // size if kept is None else kept)
    if kind == "all_reduce":
        return 2 * (size - 1) * given // size
    if kind == "all_to_all":
        return (size - 1) * given // size
    return given if size > 1 else 0


def _operands(kind: str, func: Any, args: tuple[Any, ...]) -> tuple[int, int | None, int]:
    """Bytes of what goes in and, where it is an argument, of what comes out; size of the group."""
    if func.namespace == "_c10d_functional":
        at = [
            i for i, argument in enumerate(func._schema.arguments) if argument.name == "group_name"
        ]
        members = torch._C._distributed_c10d._resolve_process_group(args[at[0]])
        return _nbytes(args[:1]), None, members.size()
    boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
    members = dist.ProcessGroup.unbox(boxed)
    if kind in ("all_reduce", "broadcast", "scatter"):
        return _nbytes(args[:1]), None, members.size()
    return _nbytes(args[1:2]), _nbytes(args[:1]), members.size()  # outputs, then inputs


def _nbytes(tree: Iterable[Any]) -> int:
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))
