"""Measured shares of a device's limits, from the rows that the benchmarks leave as CSV.

    share = bound / measured time

of attention over cached rows, for the implementation that ``impl="auto"`` takes there. A GPU's
bound is that of its data sheet. Rows of a processor carry their share of the limits that were
measured in the same run (column ``of_limit``, and ``bound``), or of its register peak alone (column
``share``). Of the rows with the same number of heads, codec, dtype and bound the nearest in B * S
counts. There is no share where nothing like it was measured: then a prediction is the bound.

How far that is off: ``python -m benchmarks.check_plan`` predicts every row from the others. On the
committed rows of 2 threads of an AVX-512 EPYC, from 4096 cached tokens, measured time is 1.10 to
4.3 times the bound (30 for one head, which memory bounds and the register peak does not), and the
prediction from the nearest other row, four times longer or shorter, is off by -39 to +65 %. Calls
of 128 tokens are mostly overhead that no share knows: 27 to 51 times the bound.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from mla.codec import PlainCodec, codec_from_spec
from mla.config import MLAConfig
from mla.plan.communication import heads_per_device
from mla.plan.devices import PROCESSOR, Device
from mla.plan.roofline import Group, Load, Work, attention_work

FILES = ("gpu_decode.csv", "decode.csv", "cpu.csv")
OURS = {"gpu_decode": "triton", "decode": "cpp", "cpu": "cpp"}
C, R = 512, 64  # of the benchmarks
Row = Mapping[str, str]


class Measured(NamedTuple):
    """One measured call, and the share of its bound that it reached."""

    benchmark: str
    H: int
    B: int
    S: int
    codec: str
    dtype: str
    share: float
    bound: str  # "memory" | "arithmetic"
    seconds: float
    device: str

    @property
    def kind(self) -> tuple[int, str, str, str]:
        """What two calls must have in common to be compared."""
        return self.H, self.codec, self.dtype, self.bound

    def __str__(self) -> str:
        return (
            f"{self.share:.2f} of {self.bound}: "
            f"{OURS[self.benchmark]}, {self.codec}, {self.dtype}, H={self.H} B={self.B} "
            f"S={self.S} on {self.device}"
        )


def default_folder() -> Path | None:
    """Rows beside a checkout; None where the package is installed without them."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
    return folder if folder.is_dir() else None


def read_rows(folder: Path) -> list[Row]:
    """The rows of every known file of ``folder``, each with its ``benchmark``.

    Raises:
        OSError: a file cannot be read.
    """
    found: list[Row] = []
    for name in FILES:
        path = folder / name
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                found += [{**row, "benchmark": path.stem} for row in csv.DictReader(file)]
    return found


def shares(rows: Iterable[Row], device: Device) -> list[Measured]:
    """What the rows say about ``device``: those of its own kind, and of our kernels.

    Raises:
        ValueError: a row lacks a column, or has no number where there should be one.
    """
    found = []
    for row in rows:
        try:
            one = _of_processor(row) if device.driver_name == PROCESSOR else _of_gpu(row, device)
        except (KeyError, ValueError) as error:
            name = row["benchmark"]
            raise ValueError(
                f"shares: a row of {name}.csv has no usable {error}, expected a row of "
                f"benchmarks.{name if name.startswith('gpu') else f'bench_{name}'}"
            ) from None
        if one is not None:
            found.append(one)
    return found


def nearest(
    measured: Sequence[Measured], config: MLAConfig, load: Load, group: Group, device: Device
) -> Measured | None:
    """The row that is most like the attention of one device of the group, None without any."""
    if (config.kv_lora_rank, config.qk_rope_head_dim) != (C, R) or load.new_tokens != 1:
        return None
    kind = PlainCodec.kind if load.codec is None else load.codec.kind
    if load.codec is not None and load.codec != codec_from_spec(kind):
        return None  # rows are of each codec's defaults
    limit = attention_work(config, load, group).limit(device)
    wanted = (heads_per_device(config, group.tensor), kind, name_of(load.dtype), limit)
    alike = [one for one in measured if one.kind == wanted]
    return closest(alike, load.batch * -(-load.context_length // group.context))


def closest(measured: Sequence[Measured], num_rows: int) -> Measured | None:
    """The one whose B * S is nearest to ``num_rows``, as a ratio."""
    return min(measured, key=lambda one: abs(math.log(one.B * one.S / num_rows)), default=None)


def name_of(dtype: torch.dtype) -> str:
    """``bfloat16``, as in the rows."""
    return str(dtype).removeprefix("torch.")


def _of_processor(row: Row) -> Measured | None:
    """A row of `benchmarks.bench_decode` or `benchmarks.bench_cpu`.

    The latter names coded rows in place of the implementation.
    """
    impl, benchmark = row.get("impl", ""), row["benchmark"]
    if benchmark == "cpu":
        codec = {"cpp": "plain", "int8": "int8", "int4": "int4"}.get(impl, "")
    else:
        is_ours = benchmark == "decode" and impl == "cpp"
        codec = row["codec"] if is_ours and (row["L"], row["Z"]) == ("1", "0") else ""
    share = row.get("of_limit") or row.get("share")
    if not codec or not share or not row.get("cpu_ms"):
        return None
    bound = row["bound"] if row.get("of_limit") else "arithmetic"
    device = f"{row['device']}, {row['threads']} threads"
    return Measured(
        benchmark,
        *_sizes(row),
        codec=codec,
        dtype=row["dtype"],
        share=float(share),
        bound=bound,
        seconds=1e-3 * float(row["cpu_ms"]),
        device=device,
    )


def _of_gpu(row: Row, device: Device) -> Measured | None:
    """A row of `benchmarks.gpu_decode`, one query a sequence."""
    is_ours = row["benchmark"] == "gpu_decode" and row.get("impl") == OURS["gpu_decode"]
    is_here = row.get("device") == device.driver_name
    if not is_ours or not is_here or row.get("L") != "1" or not row.get("median_ms"):
        return None
    work = Work(int(row["bytes"]), int(row["flops"]))
    seconds = 1e-3 * float(row["median_ms"])
    return Measured(
        "gpu_decode",
        *_sizes(row),
        codec=row["codec"],
        dtype="bfloat16",
        share=work.seconds(device) / seconds,
        bound=work.limit(device),
        seconds=seconds,
        device=row["device"],
    )


def _sizes(row: Row) -> tuple[int, int, int]:
    return int(row["H"]), int(row["B"]), int(row["S"])
