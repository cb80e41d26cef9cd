"""What ours is timed against: MLA decode in plain PyTorch, each form as good as it gets.

Absorbed, over the same latents that ours reads:

    bmm             scores and values as two batched products over the rows
    einsum          the same as einsum, softmax in float32
    sdpa rows       heads as query rows of one key head, values padded to the key width
    flex rows       the same through FlexAttention, compiled, values as they are

Over keys and values of every head:

    decompressed    expanded from the latents at each step, then SDPA, as transformers decodes
    kept heads      expanded once and cached, (N+R) + V numbers a token and head, then SDPA
    flex heads      the same through FlexAttention, compiled

On a CPU values are padded to the width of keys for SDPA: its fused attention refuses others, and
the one that PyTorch takes then is up to four times slower (4096 keys, 16 heads). All forms read
dense, plain rows, whatever ours reads at that point; rows that ours reads coded are given to them
decoded, so that all compute the same attention.

Dims: B batch, L queries, H heads, S cached positions, C=512, R=64, N=V=128.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import flex
from benchmarks.harness import Point, gate
from benchmarks.notes import skipped
from benchmarks.report import Row
from mla import reference
from mla.codec import Codec, PlainCodec, rotate_latent
from mla.ops import supported_impls
from mla.ops.select import OpName

C, R, N, V = 512, 64, 128, 128
SCALE = (N + R) ** -0.5
MAX_EXPANDED = 1 << 28  # numbers of expanded keys and values; beyond, gigabytes and seconds


class Inputs(NamedTuple):
    """Queries that are the absorbed ones of some expanded queries, so that all forms agree."""

    q_latent: Tensor  # [B, L, H, C]
    q_rope: Tensor  # [B, L, H, R]
    rows: Tensor  # [B, S, C+R], what the stored rows hold
    lengths: Tensor  # [B] int32, all S
    q_nope: Tensor  # [B, L, H, N]
    kv_b: Tensor  # [H*(N+V), C]
    stored: Tensor  # [B, S, W] as the codec stores them

    @property
    def mask(self) -> Tensor | None:
        """``[L, S]``, which keys a query sees; None where that is all of them."""
        L, S = self.q_latent.shape[1], self.rows.shape[1]
        if L == 1:
            return None
        device = self.rows.device
        last = S - L + torch.arange(L, device=device)
        return torch.arange(S, device=device) <= last[:, None]


Form = Callable[[Inputs], Callable[[], Tensor]]  # what may be prepared is; the rest is timed


def device() -> torch.device:
    """Where benchmarks run: on the accelerator, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def draw(
    dtype: torch.dtype, *, B: int, H: int, S: int, L: int = 1, codec: Codec | None = None
) -> Inputs:
    """Random inputs on `device`, the same for the same sizes."""
    codec = codec or PlainCodec()
    rng = torch.Generator().manual_seed(S)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    kv_b = drawn(H * (N + V), C) * C**-0.5
    q_nope = drawn(B, L, H, N)
    q_latent = torch.einsum("blhn,hnc->blhc", q_nope, kv_b.view(H, N + V, C)[:, :N])
    q_rope, rows = drawn(B, L, H, R), drawn(B, S, C + R)
    q_latent, q_rope, rows, q_nope, kv_b = (
        x.to(device=device(), dtype=dtype) for x in (q_latent, q_rope, rows, q_nope, kv_b)
    )
    stored = codec.encode(*rows.split([C, R], dim=-1))
    if codec.kind != "plain":
        rows = decoded(stored, codec, dtype)
    lengths = torch.full((B,), S, dtype=torch.int32, device=device())
    return Inputs(q_latent, q_rope, rows, lengths, q_nope, kv_b, stored)


def decoded(stored: Tensor, codec: Codec, dtype: torch.dtype) -> Tensor:
    """``[..., C+R]`` that coded rows stand for."""
    rows = codec.decode(stored, C, R, dtype)
    if not codec.rotation:
        return rows
    return torch.cat([rotate_latent(rows[..., :C]), rows[..., C:]], dim=-1)


def expected(x: Inputs, *, most: int = 4096) -> Tensor | None:
    """``[B, L, H, C]`` of the oracle in float64; None above ``most`` rows, which take long."""
    if x.rows.shape[0] * x.rows.shape[1] > most:
        return None
    latent, k_rope = x.rows.double().split([C, R], dim=-1)
    queries = (x.q_latent.double(), x.q_rope.double())
    out: Tensor = reference.absorbed_attention(*queries, latent, k_rope, x.lengths, scale=SCALE).out
    return out


def bmm(x: Inputs) -> Callable[[], Tensor]:
    B, L, H, _ = x.q_latent.shape
    query, mask = _query(x), x.mask

    def run() -> Tensor:
        scores = torch.bmm(query, x.rows.transpose(1, 2)).float().mul_(SCALE)
        if mask is not None:
            scores.view(B, L, H, -1).masked_fill_(~mask[:, None], float("-inf"))
        out = torch.bmm(scores.softmax(-1).to(query.dtype), x.rows)[..., :C]
        return out.view(B, L, H, C)

    return run


def einsum(x: Inputs) -> Callable[[], Tensor]:
    latent, k_rope = x.rows.split([C, R], dim=-1)
    mask = x.mask

    def run() -> Tensor:
        scores = torch.einsum("blhc,bsc->blhs", x.q_latent, latent)
        scores = scores + torch.einsum("blhr,bsr->blhs", x.q_rope, k_rope)
        scores = SCALE * scores.float()
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], float("-inf"))
        return torch.einsum("blhs,bsc->blhc", scores.softmax(-1).to(latent.dtype), latent)

    return run


def sdpa_rows(x: Inputs) -> Callable[[], Tensor]:
    B, L, H, _ = x.q_latent.shape
    query, keys, mask = _query(x)[:, None], x.rows[:, None], x.mask
    if mask is not None:
        mask = mask.repeat_interleave(H, dim=0)

    def run() -> Tensor:
        out = F.scaled_dot_product_attention(query, keys, keys, attn_mask=mask, scale=SCALE)
        return out[:, 0, :, :C].view(B, L, H, C)

    return run


def flex_rows(x: Inputs) -> Callable[[], Tensor]:
    B, L, H, _ = x.q_latent.shape
    keys = x.rows[:, None]
    attend = flex.attention(_query(x)[:, None], keys, keys[..., :C], scale=SCALE, group=H)
    return lambda: attend()[:, 0].view(B, L, H, C)


def decompressed(x: Inputs) -> Callable[[], Tensor]:
    query, mask = _head_query(x), x.mask

    def run() -> Tensor:
        return _heads(query, *_expand(x), mask)

    return run


def kept_heads(x: Inputs) -> Callable[[], Tensor]:
    query, mask = _head_query(x), x.mask
    keys, values = (part.contiguous() for part in _expand(x))
    return lambda: _heads(query, keys, values, mask)


def flex_heads(x: Inputs) -> Callable[[], Tensor]:
    keys, values = _expand(x)
    values = values[..., :V].contiguous()
    attend = flex.attention(_head_query(x), keys.contiguous(), values, scale=SCALE)
    return lambda: attend().transpose(1, 2)


def _query(x: Inputs) -> Tensor:
    """``[B, L*H, C+R]``."""
    return torch.cat([x.q_latent, x.q_rope], dim=-1).flatten(1, 2)


def _head_query(x: Inputs) -> Tensor:
    """``[B, H, L, N+R]``."""
    return torch.cat([x.q_nope, x.q_rope], dim=-1).transpose(1, 2)


def _expand(x: Inputs) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, H, S, *]``, values as wide as keys where SDPA wants that."""
    latent, k_rope = x.rows.split([C, R], dim=-1)
    H = x.q_nope.shape[2]
    expanded = F.linear(latent, x.kv_b).unflatten(-1, (H, N + V)).transpose(1, 2)
    keys, values = expanded.split([N, V], dim=-1)
    keys = torch.cat([keys, k_rope[:, None].expand(-1, H, -1, -1)], dim=-1)
    return keys, F.pad(values, (0, N + R - V)) if x.rows.is_cpu else values


def _heads(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """``[B, L, H, V]``."""
    out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=SCALE)
    return out[..., :V].transpose(1, 2)


PLAIN: dict[str, Form] = {"bmm": bmm, "einsum": einsum, "sdpa rows": sdpa_rows}
HEADS: dict[str, Form] = {"decompressed": decompressed, "kept heads": kept_heads}
FLEX: dict[str, Form] = {"flex rows": flex_rows, "flex heads": flex_heads}
IN_HEAD_SPACE = (*HEADS, "flex heads")  # their result is [B, L, H, V]


def forms(x: Inputs, names: tuple[str, ...], *, bench: str) -> dict[str, Callable[[], Tensor]]:
    """The forms that run here, prepared; a line for each of the others says why it does not."""
    B, _, H, _ = x.q_latent.shape
    found: dict[str, Callable[[], Tensor]] = {}
    for name, form in {**PLAIN, **HEADS, **FLEX}.items():
        if name not in names:
            continue
        if name in IN_HEAD_SPACE and B * H * x.rows.shape[1] * (N + V) > MAX_EXPANDED:
            skipped(bench, name, f"H={H} B={B} S={x.rows.shape[1]} has too many keys to expand")
            continue
        reason = flex.reason_absent() if name in FLEX else None
        run = torch.no_grad()(form(x)) if reason is None else None
        if run is not None and name in FLEX:
            reason = flex.refusal(run)
        if run is None or reason is not None:
            skipped(bench, name, reason or "it cannot run")
            continue
        found[name] = run
    return found


def check_heads(
    x: Inputs, runs: Mapping[str, Callable[[], Tensor]], *, tolerance: float, point: Point
) -> None:
    """Hold the forms in head space against the oracle, or against the absorbed ``bmm``.

    Raises:
        GateError: naming the form.
    """
    results = {name: run() for name, run in runs.items() if name in IN_HEAD_SPACE}
    if not results:
        return
    truth = expected(x)
    latent = bmm(x)().double() if truth is None else truth
    w_uv = x.kv_b.double().unflatten(0, (-1, N + V))[:, N:]
    heads = torch.einsum("blhc,hvc->blhv", latent, w_uv)
    gate(results, expected=heads, tolerance=tolerance, point=point)


def placed(row: Row) -> dict[str, Any]:
    """The row with the kind of device that its limit is that of."""
    return {**row, "device": device().type}


def clock(row: Row) -> float | None:
    """Milliseconds by the clock that load moves least, None where a row has none."""
    found = row.get("cpu_ms" if device().type == "cpu" else "median_ms")
    return None if found is None else float(found)


@cache
def ours_here(op: OpName, dtype: torch.dtype, kind: str = "plain") -> tuple[str, ...]:
    """Implementations of an op that run here, the fastest last."""
    found = supported_impls(op, device=device(), dtype=dtype, codec=kind)
    return tuple(impl for impl, reason in found if reason is None)[::-1]
