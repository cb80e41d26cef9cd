"""What every figure shares: rows from CSV, colours of implementations, axes, one legend.

The background is opaque and light, so that a figure reads the same on light and dark pages. An
implementation has the same colour in every figure. Rows without a figure, because a case ran out of
memory, are left out.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

INK, PAPER, RULE = "#222222", "#FFFFFF", "#DDDDDD"
FADED = "#777777"
FLAT = 8.0  # values within this factor are drawn on a linear axis
# Ours is saturated, baselines are quiet.
COLOURS_OF = {
    "cpp": "#D2691E",
    "triton": "#D2691E",
    "torch": "#3B7DD8",
    "cpp alone": "#8B3A0E",
    "bmm": "#5B6B7B",
    "einsum": "#9AA7B2",
    "sdpa rows": "#2E8B57",
    "sdpa": "#2E8B57",
    "flex rows": "#8A4FBF",
    "flex": "#8A4FBF",
    "decompressed": "#C23B5A",
    "kept heads": "#B8860B",
    "sdpa heads": "#B8860B",
    "flex heads": "#CBA6E8",
    "transformers sdpa": "#5B6B7B",
    "transformers eager": "#9AA7B2",
    "transformers DynamicCache": "#5B6B7B",
    "plain PyTorch": "#2E8B57",
    "stock": "#5B6B7B",
    "save=latent": "#D2691E",
    "save=expanded": "#3B7DD8",
    "DenseLatentCache": "#D2691E",
    "PagedLatentCache": "#3B7DD8",
    "int8": "#E9A15B",
    "int4": "#F4CFA4",
    "fp8": "#B5651D",
}
OTHERS = ("#111111", "#1B9E9E", "#7A8B2D", "#A0527A", "#4A4AC2", "#D85C8A")
Row = dict[str, str]
Rows = list[Row]


def read(path: Path) -> Rows:
    """The rows of one file that have figures; those that ran out of memory have none."""
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("status", "ok") in ("ok", "")]


def unique(rows: Rows, column: str) -> list[str]:
    """Values of a column in the order of the rows."""
    return list(dict.fromkeys(row[column] for row in rows))


def number(text: str) -> float | None:
    """A cell as a number; None where it is empty."""
    return float(text) if text else None


def pick(rows: Rows, **wanted: object) -> Rows:
    """Rows with these values."""
    return [row for row in rows if all(row[key] == str(value) for key, value in wanted.items())]


def measured(rows: Rows, *columns: str) -> Rows:
    """Rows that have a number in each of these columns."""
    return [row for row in rows if all(number(row[column]) is not None for column in columns)]


def colour(impl: str, names: list[str]) -> str:
    """Of an implementation; those without one of their own in the order of ``names``."""
    key = impl.removeprefix("mla ")
    if key in COLOURS_OF:
        return COLOURS_OF[key]
    free = [name for name in names if name.removeprefix("mla ") not in COLOURS_OF]
    return OTHERS[free.index(impl) % len(OTHERS)]


def axes(figure: Any, count: int) -> Any:
    """Panels side by side."""
    found = figure.subplots(1, count, squeeze=False)[0]
    for axis in found:
        axis.set_facecolor(PAPER)
        axis.tick_params(colors=INK, which="both")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color=RULE, linewidth=0.8)
        axis.set_axisbelow(True)
    return found


def legend(figure: Any) -> None:
    """One for all panels: every series once, in the order of its first panel."""
    found: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(
        found.values(), found, loc="outside right upper", frameon=False, labelcolor=INK, fontsize=9
    )


def title(figure: Any, text: str) -> None:
    figure.suptitle(text, color=INK)


def plain_ticks(axis: Any, values: list[float]) -> None:
    """Ticks of a logarithmic x axis at the measured places: 1K, 4K."""
    places = sorted(set(values))
    axis.set_xscale("log", base=2)
    if len(places) > 8:
        places = places[::2]
    axis.set_xticks(places, [short(value) for value in places])
    axis.minorticks_off()


def short(value: float) -> str:
    """``4096`` as 4K."""
    whole = int(value)
    return f"{whole // 1024}K" if whole >= 1024 and whole % 1024 == 0 else f"{whole}"


def tall_axis(axis: Any, values: list[float]) -> None:
    """A logarithmic y axis with numbers as one reads them, or a linear one from 0 where that does.

    Without values nothing is done.
    """
    if not values:
        return
    if max(values) < FLAT * min(values):
        axis.set_ylim(0, 1.15 * max(values))
        return
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")


def lines(
    axis: Any, rows: Rows, x: str, columns: tuple[str, str, str], *, names: list[str]
) -> None:
    """A line of each implementation over column ``x``: middle, lower and upper column."""
    for impl in unique(rows, "impl"):
        line = measured(pick(rows, impl=impl), *columns)
        line.sort(key=lambda row: float(row[x]))
        if not line:
            continue
        places = [float(row[x]) for row in line]
        middle, low, high = ([float(row[column]) for row in line] for column in columns)
        shade = colour(impl, names)
        axis.plot(places, middle, marker="o", markersize=4, label=impl, color=shade)
        axis.fill_between(places, low, high, color=shade, alpha=0.2, linewidth=0)


def grouped_bars(
    axis: Any, values: dict[str, dict[str, float]], *, names: list[str], rotation: int | None = 0
) -> None:
    """Bars of ``values[group][series]``; a series that a group lacks leaves its place free.

    Numbers above the bars are turned by ``rotation`` degrees; None: there are none.
    """
    groups = list(values)
    width = 0.84 / max(1, len(names))
    for index, name in enumerate(names):
        at = [i for i, group in enumerate(groups) if name in values[group]]
        heights = [values[groups[i]][name] for i in at]
        places = [i + width * (index + 0.5) - 0.42 for i in at]
        bars = axis.bar(places, heights, 0.92 * width, label=name, color=colour(name, names))
        if rotation is not None:
            digits = 2 if rotation else 3  # narrow bars stand beside each other's numbers
            labels = [
                f"{height:.{digits}g}" if height < 100 else f"{height:.0f}" for height in heights
            ]
            axis.bar_label(bars, labels, color=INK, padding=2, fontsize=8, rotation=rotation)
    axis.set_xticks(range(len(groups)), groups)
    axis.grid(visible=False, axis="x")


def machine(rows: Rows) -> str:
    """Where the rows come from, in one line."""
    row = rows[0]
    names = ("torch", "triton", "transformers", "mla")
    versions = ", ".join(f"{name} {row[name]}" for name in names)
    driver = row.get("driver", "none")
    device = row["device"] if driver in ("none", "") else f"{row['device']}, driver {driver}"
    threads = f"{row['threads']} thread{'' if row['threads'] == '1' else 's'}"
    return f"{device}, {threads}; {versions}; commit {row['commit']}"
