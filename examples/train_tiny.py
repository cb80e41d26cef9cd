"""Train the same small language model with MHA, GQA and MLA on the same text, and compare.

    python examples/train_tiny.py            a few minutes on two cores
    python examples/train_tiny.py --quick    some seconds, too short to learn much

Prints loss, cache size and decoding speed of the three and a sample of what each writes; saves
loss_curves.png and report.json under out/train_tiny. The models have the same number of
parameters, the same seed and the same batches, and are scored on text they were not trained on.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tiny_model import ModelConfig, TinyModel, generate
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
MODELS = (
    ModelConfig(attention="mha"),
    ModelConfig(attention="gqa"),
    ModelConfig(attention="mla"),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long and on what to train."""

    steps: int = 300
    batch_size: int = 16
    context: int = 128
    learning_rate: float = 2e-3
    seed: int = 0
    evaluations: int = 10
    decode_after: tuple[int, ...] = (128, 4096)  # cached tokens when decoding is timed


QUICK = Settings(
    steps=30, batch_size=8, context=64, learning_rate=5e-3, evaluations=2, decode_after=(64, 256)
)
QUICK_SIZES = {"hidden_size": 48, "num_layers": 2, "num_heads": 4, "head_dim": 12}
QUICK_SIZES |= {"kv_lora_rank": 16, "rope_dim": 8}


@dataclass
class Result:
    """What became of one model; losses in nats per byte."""

    attention: str
    parameters: int
    train_losses: list[float] = field(default_factory=list)
    validation_losses: list[tuple[int, float]] = field(default_factory=list)
    products_per_cached_token: int = 0  # in one layer, when one token is decoded
    cache_bytes_per_token: int = 0
    tokens_per_second: dict[int, float] = field(default_factory=dict)
    training_seconds: float = 0.0
    sample: str = ""

    @property
    def train_loss(self) -> float:
        """Mean over the last tenth of the steps: single batches differ by more than the models."""
        last = self.train_losses[-max(1, len(self.train_losses) // 10) :]
        return sum(last) / len(last)


def read_text(path: Path, context: int) -> tuple[Tensor, Tensor]:
    """Bytes of the text to train on, and of its last tenth, which is held out."""
    if not path.is_file():
        raise ValueError(f"--text has no file {path}; run `make data`, or give --text FILE")
    text = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
    held_out = len(text) // 10
    if held_out <= context:
        raise ValueError(
            f"--text has {len(text)} bytes in {path}, expected more than {10 * (context + 1)}"
        )
    return text[:-held_out], text[-held_out:]


def batch(text: Tensor, settings: Settings, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random windows and the same windows one byte later, ``[batch, context]`` each."""
    L = settings.context
    starts = torch.randint(len(text) - L, (settings.batch_size, 1), generator=generator)
    windows = text[starts + torch.arange(L + 1)]
    return windows[:, :-1], windows[:, 1:]


def loss_of(model: TinyModel, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def validate(model: TinyModel, text: Tensor, settings: Settings) -> float:
    """Mean loss over the same 8 batches for every model."""
    generator = torch.Generator().manual_seed(settings.seed + 1)
    losses = [loss_of(model, *batch(text, settings, generator)).item() for _ in range(8)]
    return sum(losses) / len(losses)


def train(
    config: ModelConfig, train_text: Tensor, held_out: Tensor, settings: Settings, bar: Progress
) -> tuple[TinyModel, Result]:
    """AdamW with a short warm-up and a cosine decay; nothing depends on the kind of attention."""
    torch.manual_seed(settings.seed)
    model = TinyModel(config)
    result = Result(
        config.attention,
        sum(p.numel() for p in model.parameters()),
        products_per_cached_token=config.products_per_cached_token,
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, settings.steps)
    )
    generator = torch.Generator().manual_seed(settings.seed)
    task = bar.add_task(config.attention.upper(), total=settings.steps, loss="")
    start = time.perf_counter()
    for step in range(1, settings.steps + 1):
        loss = loss_of(model, *batch(train_text, settings, generator))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        result.train_losses.append(loss.item())
        if step % max(1, settings.steps // settings.evaluations) == 0 or step == settings.steps:
            result.validation_losses.append((step, validate(model, held_out, settings)))
        bar.update(task, advance=1, loss=f"loss {loss.item():.3f}")
    result.training_seconds = time.perf_counter() - start
    return model, result


def learning_rate_factor(step: int, steps: int) -> float:
    warmup = max(1, steps // 10)  # half of that, and the losses of MHA and GQA jump once
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def time_decoding(models: Sequence[TinyModel], text: Tensor, length: int) -> list[float]:
    """Tokens per second of cached decoding after ``length`` tokens, models taking turns."""
    num_steps, rounds = 16, 5
    prompt = text[:length].repeat(-(-length // len(text)))[:length]
    caches = [model.new_cache(1, length + num_steps * rounds) for model in models]
    token = prompt[-1:][None]
    for model, cache in zip(models, caches, strict=True):
        model(prompt[None], cache)
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(rounds):
        for times, model, cache in zip(seconds, models, caches, strict=True):
            start = time.perf_counter()
            for _ in range(num_steps):
                token = model(token, cache)[:, -1].argmax(-1, keepdim=True)
            times.append(time.perf_counter() - start)
    return [num_steps / median(times) for times in seconds]


def plot(results: Sequence[Result], path: Path) -> None:
    """Loss over steps, training as a running mean and validation as points; cache as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (losses, bars) = plt.subplots(
        1, 2, figsize=(10, 4.2), width_ratios=[3, 1], layout="constrained"
    )
    for index, result in enumerate(results):
        color, name = f"C{index}", result.attention.upper()
        losses.plot(running_mean(result.train_losses), color=color, alpha=0.6, label=name)
        losses.plot(*zip(*result.validation_losses, strict=True), "o", color=color, markersize=4)
        bars.bar(name, result.cache_bytes_per_token, color=color)
    losses.set(xlabel="step", ylabel="loss (nats per byte)", title="training, and validation (o)")
    losses.legend()
    bars.set(ylabel="bytes", title="KV cache per token")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def readable(tokens: Tensor) -> str:
    """Bytes as text on one line; what is not printable becomes a space."""
    text = bytes(tokens.tolist()).decode("utf-8", errors="replace")
    return "".join(letter if letter.isprintable() else " " for letter in text)


def running_mean(values: Sequence[float], window: int = 10) -> list[float]:
    parts = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
    return [sum(part) / len(part) for part in parts]


def show(results: Sequence[Result], console: Console) -> None:
    table = Table(title="The same model with three attentions", title_justify="left")
    lengths = list(results[0].tokens_per_second)
    columns = ["attention", "parameters", "train loss", "validation loss", "cache bytes/token"]
    columns += [f"tokens/s after {length}" for length in lengths] + ["trained in"]
    for column in columns:
        table.add_column(column, justify="left" if column == "attention" else "right")
    for result in results:
        share = result.cache_bytes_per_token / results[0].cache_bytes_per_token
        table.add_row(
            result.attention.upper(),
            f"{result.parameters:,}",
            f"{result.train_loss:.3f}",
            f"{result.validation_losses[-1][1]:.3f}",
            f"{result.cache_bytes_per_token:,} ({share:.0%})",
            *(f"{result.tokens_per_second[length]:.0f}" for length in lengths),
            f"{result.training_seconds:.0f} s",
        )
    console.print(table)
    products = {result.attention: result.products_per_cached_token for result in results}
    console.print(
        f"For each cached token a layer of MLA multiplies {products['mla']} times, one of MHA "
        f"{products['mha']} times, and takes more small steps: it decodes faster where reading the "
        "cache is what takes the time, not in a model this small.",
        soft_wrap=True,
    )
    for result in results:
        console.print(f"{result.attention.upper()} writes:", style="bold")
        console.print(result.sample, markup=False, highlight=False, soft_wrap=True)


def run(text: Path, out: Path, settings: Settings, sizes: dict[str, Any]) -> list[Result]:
    """Train, measure, print and save."""
    train_text, held_out = read_text(text, settings.context)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    models, results = [], []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bar:
        for config in MODELS:
            model, result = train(replace(config, **sizes), train_text, held_out, settings, bar)
            models.append(model.eval())
            results.append(result)
    prompt = held_out[: settings.context // 2]
    for model, result in zip(models, results, strict=True):
        result.cache_bytes_per_token = model.new_cache(1, 64).nbytes // 64
        written = generate(model, prompt, 200, seed=settings.seed)
        result.sample = readable(written)
    for length in settings.decode_after:
        for result, speed in zip(results, time_decoding(models, held_out, length), strict=True):
            result.tokens_per_second[length] = speed
    out.mkdir(parents=True, exist_ok=True)
    plot(results, out / "loss_curves.png")
    report = {
        "settings": asdict(settings) | {"text": str(text), "threads": torch.get_num_threads()},
        "torch": str(torch.__version__),
        "models": [asdict(result) for result in results],
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    show(results, console)
    console.print(f"train_tiny: {out / 'loss_curves.png'}, {out / 'report.json'}", soft_wrap=True)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ROOT / ".cache" / "mla" / "text" / "calibration.txt"
    parser.add_argument("--text", type=Path, default=default, help="any text file")
    parser.add_argument("--steps", type=int, help="of training, for each model (default: 300)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a much smaller model, 30 steps")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "train_tiny")
    arguments = parser.parse_args(argv)
    settings = replace(QUICK if arguments.quick else Settings(), seed=arguments.seed)
    if arguments.steps is not None:
        settings = replace(settings, steps=arguments.steps)
    try:
        if settings.steps < 1:
            raise ValueError(f"--steps has value {settings.steps}, expected at least 1")
        run(arguments.text, arguments.out, settings, QUICK_SIZES if arguments.quick else {})
    except ValueError as error:
        print(f"train_tiny: failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
