"""Joules of a piece of work, from the counters of the machine, and what a token of it costs.

    NVML   total energy of one NVIDIA GPU since its driver was loaded, mJ; needs nvidia-ml-py
    RAPL   /sys/class/powercap/intel-rapl:*, uJ that wrap around: packages and their DRAM, of Intel
           and AMD processors; often readable by root alone

A counter counts everything on its chip: other processes, and what the chip takes when it idles. It
moves a few times to a thousand times a second, so measure work of a second or more. RAPL wraps
after some minutes under load; one turn is seen, a second one is not.

Where nothing can be read there are no joules, never 0, and `EnergyMeter.reason_absent` is the line
that says why.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch

from mla.plan import cost_per_million_tokens

POWERCAP = Path("/sys/class/powercap")
Value = float | None


class Source(Protocol):
    """Counters of one device."""

    name: str

    def read(self) -> list[int]:
        """What each counter shows now.

        Raises:
            OSError: it cannot be read any more.
        """

    def joules(self, before: list[int], after: list[int]) -> float:
        """Between two readings."""


class Zone(NamedTuple):
    """One counter of RAPL."""

    name: str
    path: Path
    range_uj: int  # it starts again from 0 behind this


class Rapl:
    """Energy of the processor's packages and of their memory.

    Args:
        root: of the powercap tree.

    Raises:
        OSError: there is no counter that can be read; the message is one line.
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        self.zones = _zones(root)
        if not self.zones:
            raise OSError(f"{root} has no package or dram counter of intel-rapl")
        self.read()  # permission is missing more often than the file
        self.name = f"RAPL {', '.join(zone.name for zone in self.zones)}"

    def read(self) -> list[int]:
        try:
            return [int((zone.path / "energy_uj").read_text()) for zone in self.zones]
        except ValueError as error:
            raise OSError(f"RAPL: energy_uj is no number: {error}") from None

    def joules(self, before: list[int], after: list[int]) -> float:
        total = 0
        for zone, first, last in zip(self.zones, before, after, strict=True):
            total += last - first if last >= first else last - first + zone.range_uj + 1
        return 1e-6 * total


class Nvml:
    """Energy of one NVIDIA GPU, found by the UUID that CUDA gives it.

    Raises:
        OSError: the library, the driver or the counter is not there; the message is one line.
    """

    def __init__(self, uuid: str) -> None:
        try:
            self._nvml: Any = importlib.import_module("pynvml")
        except ImportError:
            raise OSError("pynvml is not installed; pip install nvidia-ml-py brings it") from None
        self._call(self._nvml.nvmlInit)
        name = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
        self._handle = self._call(self._nvml.nvmlDeviceGetHandleByUUID, name)
        self.read()
        self.name = f"NVML {name}"

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._nvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from None

    def read(self) -> list[int]:
        return [int(self._call(self._nvml.nvmlDeviceGetTotalEnergyConsumption, self._handle))]

    def joules(self, before: list[int], after: list[int]) -> float:
        return 1e-3 * (after[0] - before[0])


class EnergyMeter:
    """Joules of a ``with`` block.

        with EnergyMeter() as meter:
            work()
        print(meter.joules if meter.joules is not None else meter.reason_absent)

    Args:
        device: the GPU, or the processor. An AMD GPU has no source here.
        source: counters to use instead of those of ``device``.

    Attributes:
        joules: of the block, all counters together; None where they cannot be read or stood still.
        seconds: of the block, wall time.
        source: name of the counters, None without any.
        reason_absent: one line, None where there are joules.
    """

    def __init__(self, device: torch.device | str = "cpu", *, source: Source | None = None) -> None:
        self.joules: float | None = None
        self.seconds = 0.0
        self.reason_absent: str | None = "nothing has been measured yet"
        self._source, self._device = source, torch.device(device)
        if source is None:
            try:
                self._source = source_of(self._device)
            except OSError as error:
                self.reason_absent = f"no energy: {error}"
        self.source = None if self._source is None else self._source.name

    @property
    def is_able(self) -> bool:
        """Whether there are counters to read."""
        return self._source is not None

    def __enter__(self) -> EnergyMeter:
        self.joules, self._before = None, self._read()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        after = self._read()
        self.seconds = time.perf_counter() - self._start
        if self._source is None or self._before is None or after is None:
            return
        joules = self._source.joules(self._before, after)
        if joules > 0:
            self.joules, self.reason_absent = joules, None
        else:
            self.reason_absent = (
                f"no energy: {self.source} did not move in {self.seconds:.3g} s; measure longer"
            )

    def _read(self) -> list[int] | None:
        if self._source is None:
            return None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        try:
            return self._source.read()
        except OSError as error:
            self.reason_absent = f"no energy: {error}"
            return None


def source_of(device: torch.device) -> Source:
    """The counters of a device.

    Raises:
        OSError: it has none that can be read; the message is one line.
    """
    if device.type == "cpu":
        return Rapl(POWERCAP)
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        raise OSError(f"there is no counter for {device.type} in this build and machine")
    return Nvml(str(torch.cuda.get_device_properties(device).uuid))


def cost_columns(
    tokens_per_second: float | None,
    *,
    joules_per_token: float | None,
    price_per_hour: float | None,
) -> dict[str, Value]:
    """Columns of a row; None, which is written as nothing, for what is not known."""
    price = None
    if price_per_hour is not None and tokens_per_second is not None:
        price = cost_per_million_tokens(tokens_per_second, price_per_hour)
    return {"joules_per_token": joules_per_token, "cost_per_million_tokens": price}


def joules_per_token(
    step: Callable[[], Any],
    *,
    meter: EnergyMeter,
    tokens: int = 1,
    seconds: float = 2.0,
    after: Callable[[], None] = lambda: None,
) -> float | None:
    """Joules of each token of ``step``, repeated for ``seconds``; None where there are no counters.

    Args:
        step: makes ``tokens`` tokens. Not called where nothing can be measured.
        meter: its ``reason_absent`` says why there is nothing.
        tokens: of one step, at least 1.
        seconds: how long to repeat it.
        after: takes back what a step changed; its energy counts too.
    """
    if not meter.is_able:
        return None
    count = 0
    with meter:
        deadline = time.perf_counter() + seconds
        while count == 0 or time.perf_counter() < deadline:
            step()
            after()
            count += 1
    return None if meter.joules is None else meter.joules / (count * tokens)


def _zones(root: Path) -> list[Zone]:
    """Packages, and the DRAM below them; cores and uncore are part of the package."""
    found = []
    for path in sorted(root.glob("intel-rapl:*")):
        try:
            name = (path / "name").read_text().strip()
            kind = name.partition("-")[0]
            if kind not in ("package", "dram"):
                continue
            range_uj = int((path / "max_energy_range_uj").read_text())
        except (OSError, ValueError):
            continue
        label = name if kind == "package" else f"{name} of {path.name.rpartition(':')[0]}"
        found.append(Zone(label, path, range_uj))
    return found
