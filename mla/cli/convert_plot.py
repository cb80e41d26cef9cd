"""One picture of a conversion: what each layer keeps and loses, and what other budgets would cost.

The background is opaque and light, so that it reads the same on light and dark pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mla.cli.plot import INK, PAPER, new_figure

ROPE, LATENT, OUTPUT = "#2F6DB5", "#D2691E", "#4B9B69"


def write_conversion_plot(report: dict[str, Any], path: Path) -> None:
    """Draw ``report`` (what `convert` writes to report.json) to a PNG at ``path``."""
    figure, axes = new_figure(2, 2)
    share = report["kept_numbers"] / report["original_numbers"]
    figure.suptitle(f"{report['model']}: {share:.0%} of the cached numbers", color=INK)
    _draw_sizes(axes[0, 0], report["layers"])
    _draw_errors(axes[0, 1], report["layers"])
    _draw_spectrum(axes[1, 0], report["layers"])
    _draw_budgets(axes[1, 1], report["budgets"], share)
    figure.savefig(path, dpi=130, facecolor=PAPER)


def _draw_sizes(axis: Any, layers: Sequence[dict[str, Any]]) -> None:
    number = range(len(layers))
    rope = [layer["rope_dim"] for layer in layers]
    axis.bar(number, rope, color=ROPE, label="rotated key")
    latent = [layer["latent_dim"] for layer in layers]
    axis.bar(number, latent, bottom=rope, color=LATENT, label="latent")
    axis.set_title("cached numbers of a token", color=INK)
    axis.set_xlabel("layer", color=INK)
    axis.margins(y=0.2)
    axis.legend(frameon=False, labelcolor=INK, ncols=2, loc="upper center")


def _draw_errors(axis: Any, layers: Sequence[dict[str, Any]]) -> None:
    for key, label, colour, style in (
        ("output_error", "output", LATENT, "o-"),
        ("score_error", "scores", ROPE, "s--"),
        ("value_error", "values", OUTPUT, "^:"),
    ):
        errors = [layer[key] for layer in layers]
        axis.plot(range(len(layers)), errors, style, color=colour, label=label, markersize=4)
    axis.set_title("estimated relative error of each layer's fit", color=INK)
    axis.set_xlabel("layer", color=INK)
    axis.margins(y=0.2)
    axis.legend(frameon=False, labelcolor=INK, ncols=3, loc="upper center")


def _draw_spectrum(axis: Any, layers: Sequence[dict[str, Any]]) -> None:
    """Share of the energy that is lost when the latent has C numbers, first layers dark."""
    for index, layer in enumerate(layers):
        energies = layer["spectrum"]
        left = [sum(energies[width:]) for width in range(len(energies))]
        shade = index / max(len(layers) - 1, 1)
        axis.semilogy(left, color=(0.15 + 0.75 * shade, 0.3 + 0.2 * shade, 0.6 - 0.5 * shade))
    axis.set_title("energy beyond a latent of C numbers, blue: first layer", color=INK)
    axis.set_xlabel("C", color=INK)
    axis.set_ylabel("share", color=INK)
    axis.set_ylim(bottom=1e-4)


def _draw_budgets(axis: Any, budgets: Sequence[dict[str, float]], share: float) -> None:
    axis.set_title("measured error of all layers, by budget", color=INK)
    axis.set_xlabel("share of the cached numbers", color=INK)
    axis.set_ylabel("error / residual stream (mean square)", color=INK)
    if not budgets:  # sizes were given, or the layout is common: nothing was measured
        axis.text(0.5, 0.5, "not measured", color=INK, ha="center", transform=axis.transAxes)
        return
    axis.plot([b["share"] for b in budgets], [b["error"] for b in budgets], "o-", color=LATENT)
    axis.axvline(share, color=INK, linestyle=":")
