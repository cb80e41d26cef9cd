"""How DTensor may shard the tensors of our ops.

    heads   queries and outputs by H, weights of the heads with them; the cache or latents whole
    batch   what has a row for each sequence; pools of pages and weights whole

Registered when `mla.parallel` is imported, for ``mla_decode``, ``mla_prefill`` with its backward
pass, ``mla_gather`` and ``merge_partials``. Other placements (partial sums, a cut sequence or
width) are redistributed to one of these, as DTensor does for its own ops: queries cut along the
sequence are gathered. Heads are sharded only where the ranks divide them. The ops that write into a
cache have no rule, so DTensor refuses them: a redistributed copy of the rows would take the write.

Within one call all tensors are DTensors; the context
``torch.distributed.tensor.experimental.implicit_replication()`` lets plain ones pass as replicated.

Dims: B batch, L queries, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

import mla.ops  # noqa: F401 - defines the ops

# For one dim of the mesh: placements of the outputs, then of the arguments, None for no tensor.
Rule = tuple[list[Placement], list[Placement | None]]

WHOLE, ROWS, HEADS = Replicate(), Shard(0), Shard(2)  # of [B, ..] and of [B, L, H, ..]
_DECODE_LENGTHS = 13  # query_lengths, behind q_latent, q_rope and the view


def _rule(
    arguments: Sequence[Any], outputs: Sequence[Placement], inputs: Mapping[int, Placement]
) -> Rule:
    """Arguments that ``inputs`` does not name are whole."""
    placements = [
        inputs.get(index, WHOLE) if _is_tensor(argument) else None
        for index, argument in enumerate(arguments)
    ]
    return list(outputs), placements


def _is_tensor(argument: Any) -> bool:
    return hasattr(argument, "placements")


def _can_shard_heads(query: Any) -> bool:
    """Whether the ranks that do not share out the batch divide H."""
    sizes = zip(query.mesh.shape, query.placements, strict=True)
    return query.shape[2] % prod(size for size, cut in sizes if not cut.is_shard(0)) == 0


def _view_rows(first: int, view: Sequence[Any]) -> dict[int, Placement]:
    """Tensors of a flattened view with a row for each sequence, which a pool of pages has not."""
    is_dense = view[1] is None
    return {first + index: ROWS for index in range(4) if index > 0 or is_dense}


def _decode(*arguments: Any) -> list[Rule]:
    batch = {0: ROWS, 1: ROWS, _DECODE_LENGTHS: ROWS} | _view_rows(2, arguments[2:])
    rules = [_rule(arguments, [WHOLE] * 2, {}), _rule(arguments, [ROWS] * 2, batch)]
    if _can_shard_heads(arguments[0]):
        rules.append(_rule(arguments, [HEADS] * 2, {0: HEADS, 1: HEADS}))
    return rules


def _gather(*arguments: Any) -> list[Rule]:
    batch = _view_rows(0, arguments)
    return [_rule(arguments, [WHOLE] * 2, {}), _rule(arguments, [ROWS] * 2, batch)]


def _prefill(*arguments: Any) -> list[Rule]:
    query, starts, lengths, is_packed = 0, 6, 7, arguments[8] is not None
    save_expanded = arguments[13]  # otherwise the third output is empty
    rules = [_rule(arguments, [WHOLE] * 3, {})]
    if not is_packed:
        outputs = [ROWS, ROWS, ROWS if save_expanded else WHOLE]
        batch = {query: ROWS, 1: ROWS, 2: ROWS, starts: ROWS, lengths: ROWS}
        rules.append(_rule(arguments, outputs, batch))
    if _can_shard_heads(arguments[query]):
        outputs = [HEADS, HEADS, HEADS if save_expanded else WHOLE]
        rules.append(_rule(arguments, outputs, {query: HEADS, 3: ROWS}))
    return rules


def _prefill_backward(*arguments: Any) -> list[Rule]:
    """Latents and keys get a part of their gradient from each head, the weight from each row."""
    expanded, starts, lengths, is_packed = 8, 11, 12, arguments[13] is not None
    has_expanded = len(arguments[expanded].shape) == 4
    rules = [_rule(arguments, [WHOLE] * 4, {})]
    if not is_packed:
        batch = dict.fromkeys((0, 1, 2, 3, 4, 6, 7, starts, lengths), ROWS)
        batch |= {expanded: ROWS} if has_expanded else {}
        rules.append(_rule(arguments, [ROWS, ROWS, ROWS, Partial()], batch))
    if _can_shard_heads(arguments[2]):
        heads = dict.fromkeys((0, 1, 2, 6, 7), HEADS) | {5: ROWS}
        heads |= {expanded: HEADS} if has_expanded else {}
        rules.append(_rule(arguments, [HEADS, Partial(), Partial(), ROWS], heads))
    return rules


def _merge(*arguments: Any) -> list[Rule]:
    """Every dim of lse but the parts."""
    rules = [_rule(arguments, [WHOLE] * 2, {})]
    for dim in range(1, len(arguments[1].shape)):
        cut = Shard(dim)
        rules.append(_rule(arguments, [Shard(dim - 1)] * 2, {0: cut, 1: cut}))
    return rules


_RULES: Mapping[str, Callable[..., list[Rule]]] = {
    "decode": _decode,
    "gather": _gather,
    "prefill": _prefill,
    "prefill_backward": _prefill_backward,
    "merge_partials": _merge,
}

for _name, _function in _RULES.items():
    register_sharding(getattr(torch.ops.mla, _name).default)(_function)
