"""One picture of a healing: the loss step by step, and the error of each layer before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mla.cli.console import require
from mla.cli.plot import COLOURS, INK, PAPER

HEALED = "#2F6DB5"


def write_heal_plot(report: dict[str, Any], path: Path) -> None:
    """Draw ``report`` (what `heal` writes to heal.json) to a PNG at ``path``."""
    require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = 2 if report["layers"] else 1
    figure = Figure(figsize=(5.6 * panels, 4.0), facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.set_facecolor(PAPER)
        axis.tick_params(colors=INK)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#DDDDDD", linewidth=0.8)
        axis.set_axisbelow(True)
    before, after = (report[name]["ratio"] for name in ("before", "after"))
    figure.suptitle(
        f"{report['model']}: perplexity ratio {before:.3f} before healing, {after:.3f} after",
        color=INK,
    )
    _draw_losses(axes[0], report)
    if report["layers"]:
        _draw_layers(axes[1], report["layers"])
    figure.savefig(path, dpi=130, facecolor=PAPER)


def _draw_losses(axis: Any, report: dict[str, Any]) -> None:
    losses = [float("nan") if loss is None else loss for loss in report["losses"]]
    steps = range(1, len(losses) + 1)
    axis.plot(steps, losses, color=COLOURS["original"], linewidth=0.7, label="training window")
    points = [(x["step"], x["divergence"]) for x in report["held_out"] if x["divergence"]]
    axis.plot(*zip(*points, strict=True), "o-", color=HEALED, markersize=4, label="held-out text")
    axis.axhline(
        report["divergence_before"], color=COLOURS["converted"], linestyle=":", label="before"
    )
    axis.axvline(report["best_step"], color=HEALED, linewidth=0.8, alpha=0.5)
    axis.set_title("distance of the predictions from the original's", color=INK)
    axis.set_xlabel("step; the vertical line is where the weights are from", color=INK)
    axis.set_ylabel("KL, nats a token", color=INK)
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, labelcolor=INK)


def _draw_layers(axis: Any, layers: list[dict[str, float]]) -> None:
    number = range(len(layers))
    for name, colour in (("before", COLOURS["converted"]), ("after", HEALED)):
        axis.plot(number, [x[name] for x in layers], "o-", color=colour, markersize=4, label=name)
    axis.set_yscale("log")
    axis.set_title("squared error of each layer's output, matched alone", color=INK)
    axis.set_xlabel("layer", color=INK)
    axis.set_ylabel("relative to the residual stream", color=INK)
    axis.legend(frameon=False, labelcolor=INK)
