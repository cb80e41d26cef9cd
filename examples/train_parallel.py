"""Train the small language model on several processes, then let it write.

    torchrun --nproc-per-node 2 examples/train_parallel.py --quick --tp 2       heads sharded
    torchrun --nproc-per-node 2 examples/train_parallel.py --quick --tp 1       FSDP2
    torchrun --nproc-per-node 4 examples/train_parallel.py --quick --tp 2       both, 2 x 2

`--check` trains the same model on one process as well, both in float64, and fails where losses or
the text that is written differ. Here the processes are those of one CPU; the calls are the same on
GPUs.

    tensor parallel   attention by `mla.parallel.shard_heads`, the MLP by the same plan; each rank
                      has all tokens, all latents and a cache of its own
    FSDP2             each data-parallel rank has a part of every parameter and of the batch
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from tiny_model import ModelConfig, TinyModel, generate
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from train_tiny import (
    QUICK,
    QUICK_SIZES,
    ROOT,
    Settings,
    batch,
    learning_rate_factor,
    loss_of,
    read_text,
    readable,
)

from mla.parallel import head_plan, parallel_styles


def parallelize(
    model: TinyModel, mesh: DeviceMesh, *, recompute: bool = False, backend: str | None = None
) -> TinyModel:
    """``model`` cut over ``mesh``, of the dims dp and tp, changed in place.

    Args:
        recompute: keep the inputs of the blocks only, and compute the rest again for the gradient.
        backend: of `torch.compile`, for every block; None: eager.
    """
    if mesh["tp"].size() > 1:
        plan = head_plan(model)
        for index, block in enumerate(model.blocks):
            if block.mlp[0].out_features % mesh["tp"].size():
                continue  # whole on every rank
            plan |= {f"blocks.{index}.mlp.0": "colwise", f"blocks.{index}.mlp.2": "rowwise"}
        parallelize_module(model, mesh["tp"], parallel_styles(model, plan))
    for index, block in enumerate(model.blocks):
        if recompute:
            model.blocks[index] = checkpoint_wrapper(block)
        if backend is not None:
            model.blocks[index].compile(backend=backend)
    if mesh["dp"].size() > 1:
        for block in model.blocks:
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    return model


def train(
    model: TinyModel, text: Tensor, settings: Settings, mesh: DeviceMesh | None = None
) -> list[float]:
    """Losses of all steps, the means over the whole batch; AdamW as in train_tiny.py."""
    ranks = 1 if mesh is None else mesh["dp"].size()
    rank = 0 if mesh is None else mesh["dp"].get_local_rank()
    parameters = list(model.parameters())
    # Lists of tensors are not taken together: some are DTensors, and those of several meshes.
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, foreach=False
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, settings.steps)
    )
    generator = torch.Generator().manual_seed(settings.seed)
    losses = []
    for _ in range(settings.steps):
        inputs, targets = (
            x.chunk(ranks)[rank] for x in batch(text, settings, generator)
        )  # the same batch on all ranks, of which each takes its rows
        loss = loss_of(model, inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        clip_gradients(parameters, 1.0)
        optimizer.step()
        schedule.step()
        mean = loss.detach() / ranks
        if mesh is not None:
            dist.all_reduce(mean, group=mesh["dp"].get_group())
        losses.append(mean.item())
    return losses


def clip_gradients(parameters: Iterable[Tensor], largest: float) -> None:
    """`clip_grad_norm_` for plain tensors and DTensors of several meshes together."""
    groups: dict[DeviceMesh | None, list[Tensor]] = {}
    for weight in parameters:
        groups.setdefault(getattr(weight.grad, "device_mesh", None), []).append(weight)
    norms = [get_total_norm([weight.grad for weight in group]) for group in groups.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack(whole))
    for group in groups.values():
        clip_grads_with_norm_(group, largest, total)


def new_model(settings: Settings, sizes: dict[str, int]) -> TinyModel:
    torch.manual_seed(settings.seed)
    return TinyModel(replace(ModelConfig(attention="mla"), **sizes))


def check_sizes(config: ModelConfig, settings: Settings, processes: int, tp: int) -> None:
    """ValueError where the work cannot be shared out evenly."""
    if tp < 1 or processes % tp:
        raise ValueError(f"--tp has value {tp}, expected a divisor of {processes} processes")
    if settings.batch_size % (processes // tp):
        raise ValueError(
            f"--tp has value {tp}, which leaves {processes // tp} ranks for a batch of "
            f"{settings.batch_size}, expected a divisor of it"
        )
    if config.num_heads % tp:
        raise ValueError(f"--tp has value {tp}, expected a divisor of {config.num_heads} heads")


def run(
    text: Path, settings: Settings, sizes: dict[str, int], arguments: argparse.Namespace
) -> None:
    """Train, write and, with ``--check``, compare with one process."""
    torch.set_default_dtype(torch.float64 if arguments.check else torch.float32)
    model = new_model(settings, sizes)
    check_sizes(model.config, settings, dist.get_world_size(), arguments.tp)
    mesh = init_device_mesh(
        "cpu", (dist.get_world_size() // arguments.tp, arguments.tp), mesh_dim_names=("dp", "tp")
    )
    train_text, held_out = read_text(text, settings.context)
    parallelize(model, mesh, recompute=arguments.recompute, backend=arguments.compile)
    losses = train(model, train_text, settings, mesh)
    prompt = held_out[: settings.context // 2]
    written = generate(model.eval(), prompt, 64, seed=settings.seed)
    console = Console(quiet=dist.get_rank() > 0, highlight=False)
    console.print(
        f"mesh {mesh['dp'].size()} x {mesh['tp'].size()} (dp x tp), {settings.steps} steps"
    )
    console.print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    console.print(f"writes: {readable(written)}", markup=False, soft_wrap=True)
    if arguments.check:
        single = new_model(settings, sizes)
        expected = train(single, train_text, settings)
        difference = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
        same = torch.equal(written, generate(single.eval(), prompt, 64, seed=settings.seed))
        console.print(
            f"one process: losses differ by at most {difference:.1e}, "
            f"{'the same' if same else 'another'} text"
        )
        if difference > 1e-6 or not same:
            raise ValueError("losses or text are not those of one process")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ROOT / ".cache" / "mla" / "text" / "calibration.txt"
    parser.add_argument("--text", type=Path, default=default, help="any text file")
    parser.add_argument("--tp", type=int, default=1, help="ranks that share the heads (default: 1)")
    parser.add_argument("--steps", type=int, help="of training (default: 300)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a much smaller model, 30 steps")
    parser.add_argument("--recompute", action="store_true", help="activations of the blocks")
    parser.add_argument("--compile", metavar="BACKEND", help="of torch.compile, such as inductor")
    parser.add_argument("--check", action="store_true", help="compare with one process")
    arguments = parser.parse_args(argv)
    settings = replace(QUICK if arguments.quick else Settings(), seed=arguments.seed)
    if arguments.steps is not None:
        settings = replace(settings, steps=arguments.steps)
    if not dist.is_torchelastic_launched():
        print("train_parallel: failed: start it with torchrun", file=sys.stderr)
        return 1
    dist.init_process_group("gloo")
    try:
        run(arguments.text, settings, QUICK_SIZES if arguments.quick else {}, arguments)
    except ValueError as error:
        print(f"train_parallel: failed: {error}", file=sys.stderr)
        return 1
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
