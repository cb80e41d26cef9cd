"""What converting a model costs, by bytes: ours, the published objective, plain quantisation.

    make convert-report            within 40 minutes on two cores, healed rows with HEAL=1
    python -m benchmarks.convert_report --quick     small sizes, to see that it runs

SmolLM2-135M-Instruct Q4_1 on held-out Wikipedia text, and a tiny model with multi-head attention,
trained here. ``ratio`` is the perplexity over that of the unconverted model, from paired
differences on the same tokens, ``ratio_error`` its standard error over windows. Every token
attends to rows as the codec gives them back; bytes count scales and padding.

Each row is written as soon as it is measured; a later run goes on after the rows that are there
with the same settings. Rows: OUT/convert.csv; then a table, OUT/convert.png and .svg.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import convert_plots
from benchmarks.convert_lab import Converted, Lab
from benchmarks.convert_mha import CONTEXT, byte_windows, tiny_mha
from benchmarks.convert_table import show_tables
from benchmarks.report import ROOT, Row, terminal, write
from mla.cli.costs import arithmetic, grouped_sizes
from mla.codec import Codec, Fp8Codec, Int4Codec, Int8Codec, PlainCodec
from mla.convert import compare_losses
from mla.integrations.converted.quantised_gqa import GroupedCodec
from mla.plan import bytes_per_token

DATA = ROOT / ".cache" / "mla"
MODEL_FOLDER = DATA / "smollm2-135m-instruct-q4_1"
CALIBRATION, EVALUATION = DATA / "text/calibration.txt", DATA / "text/evaluation.txt"
SMOLLM2, TINY = "SmolLM2-135M", "tiny MHA"
FOLDS = (1, 2, 4)
# The combination that a share of saved bytes is asked of, then the others.
GOAL_CODECS: dict[float, Codec] = {
    0.25: PlainCodec(),
    0.5: PlainCodec(),
    0.6: Int8Codec(rope_bits=8),
    0.75: Int4Codec(rope_bits=8),
}
TINY_CODECS: dict[float, Codec] = {0.5: PlainCodec(), 0.75: PlainCodec()}
CODECS: tuple[Codec, ...] = (
    PlainCodec(),
    Int8Codec(rope_bits=8),
    Int4Codec(rope_bits=8),
    Int8Codec(),
    Int4Codec(),
    Fp8Codec(),
)
GROUPED = (
    GroupedCodec(bits=8),
    GroupedCodec(bits=5, group=32),
    GroupedCodec(bits=4, group=32),
    GroupedCodec(bits=3, group=32),
    GroupedCodec(bits=2, group=32),
)
KEY = ("model", "method", "saved", "codec", "fold")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a row depends on besides its case."""

    windows: int = 8
    context: int = 1024
    tokens: int = 65536
    mha_minutes: float = 5.0
    heal_minutes: float = 25.0


QUICK = Settings(windows=2, context=256, tokens=4096, mha_minutes=0.2, heal_minutes=0.2)


class Case(NamedTuple):
    """One row to measure; ``saved`` is the share of bytes that it must save."""

    model: str
    method: str  # ours | healed | published | grouped
    saved: float | None
    codec: Codec | GroupedCodec
    fold: int | None = None

    @property
    def columns(self) -> Row:
        return {
            "model": self.model,
            "method": self.method,
            "saved": self.saved,
            "codec": self.codec.spec,
            "fold": self.fold,
        }


class RowFile:
    """The rows so far, written whole after each one."""

    def __init__(self, folder: Path, settings: Settings, *, fresh: bool) -> None:
        self.folder, self.settings = folder, settings
        path = folder / "convert.json"
        held = json.loads(path.read_text())["rows"] if path.is_file() and not fresh else []
        self.rows: list[Row] = [{k: v for k, v in row.items() if k != "benchmark"} for row in held]

    def has(self, case: Case) -> bool:
        """Whether the row is there with these settings."""
        wanted = {**case.columns, **self._settings_of(case)}
        return any(all(row.get(k) == v for k, v in wanted.items()) for row in self.rows)

    def add(self, case: Case, measured: Row) -> None:
        """Put a row in the place of the one with other settings, or at the end."""
        row = {**case.columns, **measured, **self._settings_of(case)}
        kept = [old for old in self.rows if any(old.get(k) != row[k] for k in KEY)]
        self.rows = [*kept, row]
        write("convert", self.rows, self.folder)
        # What was written carries the environment; rows keep that of their own run.
        self.rows = [
            {k: v for k, v in row.items() if k != "benchmark"}
            for row in json.loads((self.folder / "convert.json").read_text())["rows"]
        ]

    def _settings_of(self, case: Case) -> Row:
        is_tiny, is_healed = case.model == TINY, case.method == "healed"
        return {
            "windows": self.settings.windows,
            "context": self.settings.context,
            "calibration_tokens": self.settings.tokens,
            "mha_minutes": self.settings.mha_minutes if is_tiny else None,
            "heal_minutes": self.settings.heal_minutes if is_healed else None,
        }


def cases(*, heal: bool) -> list[Case]:
    """All rows, those of the goals first."""
    found = [Case(SMOLLM2, "grouped", None, codec) for codec in GROUPED]
    found += [Case(SMOLLM2, "ours", saved, codec) for saved, codec in GOAL_CODECS.items()]
    for model, codecs in ((SMOLLM2, GOAL_CODECS), (TINY, TINY_CODECS)):
        if model == TINY:
            found += [Case(TINY, "ours", saved, codec) for saved, codec in codecs.items()]
        for saved, codec in codecs.items():
            found += [Case(model, "published", saved, codec, fold) for fold in FOLDS]
    found += [Case(TINY, "grouped", None, codec) for codec in GROUPED]
    if heal:
        found += [Case(SMOLLM2, "healed", saved, codec) for saved, codec in GOAL_CODECS.items()]
    others = [Case(SMOLLM2, "ours", saved, codec) for codec in CODECS for saved in GOAL_CODECS]
    return found + [case for case in others if case not in found]


def measure(case: Case, lab: Lab, settings: Settings) -> Row | None:
    """One row; None where a tighter budget gives the same one, or nothing is small enough."""
    start = time.perf_counter()
    if isinstance(case.codec, GroupedCodec):
        _, _, G, d = grouped_sizes(lab.model.config)
        sizes: Row = {"bytes_per_token": lab.host.num_layers * case.codec.bytes_per_token(G, d)}
        losses = lab.grouped_losses(case.codec)
    else:
        converted = _convert(case, case.codec, lab, settings)
        if converted is None:
            return None
        sizes = _sizes(converted, case.codec, lab)
        losses = lab.losses(converted, case.codec)
    found = compare_losses(lab.original_losses, losses)
    return {
        **sizes,
        "original_bytes": lab.original_bytes,
        "perplexity": found.after,
        "ratio": found.ratio,
        "ratio_error": found.ratio_error,
        "seconds": round(time.perf_counter() - start, 1),
    }


def _convert(case: Case, codec: Codec, lab: Lab, settings: Settings) -> Converted | None:
    assert case.saved is not None
    share = 1.0 - case.saved
    try:
        if case.method == "published":
            assert case.fold is not None
            return lab.published(share, codec, case.fold)
        numbers = lab.numbers(share, codec)
    except ValueError:
        return None
    tighter = [1.0 - saved for saved in GOAL_CODECS if saved > case.saved]
    if numbers == lab.full and any(lab.numbers(max(tighter), codec) == numbers for _ in tighter):
        return None
    if case.method == "ours":
        return lab.converted(share, codec)
    return lab.healed(numbers, minutes=settings.heal_minutes)


def _sizes(converted: Converted, codec: Codec, lab: Lab) -> Row:
    """What a converted model caches and computes."""
    found = arithmetic(lab.model.config, converted.configs, [])
    per_key = found["per_cached_token"]
    return {
        "kv_budget": converted.kv_budget,
        "rope_dims": sum(config.qk_rope_head_dim for config in converted.configs),
        "latent_dims": sum(config.kv_lora_rank for config in converted.configs),
        "bytes_per_token": sum(bytes_per_token(config, codec) for config in converted.configs),
        "per_key_times": per_key["converted"] / per_key["original"],
        "crossover_tokens": found["crossover_tokens"],
    }


def labs(settings: Settings, work: Path, progress: Callable[..., None]) -> dict[str, Any]:
    """Functions that make the lab of each model, called when its first row is measured."""
    from mla.cli.models import (
        calibration_windows,
        go_offline,
        load_model,
        load_tokenizer,
        read_text,
    )
    from mla.convert import token_windows

    go_offline()

    def smollm2() -> Lab:
        tokenizer = load_tokenizer(MODEL_FOLDER)
        evaluation = token_windows(
            tokenizer, read_text(EVALUATION), count=settings.windows, length=settings.context
        )
        return Lab(
            load_model(MODEL_FOLDER, device=torch.device("cpu"), dtype=torch.float32),
            calibration_windows(tokenizer, CALIBRATION, settings.tokens),
            evaluation,
            folder=work / f"survey-{settings.tokens}",
            progress=progress,
        )

    def tiny() -> Lab:
        model = tiny_mha(
            CALIBRATION,
            work / f"tiny-mha-{settings.mha_minutes:g}",
            minutes=settings.mha_minutes,
            progress=lambda done, total: progress("train tiny MHA, seconds", done, total),
        )
        length = min(settings.context, CONTEXT)
        return Lab(
            model,
            byte_windows(CALIBRATION, count=settings.tokens // length, length=length),
            byte_windows(EVALUATION, count=4 * settings.windows, length=length),
            progress=progress,
        )

    return {SMOLLM2: lru_cache(smollm2), TINY: lru_cache(tiny)}


def run(
    wanted: Sequence[Case],
    makers: dict[str, Callable[[], Lab]],
    rows: RowFile,
    settings: Settings,
    *,
    minutes: float,
    say: Callable[[str], None],
) -> list[Case]:
    """Measure the rows that are not there; returns those for which there was no time."""
    start = time.perf_counter()
    missing = [case for case in wanted if not rows.has(case)]
    say(f"convert-report: {len(missing)} of {len(wanted)} rows to measure")
    for index, case in enumerate(missing):
        if minutes and time.perf_counter() - start > 60 * minutes:
            return missing[index:]
        measured = measure(case, makers[case.model](), settings)
        if measured is None:
            say(f"  {label(case)}: no row of its own")
            continue
        rows.add(case, measured)
        ratio, seconds = measured["ratio"], measured["seconds"]
        say(f"  {label(case)}: {ratio:.4f} +- {measured['ratio_error']:.4f}, {seconds:.0f} s")
    return []


def label(case: Case) -> str:
    """A row in words."""
    words = [case.model, case.method, case.codec.spec]
    words += [] if case.saved is None else [f"{case.saved:.0%} saved"]
    words += [] if case.fold is None else [f"fold {case.fold}"]
    return ", ".join(words)


@contextmanager
def bars() -> Iterator[Callable[[str, int, int], None]]:
    """One bar for whatever is going on."""
    from mla.cli.console import progress

    with progress() as shown:
        tasks: dict[str, Any] = {}

        def on_progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                for task in tasks.values():
                    shown.remove_task(task)
                tasks.clear()
                tasks[what] = shown.add_task(what, total=total)
            shown.update(tasks[what], completed=done, total=total)

        yield on_progress


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if not MODEL_FOLDER.is_dir():
        print(
            f"convert-report: failed: {MODEL_FOLDER} does not exist; run make data", file=sys.stderr
        )
        return 1
    base = QUICK if options.quick else Settings()
    given = {name: getattr(options, name) for name in vars(base) if name in vars(options)}
    settings = replace(base, **{k: v for k, v in given.items() if v is not None})
    rows = RowFile(options.out, settings, fresh=options.fresh)
    wanted = [case for case in cases(heal=options.heal) if options.only in label(case)]
    with bars() as progress:
        left = run(
            [] if options.show else wanted,
            labs(settings, options.work, progress),
            rows,
            settings,
            minutes=options.minutes,
            say=lambda text: print(text, flush=True),
        )
    show_tables(rows.rows, terminal())
    figures = convert_plots.draw(options.out / "convert.csv", options.out)
    print(
        f"convert-report: {len(rows.rows)} rows in {options.out / 'convert.csv'}, plot in "
        f"{figures[0]}"
    )
    if left:
        print(f"convert-report: {len(left)} rows left for lack of time; run it again to go on")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert-report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="2 windows of 256 tokens")
    parser.add_argument("--heal", action="store_true", help="rows after a short distillation too")
    parser.add_argument("--fresh", action="store_true", help="forget the rows that are there")
    parser.add_argument("--show", action="store_true", help="tables and plot of the rows so far")
    parser.add_argument("--only", default="", metavar="WORDS", help="rows whose label has this")
    parser.add_argument(
        "--minutes",
        type=float,
        default=0.0,
        metavar="N",
        help="begin no row after that time (default: no limit)",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench", metavar="DIR")
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / ".cache" / "convert",
        metavar="DIR",
        help="for the survey and the tiny model (default: .cache/convert)",
    )
    for name, what in (
        ("windows", "of evaluation text"),
        ("context", "tokens of a window"),
        ("tokens", "of calibration text"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=what)
    parser.add_argument("--mha-minutes", type=float, metavar="N", help="of training the tiny MHA")
    parser.add_argument("--heal-minutes", type=float, metavar="N", help="of healing, each row")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
