"""One picture of a demo report: bytes, perplexity, speed and fit error, before and after.

The background is opaque and light, so that it reads the same on light and dark pages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mla.cli.console import require

COLOURS = {"original": "#5B6B7B", "converted": "#D2691E"}
INK, PAPER = "#222222", "#FFFFFF"


def write_plot(report: dict[str, Any], path: Path) -> None:
    """Draw ``report`` (what `demo` writes to report.json) to a PNG at ``path``."""
    figure, axes = new_figure(2, 2)
    figure.suptitle(f"{report['model']}: attention converted to MLA", color=INK)
    _draw_bytes(axes[0, 0], report)
    _draw_perplexity(axes[0, 1], report)
    _draw_speed(axes[1, 0], report)
    _draw_fit(axes[1, 1], report)
    figure.savefig(path, dpi=130, facecolor=PAPER)


def new_figure(rows: int, columns: int) -> tuple[Any, Any]:
    """A figure and its axes, ``[rows, columns]``, in the colours of this file."""
    require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.2), facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns)
    for axis in axes.flat:
        axis.set_facecolor(PAPER)
        axis.tick_params(colors=INK)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#DDDDDD", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def _bars(axis: Any, values: dict[str, float], errors: dict[str, float], text: str) -> None:
    """One bar for each of original and converted, its value on top."""
    names = list(COLOURS)
    heights = [values[name] for name in names]
    bars = axis.bar(names, heights, 0.55, color=[COLOURS[name] for name in names])
    axis.bar_label(bars, labels=[text.format(height) for height in heights], color=INK, padding=4)
    for name, error in errors.items():
        axis.errorbar(name, values[name], yerr=error, ecolor=INK, capsize=4)
    axis.set_ylim(0, 1.18 * max(heights))


def _draw_bytes(axis: Any, report: dict[str, Any]) -> None:
    found = {name: report["bytes_per_token"][name]["bits16"] for name in COLOURS}
    _bars(axis, found, {}, "{:,.0f}")
    axis.set_title("KV cache, all layers, 16-bit values", color=INK)
    axis.set_ylabel("bytes per token", color=INK)


def _draw_perplexity(axis: Any, report: dict[str, Any]) -> None:
    found = report["perplexity"]
    error = found["ratio_standard_error"]  # None for a single window
    errors = {} if error is None else {"converted": found["original"] * error}
    _bars(axis, {name: found[name] for name in COLOURS}, errors, "{:.2f}")
    spread = "" if error is None else f" +- {error:.3f}"
    axis.set_title(f"perplexity: ratio {found['ratio']:.3f}{spread}", color=INK)
    axis.set_ylabel(f"on {found['windows']} x {found['window']} tokens", color=INK)


def _draw_speed(axis: Any, report: dict[str, Any]) -> None:
    contexts = list(report["decode"])
    width = 0.38
    for index, name in enumerate(COLOURS):
        rates = [report["decode"][context]["tokens_per_second"][name] for context in contexts]
        places = [place + (index - 0.5) * width for place in range(len(contexts))]
        bars = axis.bar(places, rates, width, color=COLOURS[name], label=name)
        axis.bar_label(bars, fmt="{:.1f}", color=INK, padding=2)
    axis.set_xticks(range(len(contexts)), [f"{context} tokens" for context in contexts])
    axis.set_title("decoding speed on this machine, by context", color=INK)
    axis.set_ylabel("tokens per second", color=INK)
    axis.margins(y=0.25)
    axis.legend(frameon=False, labelcolor=INK, ncols=2, loc="upper center")


def _draw_fit(axis: Any, report: dict[str, Any]) -> None:
    layers = report["layers"]
    number = range(len(layers))
    kinds = {
        "output_error": ("output", "#D2691E", "o-"),
        "score_error": ("scores", "#2F6DB5", "s--"),
        "value_error": ("values", "#4B9B69", "^:"),
    }
    for key, (label, colour, style) in kinds.items():
        errors = [layer[key] for layer in layers]
        axis.plot(number, errors, style, color=colour, label=label, markersize=4)
    axis.set_title("estimated relative error of each layer's fit", color=INK)
    axis.set_xlabel("layer", color=INK)
    axis.set_ylabel("error / signal (rms)", color=INK)
    axis.set_ylim(0, 1.2 * max(layer[key] for layer in layers for key in kinds) or 1.0)
    axis.legend(frameon=False, labelcolor=INK, ncols=3, loc="upper center")
