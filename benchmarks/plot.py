"""Figures from the rows of benchmarks: ``python -m benchmarks.plot FOLDER --out FIGURES``.

Reads ``NAME.csv`` as `benchmarks.report` writes them, draws what it finds, each figure as PNG and
SVG, and needs nothing else. The line at the bottom names the machine and the versions that the rows
carry. Time, where a figure does not say otherwise, is wall time with a band from the 20th to the
80th percentile.

    layer             time of one decode step over the context
    cpu               share of the register peak of the decode kernels
    models            tokens per second of whole models over the context
    codecs            perplexity over bytes per token
    capacity          bytes per token in all layers
    cache             time to append a token, and of a cached one in a step, over the context
    training_memory   bytes kept for the backward pass, and time of a step
    prefill           time over that of SDPA, forward and in training
    decode_roofline   speed of every form under the machine's ceilings
    decode_speedups   how many times faster ours is than each other form
    decode_scaling    time of a token over the context and over the batch
    decode_bytes      what each form caches for a token, and the time of its step
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import plot_decode
from benchmarks.plot_style import (
    INK,
    PAPER,
    Row,
    Rows,
    axes,
    colour,
    grouped_bars,
    legend,
    lines,
    machine,
    measured,
    pick,
    plain_ticks,
    read,
    tall_axis,
    title,
    unique,
)
from benchmarks.report import ROOT

BLUE, ORANGE = colour("torch", []), colour("cpp", [])
CROWDED = 1.02  # codecs below this ratio share a place: the best one of each size is named
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "benchmarks" / "figures"


def draw_layer(figure: Any, rows: Rows) -> None:
    _over(figure, rows, ("median_ms", "p20_ms", "p80_ms"), "ms a step", x="S", panel="dtype")
    title(figure, "One decode step of a DeepSeek-V2-Lite attention layer")


def draw_models(figure: Any, rows: Rows) -> None:
    column = "tokens_per_s"
    _over(figure, rows, (column, column, column), "tokens/s", x="S", panel="model")
    title(figure, "Decoding whole models, batch 1")


def draw_cache(figure: Any, rows: Rows) -> None:
    columns = ("median_us", "p20_us", "p80_us")
    _over(figure, rows, columns, "microseconds a token", x="S", panel="op")
    names = {"append": "append one token", "decode": "one step, for each cached token"}
    for axis, op in zip(figure.axes, unique(measured(rows, *columns), "op"), strict=True):
        axis.set_title(names.get(op, op), color=INK)
    title(figure, "The cache of one layer, float32")


def draw_prefill(figure: Any, rows: Rows) -> None:
    rows = [{**row, "panel": f"{row['mode']}, {row['dtype']}"} for row in pick(rows, H=16)]
    column = "over_sdpa"
    _over(figure, rows, (column, column, column), "time over SDPA", x="L", panel="panel")
    for axis in figure.axes:
        axis.set_xlabel("tokens", color=INK)
    title(figure, "Causal prefill, 16 heads: time over that of SDPA and its expansion")


def draw_training_memory(figure: Any, rows: Rows) -> None:
    """Bars: kept for the backward pass, and time of forward and backward."""
    names = unique(rows, "impl")
    panels = (("saved_KiB_per_token", "KiB kept for the backward pass, a token"),
              ("median_ms", "ms, forward and backward"))  # fmt: skip
    for axis, (column, label) in zip(axes(figure, 2), panels, strict=True):
        values = {
            f"{length} tokens": {
                row["impl"]: float(row[column]) for row in measured(pick(rows, L=length), column)
            }
            for length in unique(rows, "L")
        }
        grouped_bars(axis, values, names=names)
        axis.margins(y=0.1)
        axis.set_ylabel(label, color=INK)
    legend(figure)
    title(figure, "One DeepSeek-V2-Lite attention layer in training, float32")


def draw_cpu(figure: Any, rows: Rows) -> None:
    """Bars for the longest common context, batch 1."""
    longest = max((float(row["S"]) for row in rows if row["B"] == "1"), default=0.0)
    rows = [row for row in rows if row["B"] == "1" and float(row["S"]) == longest]
    rows = measured(rows, "share")
    panels, names = unique(rows, "dtype"), unique(rows, "impl")
    for axis, dtype in zip(axes(figure, len(panels)), panels, strict=True):
        chosen = pick(rows, dtype=dtype)
        values = {
            H: {row["impl"]: float(row["share"]) for row in pick(chosen, H=H)}
            for H in unique(chosen, "H")
        }
        grouped_bars(axis, values, names=names, rotation=None)
        axis.set_ylim(0, 1)
        axis.set_xlabel("heads", color=INK)
        axis.set_ylabel("share of the register peak", color=INK)
        axis.set_title(f"{dtype}, {longest:,.0f} keys", color=INK)
    legend(figure)
    title(figure, "Absorbed decode attention on a CPU, batch 1")


def draw_codecs(figure: Any, rows: Rows) -> None:
    (axis,) = axes(figure, 1)
    for index, model in enumerate(unique(rows, "model")):
        chosen = sorted(
            (row for row in rows if row["model"] == model), key=lambda row: row["bytes_per_token"]
        )
        axis.errorbar(
            [float(row["bytes_per_token"]) for row in chosen],
            [float(row["ratio"]) for row in chosen],
            yerr=[float(row["ratio_error"]) for row in chosen],
            fmt="o",
            capsize=3,
            color=(BLUE, ORANGE)[index % 2],
            label=model,
        )
        offset = (4, 4) if index % 2 == 0 else (4, -9)  # models share places
        best = {row["bytes_per_token"]: row for row in sorted(chosen, key=_ratio, reverse=True)}
        for row in chosen:
            if _ratio(row) < CROWDED and row is not best[row["bytes_per_token"]]:
                continue
            place = (float(row["bytes_per_token"]), float(row["ratio"]))
            axis.annotate(row["codec"], place, offset, textcoords="offset points", fontsize=7)
    axis.set_xlabel("bytes per token, all layers", color=INK)
    axis.set_ylabel("perplexity over that with unquantised rows", color=INK)
    legend(figure)
    title(figure, "SmolLM2-135M-Instruct Q4_1 with coded rows")


def _ratio(row: Row) -> float:
    return float(row["ratio"])


def draw_capacity(figure: Any, rows: Rows) -> None:
    panels = unique(rows, "model")
    for axis, model in zip(axes(figure, len(panels)), panels, strict=True):
        chosen = [row for row in rows if row["model"] == model]
        sizes = [float(row["bytes_per_token"]) for row in chosen]
        bars = axis.bar([row["rows"] for row in chosen], sizes, 0.6, color=BLUE)
        axis.bar_label(bars, labels=[f"{size:,.0f}" for size in sizes], color=INK, padding=2)
        tall_axis(axis, sizes)
        axis.set_ylabel("bytes per token, all layers", color=INK)
        axis.set_title(model, color=INK)
    title(figure, "Cache of one token in all layers")


def _over(
    figure: Any, rows: Rows, columns: tuple[str, str, str], unit: str, *, x: str, panel: str
) -> None:
    """Lines over column ``x`` on doubly logarithmic axes, one panel for each value of a column."""
    rows = measured(rows, *columns)
    panels, names = unique(rows, panel), unique(rows, "impl")
    for index, (axis, name) in enumerate(zip(axes(figure, len(panels)), panels, strict=True)):
        chosen = pick(rows, **{panel: name})
        lines(axis, chosen, x, columns, names=names)
        tall_axis(axis, [float(row[columns[0]]) for row in chosen])
        plain_ticks(axis, [float(row[x]) for row in chosen])
        axis.set_xlabel("cached tokens", color=INK)
        if index == 0:
            axis.set_ylabel(unit, color=INK)
        axis.set_title(name, color=INK)
    legend(figure)


FIGURES_OF: dict[str, tuple[str, Callable[[Any, Rows], None]]] = {
    "layer": ("layer", draw_layer),
    "cpu": ("cpu", draw_cpu),
    "models": ("models", draw_models),
    "codecs": ("codecs", draw_codecs),
    "capacity": ("capacity", draw_capacity),
    "cache": ("cache", draw_cache),
    "training_memory": ("training_memory", draw_training_memory),
    "prefill": ("prefill", draw_prefill),
    "decode_roofline": ("decode", plot_decode.draw_roofline),
    "decode_speedups": ("decode", plot_decode.draw_speedups),
    "decode_scaling": ("decode", plot_decode.draw_scaling),
    "decode_bytes": ("decode", plot_decode.draw_bytes),
}


def draw(name: str, rows: Rows, out: Path) -> list[Path]:
    """Draw one figure to ``out/NAME.png`` and ``.svg``."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    FIGURES_OF[name][1](figure, rows)
    figure.supxlabel(machine(rows), fontsize=7, color=INK)
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{name}.{kind}" for kind in ("png", "svg")]
    # The same rows give the same bytes: no date, no random ids.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(paths[0], dpi=120, facecolor=PAPER)
        figure.savefig(paths[1], facecolor=PAPER, metadata={"Date": None})
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS, help="with CSV files")
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder for the figures")
    options = parser.parse_args(argv)
    sources = {name: options.folder / f"{source}.csv" for name, (source, _) in FIGURES_OF.items()}
    found = {name: path for name, path in sources.items() if path.is_file()}
    if not found:
        names = ", ".join(dict.fromkeys(path.name for path in sources.values()))
        print(f"plot: failed: {options.folder} has none of {names}", file=sys.stderr)
        return 2
    for name, path in found.items():
        rows = read(path)
        if not rows:
            print(f"plot: failed: {path} has no rows", file=sys.stderr)
            return 2
        try:
            draw(name, rows, options.out)
        except KeyError as error:
            print(f"plot: failed: {path} has no column {error}", file=sys.stderr)
            return 2
    print(f"plot: {len(found)} figures of {', '.join(found)} in {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
