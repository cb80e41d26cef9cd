"""What `make gpu` left, against its goals: ``python -m benchmarks.gpu_report FOLDER``.

A table of goals on the terminal and, where matplotlib is installed, ``gpu_roofline.png`` and
``gpu_prefill.png`` beside the rows. A range of cases is as good as its worst one. Rows of prefill
that beat every backend of SDPA, forward and backward, are printed as `mla.ops.select` lists them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import gpu_measure

Rows = list[dict[str, Any]]


class Goal(NamedTuple):
    case: str
    unit: str
    goal: float
    stretch: float
    measured: float | None  # None: a row that it needs is missing


def rows_of(part: str, folder: Path) -> Rows:
    """Timed rows of one part."""
    return [row for row in gpu_measure.read(part, folder)[1] if row.get("median_ms")]


def pick(rows: Rows, **wanted: Any) -> Rows:
    """Rows with these values; a tuple names several."""

    def fits(row: dict[str, Any]) -> bool:
        return all(
            row.get(key) in value if isinstance(value, tuple) else row.get(key) == value
            for key, value in wanted.items()
        )

    return [row for row in rows if fits(row)]


def least(values: Iterable[float | None]) -> float | None:
    found = list(values)
    return None if not found or None in found else min(v for v in found if v is not None)


def speed_up(rows: Rows, baseline: Rows, keys: Sequence[str]) -> list[float | None]:
    """For each baseline, fastest of its point: its time over that of the row at the same point."""
    fastest: dict[tuple[Any, ...], float] = {}
    for row in baseline:
        point = tuple(row[key] for key in keys)
        fastest[point] = min(fastest.get(point, float("inf")), row["median_ms"])
    ours = {tuple(row[key] for key in keys): row["median_ms"] for row in rows}
    return [time / ours[point] if point in ours else None for point, time in fastest.items()]


def goals(folder: Path) -> list[Goal]:
    """Each goal with what was measured."""
    decode, prefill = rows_of("decode", folder), rows_of("prefill", folder)
    usual = {"L": 1, "codec": "plain", "Z": 64}
    ours = pick(decode, impl="triton", **usual)
    long = {"B": (64, 128), "S": (4096, 8192, 16384, 32768)}
    engines = pick(decode, impl="engines", H=128, **long)
    append = pick(rows_of("append", folder), impl="triton", codec="plain", B=1, L=4096)

    def column(rows: Rows, name: str) -> float | None:
        return least(row[name] for row in rows)

    found = [
        Goal("decode, 16 heads, batch 64-128", "of copy", 0.8, 0.9,
             column(pick(ours, H=16, **long), "share_of_copy")),
        Goal("decode, 16 heads, batch 1, 64K", "of copy", 0.6, 0.8,
             column(pick(ours, H=16, B=1, S=65536), "share_of_copy")),
        Goal("decode, 128 heads, batch 64-128", "TFLOP/s", 300, 430,
             _scaled(column(pick(ours, H=128, **long), "flops_per_second"), 1e-12)),
        Goal("against two loads, 128 heads", "times", 2, 3,
             least(speed_up(pick(ours, H=128), engines, ("B", "S")))),
        Goal("  that scheme itself at 4K, to be honest", "TFLOP/s", 80, 80,
             _scaled(column(pick(engines, S=4096), "flops_per_second"), 1e-12)),
    ]  # fmt: skip
    for mode in ("forward", "backward"):
        mine = pick(prefill, impl="triton", mode=mode)
        times = speed_up(mine, _sdpa(prefill, mode), ("L",))
        found.append(Goal(f"prefill, {mode}, 8K-16K", "of SDPA", 0.85, 1.2, least(times)))
    found.append(Goal("append of 4096", "of copy", 0.7, 0.85, column(append, "share_of_copy")))
    return found


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def _sdpa(rows: Rows, mode: str) -> Rows:
    """SDPA on the whole op, expansion included."""
    return [row for row in pick(rows, mode=mode, given=0) if row["impl"] not in ("triton", "torch")]


def wins(folder: Path) -> list[int]:
    """Lengths from which Triton's prefill was ahead of SDPA, forward and backward; the least."""
    rows = rows_of("prefill", folder)
    lengths = sorted({row["L"] for row in rows})
    ahead = []
    for L in reversed(lengths):
        ratios = [
            ratio
            for mode in ("forward", "backward")
            for ratio in speed_up(
                pick(rows, impl="triton", mode=mode, L=L), pick(_sdpa(rows, mode), L=L), ("L",)
            )
        ]
        if len(ratios) < 2 or not all(ratio is not None and ratio > 1 for ratio in ratios):
            break
        ahead.append(L)
    return ahead[-1:]


def table(found: Sequence[Goal]) -> str:
    lines = [f"{'case':40} {'measured':>9} {'goal':>6} {'stretch':>8}"]
    for row in found:
        value = "-" if row.measured is None else f"{row.measured:.3g}"
        is_met = row.measured is not None and row.measured >= row.goal
        verdict = "missing" if row.measured is None else "reached" if is_met else "MISSED"
        lines.append(
            f"{row.case:40} {value:>9} {row.goal:>6g} {row.stretch:>8g} {row.unit:8} {verdict}"
        )
    return "\n".join(lines)


def draw_roofline(folder: Path, path: Path) -> None:
    """Flop/s over flops per byte of every timed row, under the ceilings of the same run."""
    facts = gpu_measure.read("decode", folder)[0]
    copy, product = facts["copy_bytes_per_second"], facts["matmul_flops_per_second"]

    def draw(axes: Any) -> None:
        reach = [1.0, product / copy, 1e4]
        axes.plot(reach, [min(copy * x, product) / 1e12 for x in reach], color="black")
        for part in ("decode", "prefill"):
            for impl in sorted({row["impl"] for row in rows_of(part, folder)}):
                rows = [r for r in pick(rows_of(part, folder), impl=impl) if not r.get("given")]
                places = [row["flops"] / row["bytes"] for row in rows]
                speeds = [row["flops_per_second"] / 1e12 for row in rows]
                axes.scatter(places, speeds, s=14, label=f"{part} {impl}")
        axes.set(xscale="log", yscale="log", xlabel="flops a byte", ylabel="TFLOP/s")
        axes.set_title(f"{facts['device']}, ceilings measured in the same run")

    _save(draw, path)


def draw_prefill(folder: Path, path: Path) -> None:
    """Milliseconds of every implementation, the whole op."""
    rows = [row for row in rows_of("prefill", folder) if not row["given"]]
    names = sorted({row["impl"] for row in rows})
    groups = sorted({(row["mode"], row["L"]) for row in rows}, reverse=True)

    def draw(axes: Any) -> None:
        for i, name in enumerate(names):
            times = {(row["mode"], row["L"]): row["median_ms"] for row in pick(rows, impl=name)}
            places = [j + i / (len(names) + 1) for j in range(len(groups))]
            axes.bar(places, [times.get(group, 0) for group in groups], 0.1, label=name)
        axes.set_xticks(range(len(groups)), [f"{mode} {L}" for mode, L in groups])
        axes.set(ylabel="milliseconds", title="causal prefill, 16 heads of 192 / 128")

    _save(draw, path)


def _save(draw: Callable[[Any], None], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    draw(axes)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    """0; 2 where the folder has no rows."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if len(arguments) != 1:
        print("usage: python -m benchmarks.gpu_report FOLDER", file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    if not any(rows_of(part, folder) for part in ("decode", "prefill", "append")):
        print(f"gpu_report: failed: {folder} has no timed rows", file=sys.stderr)
        return 2
    print(table(goals(folder)))
    for least_keys in wins(folder):
        print(
            f"\nWin(architecture, torch.bfloat16, (192, 128), {least_keys})  # in mla/ops/select.py"
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("\nno plots: matplotlib is not installed")
        return 0
    for part, draw in (("decode", draw_roofline), ("prefill", draw_prefill)):
        if rows_of(part, folder):
            name = "roofline" if part == "decode" else part
            draw(folder, folder / f"gpu_{name}.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
