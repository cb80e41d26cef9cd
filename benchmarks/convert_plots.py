"""The figure of ``convert.csv``: bytes of a cached token against what they cost in perplexity.

python -m benchmarks.convert_plots        benchmarks/results/convert.csv -> benchmarks/figures
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.plot_style import INK, PAPER, Rows, axes, legend, machine, pick, title, unique
from benchmarks.report import ROOT

# Ours is saturated, what it is compared with is quiet.
STYLES: dict[str, dict[str, Any]] = {
    "converted, bf16": {"color": "#D2691E", "marker": "o"},
    "converted, fp8": {"color": "#B5651D", "marker": "v", "linestyle": ":"},
    "converted, int8": {"color": "#3B7DD8", "marker": "s", "linestyle": ":"},
    "converted, int8, rope too": {"color": "#3B7DD8", "marker": "s"},
    "converted, int4": {"color": "#2E8B57", "marker": "D", "linestyle": ":"},
    "converted, int4, rope int8": {"color": "#2E8B57", "marker": "D"},
    "converted, healed": {"color": "#C23B5A", "marker": "*", "markersize": 11, "linestyle": "none"},
    "published objective": {"color": "#9AA7B2", "marker": "x"},
    "grouped-query cache, quantised": {"color": "#222222", "marker": "P", "linestyle": "--"},
}
NAMES = {
    "plain": "bf16",
    "fp8/128/16/0": "fp8",
    "int8/128/16/0": "int8",
    "int8/128/8/0": "int8, rope too",
    "int4/64/16/1": "int4",
    "int4/64/8/1": "int4, rope int8",
}

TICKS = (1, 1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2, 3, 5, 10, 30, 100)


def draw(source: Path, folder: Path) -> list[Path]:
    """``convert.png`` and ``convert.svg`` in ``folder`` from the rows of a CSV file."""
    import csv

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with source.open(newline="") as file:
        rows = list(csv.DictReader(file))
    models = unique(rows, "model")
    figure = plt.figure(figsize=(5.6 * len(models) + 2.2, 4.8), layout="constrained")
    figure.set_facecolor(PAPER)
    for axis, model in zip(axes(figure, len(models)), models, strict=True):
        draw_model(axis, pick(rows, model=model))
        axis.set_title(model, color=INK)
    figure.axes[0].set_ylabel("perplexity / that of the unconverted model", color=INK)
    legend(figure)
    title(figure, "What a cached token costs in bytes and in perplexity")
    if "device" in rows[0]:
        figure.text(0.005, 0.005, machine(rows), color="#777777", fontsize=7)
        figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"convert.{kind}" for kind in ("png", "svg")]
    with plt.rc_context({"svg.hashsalt": "convert"}):
        figure.savefig(paths[0], dpi=130)
        figure.savefig(paths[1], metadata={"Date": None})
    plt.close(figure)
    return paths


def series(rows: Rows) -> dict[str, Rows]:
    """The rows of each line; of the published objective the best fold at each budget."""
    found: dict[str, Rows] = {name: [] for name in STYLES}
    for row in rows:
        method, codec = row["method"], NAMES.get(row["codec"], row["codec"])
        if method == "ours":
            found.setdefault(f"converted, {codec}", []).append(row)
        elif method == "healed":
            found["converted, healed"].append(row)
        elif method == "grouped":
            found["grouped-query cache, quantised"].append(row)
    published = [row for row in rows if row["method"] == "published"]
    found["published objective"] = [
        min(pick(published, saved=saved), key=lambda row: float(row["ratio"]))
        for saved in unique(published, "saved")
    ]
    return {name: own for name, own in found.items() if own}


def draw_model(axis: Any, rows: Rows) -> None:
    """One panel; the original, 16 bits a number, is the point at 100 %."""
    import numpy as np

    for name, own in series(rows).items():
        own = sorted(own, key=lambda row: float(row["bytes_per_token"]))
        shares = [100 * float(r["bytes_per_token"]) / float(r["original_bytes"]) for r in own]
        ratios, errors = ([float(row[key] or 0) for row in own] for key in ("ratio", "ratio_error"))
        style = {"markersize": 6, "linewidth": 1.6, **STYLES.get(name, {"color": "#4A4AC2"})}
        axis.errorbar(shares, ratios, yerr=errors, label=name, capsize=2, **style)
    axis.plot([100], [1.0], "o", color=INK, markersize=7, label="unconverted, bf16")
    axis.axhline(1.0, color="#777777", linewidth=1.0, zorder=1)
    # Of the excess over 1: linear below .02 (noise reaches under 1), logarithmic above.
    scale = (lambda y: np.arcsinh((y - 1) / 0.02), lambda z: 1 + 0.02 * np.sinh(z))
    axis.set_yscale("function", functions=scale)
    top = max([1.1, *(float(row["ratio"]) for row in rows)])
    ticks = [x for x in TICKS if x <= 1.15 * top]
    axis.set_yticks(ticks, [f"{x:g}" for x in ticks])
    axis.minorticks_off()
    axis.set_ylim(0.99, 1.2 * top - 0.2)
    axis.set_xlabel(f"bytes of a token, % of {int(float(rows[0]['original_bytes'])):,}", color=INK)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    results = ROOT / "benchmarks" / "results" / "convert.csv"
    parser.add_argument("--rows", type=Path, default=results, metavar="CSV")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "figures", metavar="DIR")
    options = parser.parse_args(argv)
    if not options.rows.is_file():
        print(f"convert-plots: {options.rows} does not exist; make convert-report makes one")
        return 0
    for path in draw(options.rows, options.out):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
