"""Figures from the rows of benchmarks: ``python -m benchmarks.plot FOLDER --out FIGURES``.

Reads ``NAME.csv`` as `benchmarks.report` writes them and draws what it finds, each figure as PNG
and SVG. The background is opaque and light, so that figures read the same on light and dark pages;
the line at the bottom names the machine and the versions that the rows carry.

    layer      time of one decode step over the context, band from the 20th to the 80th percentile
    cpu        share of the register peak of the decode kernels
    models     tokens per second of whole models over the context
    codecs     perplexity over bytes per token
    capacity   bytes per token
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import ROOT

INK, PAPER, RULE = "#222222", "#FFFFFF", "#DDDDDD"
COLOURS = (
    "#5B6B7B",
    "#9AA7B2",
    "#3B7DD8",
    "#D2691E",
    "#2E8B57",
    "#8A4FBF",
    "#B8860B",
    "#C23B5A",
    "#111111",
)
CROWDED = 1.02  # codecs below this ratio share a place: the best one of each size is named
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "benchmarks" / "figures"
Rows = list[dict[str, str]]


def read(path: Path) -> Rows:
    """The rows of one file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def unique(rows: Rows, column: str) -> list[str]:
    """Values of a column in the order of the rows."""
    return list(dict.fromkeys(row[column] for row in rows))


def number(text: str) -> float | None:
    """A cell as a number; None where it is empty."""
    return float(text) if text else None


def draw_layer(figure: Any, rows: Rows) -> None:
    _over_context(figure, rows, ("median_ms", "p20_ms", "p80_ms"), "ms a step")
    figure.suptitle("One decode step of a DeepSeek-V2-Lite attention layer", color=INK)


def draw_models(figure: Any, rows: Rows) -> None:
    column = "tokens_per_s"
    _over_context(figure, rows, (column, column, column), "tokens/s", panel="model")
    figure.suptitle("Decoding whole models", color=INK)


def draw_cpu(figure: Any, rows: Rows) -> None:
    """Bars for the longest common context, batch 1."""
    longest = max((float(row["S"]) for row in rows if row["B"] == "1"), default=0.0)
    rows = [row for row in rows if row["B"] == "1" and float(row["S"]) == longest]
    rows = [row for row in rows if number(row["share"]) is not None]
    panels = unique(rows, "dtype")
    impls = unique(rows, "impl")
    for axis, dtype in zip(_axes(figure, len(panels)), panels, strict=True):
        chosen = [row for row in rows if row["dtype"] == dtype]
        heads = unique(chosen, "H")
        for index, impl in enumerate(impls):
            bars = [row for row in chosen if row["impl"] == impl]
            at = [heads.index(row["H"]) + 0.8 * (index + 0.5) / len(impls) - 0.4 for row in bars]
            shares = [float(row["share"]) for row in bars]
            colour = COLOURS[index % len(COLOURS)]
            axis.bar(at, shares, 0.75 / len(impls), label=impl, color=colour)
        axis.set_xticks(range(len(heads)), [f"{head} heads" for head in heads])
        axis.set_ylim(0, 1)
        axis.set_ylabel("share of the register peak", color=INK)
        axis.set_title(f"{dtype}, {longest:,.0f} keys", color=INK)
    _legend(figure)
    figure.suptitle("Absorbed decode attention on a CPU", color=INK)


def draw_codecs(figure: Any, rows: Rows) -> None:
    (axis,) = _axes(figure, 1)
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
            color=COLOURS[2 + index],
            label=model,
        )
        best = {row["bytes_per_token"]: row for row in sorted(chosen, key=_ratio, reverse=True)}
        for row in chosen:
            if _ratio(row) < CROWDED and row is not best[row["bytes_per_token"]]:
                continue
            place = (float(row["bytes_per_token"]), float(row["ratio"]))
            axis.annotate(row["codec"], place, (4, 4), textcoords="offset points", fontsize=7)
    axis.set_xlabel("bytes per token, all layers", color=INK)
    axis.set_ylabel("perplexity over that with unquantised rows", color=INK)
    _legend(figure)
    figure.suptitle("SmolLM2-135M-Instruct Q4_1 with coded rows", color=INK)


def _ratio(row: dict[str, str]) -> float:
    return float(row["ratio"])


def draw_capacity(figure: Any, rows: Rows) -> None:
    panels = unique(rows, "model")
    for axis, model in zip(_axes(figure, len(panels)), panels, strict=True):
        chosen = [row for row in rows if row["model"] == model]
        sizes = [float(row["bytes_per_token"]) for row in chosen]
        bars = axis.bar([row["rows"] for row in chosen], sizes, 0.6, color=COLOURS[2])
        axis.bar_label(bars, labels=[f"{size:,.0f}" for size in sizes], color=INK, padding=2)
        axis.set_yscale("log")
        axis.set_ylabel("bytes per token, all layers", color=INK)
        axis.set_title(model, color=INK)
    figure.suptitle("Cache of one token", color=INK)


def _over_context(
    figure: Any, rows: Rows, columns: tuple[str, str, str], unit: str, *, panel: str = "dtype"
) -> None:
    """Lines over S on doubly logarithmic axes: middle, lower and upper column."""
    panels, impls = unique(rows, panel), unique(rows, "impl")
    for axis, name in zip(_axes(figure, len(panels)), panels, strict=True):
        for index, impl in enumerate(impls):
            line = [row for row in rows if row[panel] == name and row["impl"] == impl]
            lengths = [float(row["S"]) for row in line]
            middle, low, high = ([float(row[column]) for row in line] for column in columns)
            colour = COLOURS[index % len(COLOURS)]
            axis.plot(lengths, middle, marker="o", markersize=4, label=impl, color=colour)
            axis.fill_between(lengths, low, high, color=colour, alpha=0.2, linewidth=0)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("cached tokens", color=INK)
        axis.set_ylabel(unit, color=INK)
        axis.set_title(name, color=INK)
    _legend(figure)


def _axes(figure: Any, count: int) -> Any:
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis in axes:
        axis.set_facecolor(PAPER)
        axis.tick_params(colors=INK)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color=RULE, linewidth=0.8)
        axis.set_axisbelow(True)
    return axes


def _legend(figure: Any) -> None:
    """One for all panels, which draw the same series."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, labelcolor=INK)


FIGURES_OF: dict[str, Callable[[Any, Rows], None]] = {
    "layer": draw_layer,
    "cpu": draw_cpu,
    "models": draw_models,
    "codecs": draw_codecs,
    "capacity": draw_capacity,
}


def machine(rows: Rows) -> str:
    """Where the rows come from, in one line."""
    row = rows[0]
    names = ("torch", "triton", "transformers", "mla")
    versions = ", ".join(f"{name} {row[name]}" for name in names)
    return f"{row['device']}, {row['threads']} threads; {versions}; commit {row['commit']}"


def draw(name: str, rows: Rows, out: Path) -> list[Path]:
    """Draw one figure to ``out/NAME.png`` and ``.svg``."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    FIGURES_OF[name](figure, rows)
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
    found = {name: options.folder / f"{name}.csv" for name in FIGURES_OF}
    found = {name: path for name, path in found.items() if path.is_file()}
    if not found:
        names = ", ".join(f"{name}.csv" for name in FIGURES_OF)
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
