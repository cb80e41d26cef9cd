"""Figures of ``decode.csv``: roofline, speed-ups, context, batch, bytes and time of a token.

Times are those that shares of the limit were taken from: processor time of the busiest thread on a
CPU, wall time on an accelerator. Ceilings are those that the rows were compared with.
"""

from __future__ import annotations

from typing import Any

from benchmarks.plot_style import (
    FADED,
    INK,
    Row,
    Rows,
    axes,
    colour,
    grouped_bars,
    legend,
    lines,
    measured,
    pick,
    plain_ticks,
    short,
    tall_axis,
    title,
    unique,
)

BASE = {"dtype": "bfloat16", "H": 16, "B": 1, "S": 4096, "L": 1, "codec": "plain", "Z": 0}
OURS = ("triton", "cpp", "torch")  # fastest first
SERIES = ("bmm", "sdpa rows", "flex rows", "kept heads", "flex heads", "decompressed")


def at(rows: Rows, **changes: object) -> Rows:
    """Rows of the base point with some sizes changed; None: any."""
    wanted = {key: value for key, value in {**BASE, **changes}.items() if value is not None}
    return pick(rows, **wanted)


def clock_ms(row: Row) -> float:
    """Milliseconds by the clock of the row's share of the limit."""
    return float(row["limit_ms"]) / float(row["of_limit"])


def ceilings(rows: Rows) -> dict[str, float]:
    """Bytes and flops a second that bound the rows, by ``bound``; what bounds none is missing."""
    found = {}
    for bound, column in (("memory", "bytes"), ("arithmetic", "flops")):
        rates = [float(r[column]) / (1e-3 * float(r["limit_ms"])) for r in pick(rows, bound=bound)]
        if rates:
            found[bound] = max(rates)
    return found


def draw_roofline(figure: Any, rows: Rows) -> None:
    """Speed over arithmetic for each byte, one panel for each dtype."""
    rows = [row for row in rows if row.get("of_limit")]
    panels = unique(rows, "dtype")
    names = unique(rows, "impl")
    for axis, dtype in zip(axes(figure, len(panels)), panels, strict=True):
        chosen = pick(rows, dtype=dtype)
        # Bandwidth is the same for every dtype.
        limits = {**ceilings(rows), **ceilings(chosen)}
        if not pick(chosen, bound="arithmetic"):
            limits.pop("arithmetic", None)
        for impl in names:
            own = pick(chosen, impl=impl)
            x = [float(row["flops"]) / float(row["bytes"]) for row in own]
            y = [float(row["flops"]) / clock_ms(row) / 1e6 for row in own]
            is_ours = impl in OURS
            axis.scatter(
                x, y, s=34 if is_ours else 18, label=impl, color=colour(impl, names),
                alpha=0.9 if is_ours else 0.6, edgecolors="none", zorder=3 if is_ours else 2,
            )  # fmt: skip
        _ceiling(axis, limits, *_span(chosen))
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        tall_axis(axis, [float(row["flops"]) / clock_ms(row) / 1e6 for row in chosen])
        axis.set_xlabel("flops for each byte", color=INK)
        axis.set_ylabel("GFLOP/s", color=INK)
        axis.set_title(dtype, color=INK)
    legend(figure)
    title(figure, "Decode attention under the machine's ceilings, measured in the same run")


def _span(rows: Rows) -> tuple[float, float]:
    places = [float(row["flops"]) / float(row["bytes"]) for row in rows]
    return min(places) / 2, max(places) * 2


def _ceiling(axis: Any, limits: dict[str, float], low: float, high: float) -> None:
    """The lines that are known, each with its value."""
    memory, arithmetic = limits.get("memory"), limits.get("arithmetic")
    top = (arithmetic or float("inf")) / 1e9
    style: dict[str, Any] = {"color": FADED, "linewidth": 1.2, "zorder": 1}
    if memory is not None:
        ridge = min(high, top / memory * 1e9)
        axis.plot([low, ridge], [low * memory / 1e9, ridge * memory / 1e9], **style)
        axis.annotate(
            f"{memory / 1e9:,.0f} GB/s", (low, low * memory / 1e9), (10, -4),
            textcoords="offset points", color=FADED, fontsize=8,
        )  # fmt: skip
        low = ridge
    if arithmetic is not None:
        axis.plot([low, high], [top, top], **style)
        axis.annotate(
            f"{top:,.0f} GFLOP/s", (high, top), (0, 4), ha="right",
            textcoords="offset points", color=FADED, fontsize=8,
        )  # fmt: skip


def draw_speedups(figure: Any, rows: Rows) -> None:
    """How many times faster our fastest form is than each other, over the context."""
    rows = [row for row in rows if row.get("of_limit")]
    panels = [H for H in ("16", "128") if at(rows, H=H, S=None)]
    names = [name for name in SERIES if name in unique(rows, "impl")]
    for axis, H in zip(axes(figure, len(panels)), panels, strict=True):
        values: dict[str, dict[str, float]] = {}
        chosen = at(rows, H=H, S=None)
        for S in sorted(unique(chosen, "S"), key=float):
            times = {row["impl"]: clock_ms(row) for row in pick(chosen, S=S)}
            ours = min((times[name] for name in OURS if name in times), default=None)
            if ours is not None and float(S) in (512, 1024, 4096, 16384, 65536):
                others = {name: times[name] / ours for name in names if name in times}
                values[short(float(S))] = others
        grouped_bars(axis, values, names=names, rotation=90)
        axis.axhline(1.0, color=FADED, linewidth=1.2, zorder=1)
        tall_axis(axis, [x for others in values.values() for x in others.values()])
        axis.margins(y=0.15)
        axis.set_xlabel("cached tokens", color=INK)
        axis.set_title(f"{H} heads", color=INK)
    figure.axes[0].set_ylabel("times faster than this form", color=INK)
    legend(figure)
    title(figure, "Decode attention: our fastest form against others, bfloat16, batch 1")


def draw_scaling(figure: Any, rows: Rows) -> None:
    """Microseconds of a token over the context and over the batch."""
    columns = ("us_per_token", "us_p20", "us_p80")
    rows = [_with_spread(row) for row in measured(rows, "us_per_token")]
    names = unique(rows, "impl")
    both = (("S", "cached tokens", at(rows, S=None), "batch 1"),
            ("B", "batch", at(rows, B=None, S=1024), "1024 cached tokens"))  # fmt: skip
    panels = [panel for panel in both if len(unique(panel[2], panel[0])) > 1]
    for axis, (x, label, chosen, where) in zip(axes(figure, len(panels)), panels, strict=True):
        lines(axis, chosen, x, columns, names=names)
        tall_axis(axis, [float(row[columns[0]]) for row in chosen])
        plain_ticks(axis, [float(row[x]) for row in chosen])
        axis.set_xlabel(label, color=INK)
        axis.set_ylabel("microseconds a token", color=INK)
        axis.set_title(where, color=INK)
    legend(figure)
    title(figure, "Decode attention, 16 heads, bfloat16")


def _with_spread(row: Row) -> Row:
    per = float(row["us_per_token"]) / float(row["median_ms"])
    spread = {f"us_{name}": str(per * float(row[f"{name}_ms"])) for name in ("p20", "p80")}
    return {**row, **spread}


def draw_bytes(figure: Any, rows: Rows) -> None:
    """What a form caches for a token in one layer, and what a step over 4096 of them takes."""
    rows = [row for row in at(rows, codec=None) if row.get("of_limit")]
    chosen = [row for row in rows if row["codec"] == "plain" or row["impl"] == _ours(rows)]
    chosen = [row for row in chosen if row["impl"] not in ("einsum", "torch")]
    chosen.sort(key=lambda row: -float(row["bytes_per_token"]))
    names = [
        row["impl"] if row["codec"] == "plain" else f"{row['impl']}, {row['codec']}"
        for row in chosen
    ]
    shades = [colour(row["impl"], unique(rows, "impl")) for row in chosen]
    panels = (
        ("bytes a token and layer", [float(row["bytes_per_token"]) for row in chosen]),
        ("milliseconds a step", [clock_ms(row) for row in chosen]),
    )
    for index, (axis, (label, values)) in enumerate(zip(axes(figure, 2), panels, strict=True)):
        bars = axis.barh(range(len(values)), values, 0.7, color=shades)
        texts = [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values]
        axis.bar_label(bars, labels=texts, color=INK, padding=3, fontsize=8)
        axis.set_yticks(range(len(values)), names if index == 0 else [""] * len(values))
        axis.set_xscale("log")
        axis.margins(x=0.12)
        axis.grid(visible=False, axis="y")
        axis.set_xlabel(label, color=INK)
    title(figure, "Decode attention, 16 heads, 4096 cached tokens, bfloat16")


def _ours(rows: Rows) -> str:
    found = unique(rows, "impl")
    return next((name for name in OURS if name in found), "")
