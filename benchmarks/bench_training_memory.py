"""What one layer keeps for the backward pass, and what forward and backward take.

Bytes are the storages that autograd saves during the forward pass, each counted once, without the
parameters; the input of the layer is among them in every implementation. ``peak_MiB`` is the most
that a second step holds at once beside the parameters and their gradients, which are there by then.

    transformers sdpa    its own layer; on a CPU its values are narrower than its keys, so PyTorch
                         takes the attention that keeps all scores
    plain PyTorch        K and V expanded, V padded to the width of K for the fused attention
    mla save=expanded    keeps the output of kv_b_proj, like usual training
    mla save=latent      the default: keys and values are expanded again in backward

Dims: L tokens in one sequence; sizes of DeepSeek-V2-Lite as in bench_layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from benchmarks import baselines
from benchmarks.bench_layer import CONFIG, stock_layer
from benchmarks.harness import Candidate, Point
from benchmarks.memory import with_peak
from benchmarks.report import Row
from benchmarks.sweep import Benchmark, Comparison, Options, main
from mla import MultiheadLatentAttention

IMPLS = ("transformers sdpa", "plain PyTorch", "mla save=expanded", "mla save=latent")


def points(quick: bool) -> list[Point]:
    return [{"L": L} for L in ((512,) if quick else (512, 2048))]


@lru_cache(maxsize=1)
def hidden_states(L: int) -> Tensor:
    drawn = torch.randn(1, L, CONFIG.hidden_size, generator=torch.Generator().manual_seed(L))
    return drawn.to(baselines.device()).requires_grad_()


@lru_cache(maxsize=1)
def our_layer() -> MultiheadLatentAttention:
    torch.manual_seed(0)
    return MultiheadLatentAttention(CONFIG, device=baselines.device())


def forward_of(impl: str, L: int) -> Callable[[Tensor], Tensor]:
    layer = our_layer()
    if impl == "plain PyTorch":
        return lambda x: plain_forward(layer, x)
    if impl == "transformers sdpa":
        module, rotary = stock_layer(layer, "sdpa")
        x = hidden_states(L)
        table = rotary.to(x.device)(x, torch.arange(L, device=x.device)[None])
        return lambda x: module(x, position_embeddings=table)[0]
    with torch.device("meta"):
        ours = MultiheadLatentAttention(
            CONFIG, save="latent" if impl.endswith("latent") else "expanded"
        )
    ours.load_state_dict(layer.state_dict(), assign=True)
    return ours


def plain_forward(layer: MultiheadLatentAttention, x: Tensor) -> Tensor:
    """The layer as one would write it: expand K and V, call the fused attention."""
    H, N = CONFIG.num_attention_heads, CONFIG.qk_nope_head_dim
    R, V = CONFIG.qk_rope_head_dim, CONFIG.v_head_dim
    positions = torch.arange(x.shape[1], device=x.device)
    query = layer.queries(x, positions)
    latent, k_rope = layer.latents(x, positions)
    k_nope, values = layer.kv_b_proj(latent).unflatten(-1, (H, N + V)).split([N, V], dim=-1)
    keys = torch.cat([k_nope, k_rope[:, :, None].expand(-1, -1, H, -1)], dim=-1)
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        keys.transpose(1, 2),
        F.pad(values, (0, N + R - V)).transpose(1, 2),
        is_causal=True,
        scale=CONFIG.scale,
    )
    output: Tensor = layer.o_proj(out[..., :V].transpose(1, 2).flatten(2))
    return output


def saved_bytes(forward: Callable[[Tensor], Tensor], x: Tensor, without: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps after ``forward(x)``."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward(x)  # alive until the end: freed addresses would be counted twice
    ignored = {tensor.untyped_storage().data_ptr() for tensor in without}
    del output
    return sum(size for address, size in storages.items() if address not in ignored)


def setup(point: Point, impl: str) -> Candidate:
    L = int(point["L"])
    forward, x = forward_of(impl, L), hidden_states(L)
    parameters = list(forward.parameters() if isinstance(forward, nn.Module) else [])

    def run() -> Tensor:
        forward(x).square().mean().backward()
        assert x.grad is not None
        return x.grad

    def after() -> None:
        x.grad = None
        for parameter in (*parameters, *our_layer().parameters()):
            parameter.grad = None

    return Candidate(run=run, after=after)


COMPARISON = Comparison(impls=IMPLS, setup=setup)


def rows_at(point: Point, options: Options, on_round: Callable[[], None]) -> list[Row]:
    L = int(point["L"])
    rows: list[Row] = []
    for row in COMPARISON.rows_at(point, options, on_round):
        forward = forward_of(str(row["impl"]), L)
        kept = saved_bytes(forward, hidden_states(L), our_layer().parameters())
        new = baselines.placed({**row, "saved_KiB_per_token": kept / 1024 / L})
        step = setup(point, str(row["impl"]))
        rows.append(with_peak(new, step.run))
        step.after()
    return rows


BENCHMARK = Benchmark(
    name="training_memory",
    title="One DeepSeek-V2-Lite layer in training: forward and backward, float32",
    points=points,
    rows_at=rows_at,
    hidden=("bytes", "flops", "rounds"),
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
