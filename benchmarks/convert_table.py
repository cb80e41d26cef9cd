"""The rows of `convert_report` as tables, with what was to be reached, and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

# Share of saved bytes: perplexity ratio without training, after healing.
GOALS = {0.25: (1.05, 1.03), 0.5: (1.18, 1.10), 0.6: (1.08, 1.05), 0.75: (1.22, 1.12)}
HAS_GOALS = ("SmolLM2-135M",)
Row = Mapping[str, Any]


def show_tables(rows: Sequence[Row], console: Console) -> None:
    """For each model by budget: ours and the published objective, all codecs, who wins."""
    for model in dict.fromkeys(str(row["model"]) for row in rows):
        own = [row for row in rows if row["model"] == model]
        if any(row["method"] in ("ours", "published", "healed") for row in own):
            console.print(budget_table(model, own))
            console.print(winner_table(model, own))
        if len({row["codec"] for row in own if row["method"] == "ours"}) > 1:
            console.print(codec_table(model, own))
    for line in arithmetic_lines(rows):
        console.print(line, soft_wrap=True)


def budgets(rows: Sequence[Row]) -> list[float]:
    """Shares of saved bytes that were asked for."""
    return sorted({row["saved"] for row in rows if row["saved"] is not None})


def at(rows: Sequence[Row], method: str, saved: float) -> list[Row]:
    """Rows of one method at one budget, best first."""
    found = [row for row in rows if row["method"] == method and row["saved"] == saved]
    return sorted(found, key=lambda row: row["ratio"])


def within(rows: Sequence[Row], method: str, saved: float) -> list[Row]:
    """Rows of one method that save at least that much, best first."""
    found = [
        row
        for row in rows
        if row["method"] == method and row["bytes_per_token"] <= (1 - saved) * row["original_bytes"]
    ]
    return sorted(found, key=lambda row: row["ratio"])


def goal_row(rows: Sequence[Row], saved: float) -> Row | None:
    """Ours with the codec that the published objective was given too, else the best."""
    codecs = {row["codec"] for row in at(rows, "published", saved)}
    ours = at(rows, "ours", saved)
    return next((row for row in ours if row["codec"] in codecs), ours[0] if ours else None)


def budget_table(model: str, rows: Sequence[Row]) -> Table:
    """The codec of each goal: ours, healed, and the published objective with the best fold F."""
    columns = ["saved", "rows", "bytes", "untrained", "goal", "healed", "goal", "published"]
    table = _table(f"{model}: perplexity / that of the unconverted model", [*columns, "/ ours"])
    for saved in budgets(rows):
        goals = [f"{goal:.2f}" for goal in GOALS[saved]] if model in HAS_GOALS else ["", ""]
        ours = goal_row(rows, saved)
        healed, published = (first(at(rows, name, saved)) for name in ("healed", "published"))
        both = ours is not None and published is not None
        table.add_row(
            f"{saved:.0%}",
            "" if ours is None else codec_name(ours["codec"]),
            "" if ours is None else f"{ours['bytes_per_token']:,}",
            *(_with_error(ours), goals[0], _with_error(healed), goals[1]),
            f"{_with_error(published)} F={published['fold']}" if published else "",
            f"{published['ratio'] / ours['ratio']:.2f}" if both and published and ours else "",
        )
    return table


def winner_table(model: str, rows: Sequence[Row]) -> Table:
    """The best of each method within the bytes of each budget; the best of all is marked."""
    methods = {"ours": "converted", "healed": "healed", "published": "published"}
    methods["grouped"] = "quantised GQA"
    table = _table(f"{model}: the best within those bytes", ["saved", "bytes", *methods.values()])
    for saved in budgets(rows):
        best = {method: first(within(rows, method, saved)) for method in methods}
        least = min((row["ratio"] for row in best.values() if row is not None), default=None)
        room = (1 - saved) * rows[0]["original_bytes"]
        cells = [
            ""
            if row is None
            else f"{_ratio(row)} {codec_name(row['codec'])}{' *' if row['ratio'] == least else ''}"
            for row in best.values()
        ]
        table.add_row(f"{saved:.0%}", f"{room:,.0f}", *cells)
    table.caption, table.caption_justify = "* the best of all", "left"
    return table


def codec_table(model: str, rows: Sequence[Row]) -> Table:
    """Ours by codec and share of saved bytes, with the share of numbers that is left."""
    codecs = list(dict.fromkeys(row["codec"] for row in rows if row["method"] == "ours"))
    shares = [f"{saved:.0%} saved" for saved in budgets(rows)]
    table = _table(f"{model}: untrained, by codec (numbers left)", ["rows", *shares])
    for codec in codecs:
        cells = []
        for saved in budgets(rows):
            row = first([row for row in at(rows, "ours", saved) if row["codec"] == codec])
            cells.append("" if row is None else f"{_ratio(row)} ({row['kv_budget']:.0%})")
        table.add_row(codec_name(codec), *cells)
    table.caption = "empty: full rank fits a larger share too, or nothing that was tried fits"
    table.caption_justify = "left"
    return table


def arithmetic_lines(rows: Sequence[Row]) -> list[str]:
    """Where absorbed decoding computes less, from the smallest to the largest share of bytes."""
    found = []
    for row in rows:
        if row["method"] == "ours" and row["codec"] == "plain":
            tokens = row["crossover_tokens"]
            where = "no crossover" if tokens is None else f"crossover at {tokens:,.0f} tokens"
            found.append(
                f"{row['model']}, {row['saved']:.0%} saved: decoding takes "
                f"{row['per_key_times']:.1f} times the multiply-adds of the original for each "
                f"cached token; {where}."
            )
    return [
        *found,
        "Measured speed at 4096 tokens, converted against original: `make demo` and the rows "
        "smollm2 of `python -m benchmarks.bench_models`.",
    ]


def first(rows: Sequence[Row]) -> Row | None:
    """The first row; None where there is none."""
    return rows[0] if rows else None


def codec_name(spec: str) -> str:
    """A codec in few letters: ``int8`` has rope in 16 bits, ``int8 r8`` in 8."""
    if spec == "plain":
        return "bf16"
    kind, *options = spec.split("/")
    if len(options) < 3:  # of a grouped cache: bits and group
        return "/".join([kind, *options])
    return f"{kind} r8" if options[1] == "8" else kind


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == "rows" else "right", no_wrap=True)
    return table


def _ratio(row: Row) -> str:
    return f"{row['ratio']:.3f}"


def _with_error(row: Row | None) -> str:
    return "" if row is None else f"{_ratio(row)} +-{row['ratio_error']:.3f}"
