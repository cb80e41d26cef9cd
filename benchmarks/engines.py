"""Decode kernels of inference engines over our paged cache, where they are installed.

Each adaptor maps a `CacheView` and absorbed queries to the call that the engine itself makes, reads
our rows in place, and plans outside the timed call, as an engine plans once a step for all layers.
None of them is a dependency: what cannot be imported is left out with a line that says why. They
have been tested against modules that record the call, never on a GPU beside the originals.

    flash_mla     FlashMLA, pages of 64, 16 bits
    flashinfer    FlashInfer's paged MLA wrapper, its own choice of backend
    sglang        SGLang's Triton kernel, 8 splits at most, its default
    vllm          vLLM's Triton kernel, 4 splits, its default

Dims: B batch, L queries, H heads, P pages, Z positions in one page, M table width, C latent and R
rotated width, X key splits.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mla.view import CacheView

Decode = Callable[[], Tensor]  # one call; [B, L, H, C]

FLASH_MLA, FLASHINFER = "flash_mla", "flashinfer.mla"
SGLANG = "sglang.srt.layers.attention.triton_ops.decode_attention"
# The second is where releases before 0.13 have it.
VLLM_FOLDERS = ("v1.attention", "attention")
VLLM = tuple(f"vllm.{folder}.ops.triton_decode_attention" for folder in VLLM_FOLDERS)
WORKSPACE_BYTES = 128 << 20  # what FlashInfer's documentation asks for
SGLANG_SPLITS, VLLM_SPLITS = 8, 4


def flash_mla(q_latent: Tensor, q_rope: Tensor, view: CacheView, scale: float) -> Decode:
    """``flash_mla_with_kvcache``; both styles of metadata, a pair of tensors or an object.

    Source: deepseek-ai/FlashMLA, flash_mla/flash_mla_interface.py, from its first release on;
    versions that decode sparsely alone refuse this call.
    """
    module = importlib.import_module(FLASH_MLA)
    query = torch.cat([q_latent, q_rope], dim=-1)
    L, H = query.shape[1:3]
    metadata, num_splits = module.get_mla_metadata(view.lengths, L * H, 1)
    cache = view.rows.unsqueeze(2)  # [P, Z, 1, C+R]

    def run() -> Tensor:
        out: Tensor = module.flash_mla_with_kvcache(
            query,
            cache,
            view.page_table,
            view.lengths,
            view.C,
            metadata,
            num_splits,
            softmax_scale=scale,
            causal=True,
        )[0]
        return out

    return run


def flashinfer(q_latent: Tensor, q_rope: Tensor, view: CacheView, scale: float) -> Decode:
    """``BatchMLAPagedAttentionWrapper``, planned from indptr arrays.

    Source: flashinfer-ai/flashinfer, flashinfer/mla, releases 0.2 to 0.6; at commit 05ae7d6 the
    arrays still plan, with a warning.
    """
    module = importlib.import_module(FLASHINFER)
    B, L, H, C = q_latent.shape
    options: dict[str, Any] = {"dtype": torch.int32, "device": q_latent.device}
    indices, page_ends = _page_lists(view)
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=q_latent.device)
    wrapper = module.BatchMLAPagedAttentionWrapper(workspace, backend="auto")
    wrapper.plan(
        qo_indptr=L * torch.arange(B + 1, **options),
        kv_indptr=page_ends,
        kv_indices=indices,
        kv_len_arr=view.lengths,
        num_heads=H,
        head_dim_ckv=C,
        head_dim_kpe=view.R,
        page_size=view.rows.shape[1],
        causal=True,
        sm_scale=scale,
        q_data_type=q_latent.dtype,
        kv_data_type=view.rows.dtype,
    )
    latents, rotated = view.rows.split([C, view.R], dim=-1)
    tokens, ropes = q_latent.flatten(0, 1), q_rope.flatten(0, 1)  # [B*L, H, *]

    def run() -> Tensor:
        out: Tensor = wrapper.run(tokens, ropes, latents, rotated, return_lse=False)
        return out.view(B, L, H, C)

    return run


def sglang(q_latent: Tensor, q_rope: Tensor, view: CacheView, scale: float) -> Decode:
    """``decode_attention_fwd``: token indices, one query a row; scratch is kept between calls.

    Source: sgl-project/sglang at commit 03cd2ec; releases before 0.4.4 have other arguments.
    """
    module = importlib.import_module(SGLANG)
    query = torch.cat([q_latent, q_rope], dim=-1)[:, 0]  # [B, H, C+R]
    B, H, _ = query.shape
    indices, ends = _token_lists(view)
    options: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    parts = torch.empty(B, H, SGLANG_SPLITS, view.C, **options)
    part_lse = torch.empty(B, H, SGLANG_SPLITS, **options)
    num_splits = torch.full((B,), SGLANG_SPLITS, dtype=torch.int32, device=query.device)
    keys = view.rows.flatten(0, 1).unsqueeze(1)  # [P*Z, 1, C+R]
    out = query.new_empty(B, H, view.C)

    def run() -> Tensor:
        module.decode_attention_fwd(
            query,
            keys,
            keys[..., : view.C],
            out,
            ends,
            indices,
            parts,
            part_lse,
            num_splits,
            SGLANG_SPLITS,
            scale,
            1.0,  # scales of fp8 keys and values
            1.0,
        )
        return out.unsqueeze(1)

    return run


def vllm(q_latent: Tensor, q_rope: Tensor, view: CacheView, scale: float) -> Decode:
    """``decode_attention_fwd`` as its Triton MLA backend calls it; scratch is kept between calls.

    Source: vllm-project/vllm at commit 0155494; releases before 0.11 have no ``lse``.
    """
    module = importlib.import_module(_vllm_module())
    query = torch.cat([q_latent, q_rope], dim=-1)[:, 0]
    B, H, _ = query.shape
    parts = torch.empty(B, H, VLLM_SPLITS, view.C + 1, dtype=torch.float32, device=query.device)
    keys = view.rows.unsqueeze(2)  # [P, Z, 1, C+R]
    out = query.new_empty(B, H, view.C)
    arguments: dict[str, Any] = {
        "q": query,
        "k_buffer": keys,
        "v_buffer": keys[..., : view.C],
        "o": out,
        "req_to_token": view.page_table,
        "b_seq_len": view.lengths,
        "attn_logits": parts,
        "num_kv_splits": VLLM_SPLITS,
        "sm_scale": scale,
        "page_size": view.rows.shape[1],
    }
    if "lse" in inspect.signature(module.decode_attention_fwd).parameters:
        arguments["lse"] = query.new_empty(B, H)

    def run() -> Tensor:
        module.decode_attention_fwd(**arguments)
        return out.unsqueeze(1)

    return run


ADAPTORS: dict[str, Callable[[Tensor, Tensor, CacheView, float], Decode]] = {
    "flash_mla": flash_mla,
    "flashinfer": flashinfer,
    "sglang": sglang,
    "vllm": vllm,
}


def available() -> dict[str, str | None]:
    """Each engine with the reason why it cannot be imported here, or None. Imports nothing."""
    modules = {"flash_mla": FLASH_MLA, "flashinfer": FLASHINFER, "sglang": SGLANG}
    found = {name: _missing(module) for name, module in modules.items()}
    return {**found, "vllm": _missing(_vllm_module())}


def refusal(name: str, view: CacheView, L: int) -> str | None:
    """Why an engine does not take this case; None: it may.

    Args:
        name: of `ADAPTORS`.
        view: of one layer.
        L: queries of each row.
    """
    if view.codec.kind != "plain":
        return f"{view.codec.kind} rows are not attended densely"
    if view.page_table is None or view.starts is not None or view.shard != (0, 1):
        return "needs a paged cache, neither padded nor sharded"
    if view.rows.dtype not in (torch.bfloat16, torch.float16):
        return f"needs 16-bit rows, got {view.rows.dtype}"
    if name == "flash_mla" and (view.rows.shape[1] != 64 or (view.C, view.R) != (512, 64)):
        return "needs pages of 64 positions, C=512 and R=64"
    if name in ("sglang", "vllm") and L > 1:
        return "decodes one query a row"
    return None


def prepared(
    name: str, q_latent: Tensor, q_rope: Tensor, view: CacheView, scale: float
) -> tuple[Decode | None, str | None]:
    """The engine's call once it has worked, or why it has not: their checks are theirs."""
    try:
        run = ADAPTORS[name](q_latent, q_rope, view, scale)
        run()
    except Exception as error:  # of foreign code: asserts, compilers, drivers
        return None, f"{type(error).__name__}: {error}"
    return run, None


def _missing(module: str) -> str | None:
    """Parents are looked for first: `find_spec` would import them."""
    root = module.split(".", 1)[0]
    if importlib.util.find_spec(root) is None:
        return f"{root} is not installed"
    try:
        is_there = importlib.util.find_spec(module) is not None
    except Exception as error:  # a parent that cannot be imported here
        return f"{root} cannot be imported: {type(error).__name__}: {error}"
    return None if is_there else f"{root} has no {module}"


def _vllm_module() -> str:
    return next((name for name in VLLM if _missing(name) is None), VLLM[0])


def _page_lists(view: CacheView) -> tuple[Tensor, Tensor]:
    """Pages in use, row after row, and where each row's end: int32 ``[N]`` and ``[B+1]``."""
    assert view.page_table is not None
    Z, M = view.rows.shape[1], view.page_table.shape[1]
    counts = -(-view.lengths.long() // Z)
    is_used = torch.arange(M, device=counts.device) < counts[:, None]
    return view.page_table[is_used], _ends(counts)


def _token_lists(view: CacheView) -> tuple[Tensor, Tensor]:
    """Slots of the pool, row after row, int64 ``[N]``; where each row's end, int32 ``[B+1]``."""
    assert view.page_table is not None
    Z, M = view.rows.shape[1], view.page_table.shape[1]
    slots = torch.arange(Z, device=view.lengths.device)
    places = (view.page_table.long()[..., None] * Z + slots).flatten(1)  # [B, M*Z]
    is_used = torch.arange(M * Z, device=places.device) < view.lengths[:, None]
    return places[is_used], _ends(view.lengths.long())


def _ends(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
