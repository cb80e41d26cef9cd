"""The rows of `convert_report` as tables, with what was to be reached, and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

# Share of saved bytes: perplexity ratio without training, after healing.
GOALS = {0.25: (1.05, 1.03), 0.5: (1.18, 1.10), 0.6: (1.08, 1.05), 0.75: (1.22, 1.12)}
Row = Mapping[str, Any]


def show_tables(rows: Sequence[Row], console: Console) -> None:
    """One table by budget for each model, one of all codecs, then sentences."""
    for model in dict.fromkeys(str(row["model"]) for row in rows):
        own = [row for row in rows if row["model"] == model]
        console.print(budget_table(model, own))
        if len({row["codec"] for row in own if row["method"] == "ours"}) > 1:
            console.print(codec_table(model, own))
        for line in sentences(model, own):
            console.print(line, soft_wrap=True)
    console.print(
        "Speed of decoding at 4096 tokens, converted against original: `make demo` and the rows "
        "smollm2 of `python -m benchmarks.bench_models`.",
        soft_wrap=True,
    )


def budgets(rows: Sequence[Row]) -> list[float]:
    """Shares of saved bytes that were asked for."""
    return sorted({float(row["saved"]) for row in rows if row["saved"] is not None})


def at(rows: Sequence[Row], method: str, saved: float) -> list[Row]:
    """Rows of one method at one budget, best first."""
    found = [row for row in rows if row["method"] == method and row["saved"] == saved]
    return sorted(found, key=lambda row: float(row["ratio"] or 0))


def within(rows: Sequence[Row], method: str, saved: float) -> list[Row]:
    """Rows of one method that save at least that much, best first."""
    found = [
        row
        for row in rows
        if row["method"] == method
        and float(row["bytes_per_token"]) <= (1 - saved) * float(row["original_bytes"])
    ]
    return sorted(found, key=lambda row: float(row["ratio"] or 0))


def goal_row(rows: Sequence[Row], saved: float) -> Row | None:
    """Ours with the codec that the published objective was given too, else the best."""
    codecs = {row["codec"] for row in at(rows, "published", saved)}
    ours = at(rows, "ours", saved)
    return next((row for row in ours if row["codec"] in codecs), ours[0] if ours else None)


def budget_table(model: str, rows: Sequence[Row]) -> Table:
    """By share of saved bytes: ours, healed, the published objective, quantised GQA."""
    has_goals = any(row["method"] == "ours" for row in rows) and "tiny" not in model
    table = Table(title=f"{model}: perplexity over the unconverted model's", title_justify="left")
    columns = ["saved", "rows", "bytes"]
    columns += ["untrained", "goal", "healed", "goal"] if has_goals else ["untrained"]
    columns += ["published", "times ours", "best ours", "quantised GQA"]
    for column in columns:
        table.add_column(column, justify="left" if column == "rows" else "right", no_wrap=True)
    for saved in budgets(rows):
        goals = [f"<= {goal:.2f}" for goal in GOALS.get(saved, ())] or ["", ""]
        ours, healed = goal_row(rows, saved), next(iter(at(rows, "healed", saved)), None)
        published = next(iter(at(rows, "published", saved)), None)
        cells = [f"{saved:.0%}", "" if ours is None else str(ours["codec"])]
        cells.append("" if ours is None else f"{float(ours['bytes_per_token']):,.0f}")
        untrained = [_with_error(ours)]
        cells += [*untrained, goals[0], _with_error(healed), goals[1]] if has_goals else untrained
        cells.append(f"{_with_error(published)} F={published['fold']}" if published else "")
        times = float(published["ratio"]) / float(ours["ratio"]) if published and ours else None
        cells.append("" if times is None else f"{times:.2f}")
        best = [*within(rows, "ours", saved)][:1]
        cells.append(f"{_ratio(best[0])} {best[0]['codec']}" if best else "")
        grouped = within(rows, "grouped", saved)[:1]
        cells.append(f"{_ratio(grouped[0])} {grouped[0]['codec']}" if grouped else "")
        table.add_row(*cells)
    return table


def codec_table(model: str, rows: Sequence[Row]) -> Table:
    """Ours by codec and share of saved bytes; 1.000 of bytes means nothing was cut but digits."""
    codecs = list(dict.fromkeys(str(row["codec"]) for row in rows if row["method"] == "ours"))
    table = Table(title=f"{model}: untrained, by budget and codec", title_justify="left")
    table.add_column("rows", no_wrap=True)
    for saved in budgets(rows):
        table.add_column(f"{saved:.0%} saved", justify="right", no_wrap=True)
    for codec in codecs:
        cells = []
        for saved in budgets(rows):
            found = [row for row in at(rows, "ours", saved) if row["codec"] == codec]
            cells.append(
                f"{_ratio(found[0])} ({float(found[0]['kv_budget']):.0%})" if found else ""
            )
        table.add_row(codec, *cells)
    table.caption = "in brackets: cached numbers that are left; empty: as at the next larger share"
    table.caption_justify = "left"
    return table


def sentences(model: str, rows: Sequence[Row]) -> list[str]:
    """Who wins at each budget, and where absorbed decoding computes less."""
    found = []
    for saved in budgets(rows):
        rivals = [
            row
            for method in ("ours", "healed", "published", "grouped")
            for row in within(rows, method, saved)[:1]
        ]
        if len({row["method"] for row in rivals}) > 1:
            best = min(rivals, key=lambda row: float(row["ratio"]))
            name = "the quantised GQA cache" if best["method"] == "grouped" else best["method"]
            found.append(
                f"{model}, {saved:.0%} saved: {name} wins with {_ratio(best)}, "
                f"rows {best['codec']}, {float(best['bytes_per_token']):,.0f} bytes."
            )
    for saved in budgets(rows):
        ours = goal_row(rows, saved)
        if ours is not None and ours.get("per_key_times") is not None:
            tokens = ours["crossover_tokens"]
            where = (
                "no crossover" if tokens is None else f"crossover at {float(tokens):,.0f} tokens"
            )
            found.append(
                f"{model}, {saved:.0%} saved: decoding takes {float(ours['per_key_times']):.1f} "
                f"times the multiply-adds of the original for each cached token; {where}."
            )
    return found


def _ratio(row: Row) -> str:
    return f"{float(row['ratio']):.3f}"


def _with_error(row: Row | None) -> str:
    return "" if row is None else f"{_ratio(row)} +- {float(row['ratio_error']):.3f}"
