"""Generate with one model on several processes, and compare with one process.

    torchrun --nproc-per-node 2 examples/generate_parallel.py --tensor-parallel 2
    torchrun --nproc-per-node 2 examples/generate_parallel.py --context-parallel 2
    torchrun --nproc-per-node 4 examples/generate_parallel.py --tensor-parallel 2 \
        --context-parallel 2

Tensor parallelism shares the heads of every layer, context parallelism the cached tokens: each
process keeps every k-th page. The model is that of tiny_model.py with drawn weights, in float64, so
that the order of sums decides about no token. On the CPU processes talk through gloo, on CUDA
devices (one for each process) through NCCL. The exit status is 1 if a token differs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from tiny_model import ModelConfig, TinyModel
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional as F

from mla import PagedLatentCache
from mla.cache import PagedBatch
from mla.parallel import (
    count_traffic,
    gather_sequence,
    shard_context,
    shard_heads,
    shard_of,
    shard_sequence,
)

CONFIG = ModelConfig(
    attention="mla",
    hidden_size=128,
    num_layers=3,
    num_heads=8,
    head_dim=16,
    kv_lora_rank=32,
    rope_dim=16,
)
PROMPT = "Each process keeps some of the heads, or every other page of what was said before. "
PAGE_SIZE = 16


def tiny_model(seed: int, device: torch.device) -> TinyModel:
    """The same weights on every process, so large that attention decides about the next token."""
    torch.manual_seed(seed)
    model = TinyModel(CONFIG).to(device, torch.float64).eval()
    with torch.no_grad():
        for weight in model.blocks.parameters():
            weight.mul_(8 if weight.ndim == 2 else 1)
    return model


def new_cache(shard: tuple[int, int], length: int, device: torch.device) -> PagedBatch:
    """One sequence of up to ``length`` tokens, of which this process keeps its pages."""
    pool = PagedLatentCache(
        CONFIG.latent,
        num_pages=-(-length // (PAGE_SIZE * shard[1])),
        page_size=PAGE_SIZE,
        shard=shard,
        num_layers=CONFIG.num_layers,
        device=device,
        dtype=torch.float64,
    )
    return pool.batch([pool.allocate()])


def hidden_states(model: TinyModel, tokens: Tensor, cache: PagedBatch) -> Tensor:
    """``[1, L, D]`` of ``tokens [1, L]``, which are reserved in the cache already."""
    x: Tensor = model.embedding(tokens)
    for block in model.blocks:
        x = block(x, cache)
    output: Tensor = model.norm(x)
    return output


def best(model: TinyModel, hidden: Tensor) -> Tensor:
    """The likeliest byte after the last of ``hidden [1, L, D]``, ``[1]``."""
    return F.linear(hidden[0, -1:], model.embedding.weight).argmax(-1)


@torch.no_grad()
def generate_alone(model: TinyModel, prompt: Tensor, num_tokens: int) -> Tensor:
    """``num_tokens`` bytes after ``prompt [L]``, on one process."""
    cache = new_cache((0, 1), len(prompt) + num_tokens, prompt.device)
    new = prompt
    written = []
    for _ in range(num_tokens):
        cache.reserve(len(new))
        new = best(model, hidden_states(model, new[None], cache))
        written.append(new)
    return torch.cat(written)


@torch.no_grad()
def generate(
    model: TinyModel, prompt: Tensor, num_tokens: int, mesh: DeviceMesh
) -> tuple[Tensor, PagedBatch]:
    """The same with a model cut over ``mesh``, and the cache that this process has then."""
    group = mesh["cp"]
    cache = new_cache(shard_of(group), len(prompt) + num_tokens, prompt.device)
    cache.reserve([len(prompt)])  # a list: the shards may be padded beyond it
    part = hidden_states(model, shard_sequence(prompt[None], shard_of(group)), cache)
    new = best(model, gather_sequence(part, group)[:, : len(prompt)])
    written = [new]
    for _ in range(num_tokens - 1):  # every process has the last token, and computes the next one
        cache.reserve(1)
        new = best(model, hidden_states(model, new[None], cache))
        written.append(new)
    return torch.cat(written), cache


def run(arguments: argparse.Namespace) -> bool:
    """Generate both ways and print; whether all processes have the tokens of one."""
    sizes = (arguments.context_parallel, arguments.tensor_parallel)
    device = _device()
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("cp", "tp"))
    prompt = torch.tensor(list(arguments.prompt.encode()), device=device)
    expected = generate_alone(tiny_model(arguments.seed, device), prompt, arguments.tokens)
    model = tiny_model(arguments.seed, device)
    if mesh["tp"].size() > 1:
        shard_heads(model, mesh["tp"])
    shard_context(model, mesh["cp"])
    with count_traffic() as traffic:
        written, cache = generate(model, prompt, arguments.tokens, mesh)
    differing = (written != expected).sum()
    dist.all_reduce(differing)
    if dist.get_rank() == 0:
        print(f"one process:   {expected.tolist()}")
        print(f"all of them:   {written.tolist()}")
        print(f"cache of a process: {cache.pool.nbytes} bytes, {cache.pool.num_pages} pages")
        print(f"received by a process: {dict(traffic.bytes)} bytes, {dict(traffic.calls)} calls")
    return int(differing) == 0


def _device() -> torch.device:
    """One CUDA device for each process of this machine, or the CPU."""
    rank, count = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.device_count() < count:
        return torch.device("cpu")
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tensor-parallel", type=int, default=1, help="processes sharing heads")
    parser.add_argument("--context-parallel", type=int, default=1, help="processes sharing context")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--tokens", type=int, default=24, help="bytes to generate")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    arguments = parser.parse_args(argv)
    needed = arguments.tensor_parallel * arguments.context_parallel
    if int(os.environ.get("WORLD_SIZE", "0")) != needed:
        raise ValueError(
            f"{os.environ.get('WORLD_SIZE', 'no')} processes, expected {needed}; start it with "
            f"torchrun --nproc-per-node {needed}"
        )
    if arguments.tokens < 1 or not arguments.prompt:
        raise ValueError("--tokens and --prompt: expected at least one token of each")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        arguments = _arguments(argv)
        is_same = run(arguments)
    except ValueError as error:
        if is_first:
            print(f"generate_parallel: failed: {error}", file=sys.stderr)
        return 1
    if is_first:
        verdict = "the tokens of one process" if is_same else "failed: tokens differ"
        print(
            f"generate_parallel: {verdict} ({arguments.tokens} tokens, tensor parallel "
            f"{arguments.tensor_parallel}, context parallel {arguments.context_parallel})"
        )
    dist.destroy_process_group()
    return 0 if is_same else 1


if __name__ == "__main__":
    raise SystemExit(main())
