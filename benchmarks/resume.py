"""Rows of earlier runs that still hold, so that a run that was cut off goes on where it stopped.

The JSON file of a benchmark notes for each finished point what its rows depend on: the sources of
the package and of the benchmarks, the device, the versions, the threads, and how thorough the run
was. A point is taken from there when all but the last are the same, and the earlier run was at
least as thorough. Rows of other sources or of another machine are dropped: one file speaks of one
state of the code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import Point
from benchmarks.report import ROOT, Row, environment, with_environment, write

SOURCES = ("mla/**/*.py", "mla/_C.*", "csrc/*", "benchmarks/*.py")


class Effort(NamedTuple):
    """How thorough a run is, and what its rows were priced with."""

    quick: bool
    rounds: int
    price_per_hour: float | None = None

    def suffices_for(self, other: Effort) -> bool:
        has_price = other.price_per_hour in (None, self.price_per_hour)
        return has_price and self.quick <= other.quick and self.rounds >= other.rounds


class Finished(NamedTuple):
    """A point and its rows, with their environment."""

    point: Point
    effort: Effort
    rows: Sequence[Row]


@lru_cache
def source() -> str:
    """Hash of everything that decides what is measured; names and contents."""
    found = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        found.update(f"{path.relative_to(ROOT)}\n".encode())
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:16]


class Journal:
    """The files of one benchmark; every change is written at once.

    Args:
        name: of the benchmark.
        folder: of ``NAME.csv`` and ``NAME.json``.
        effort: of this run.
        fresh: forget what is there.
    """

    def __init__(self, name: str, folder: Path, effort: Effort, *, fresh: bool = False) -> None:
        self.name, self.folder, self.effort = name, folder, effort
        self.paths = (folder / f"{name}.csv", folder / f"{name}.json")
        self._finished = [] if fresh else self._earlier()

    def rows_of(self, point: Point) -> Sequence[Row] | None:
        """Of this point, if they need not be measured again."""
        found = [x for x in self._finished if x.point == point]
        enough = [x for x in found if x.effort.suffices_for(self.effort)]
        return enough[0].rows if enough else None

    def add(self, point: Point, rows: Sequence[Row], ceilings: Mapping[str, float]) -> None:
        """Put the rows of a point in the place of those that it had, and write all."""
        new = Finished(dict(point), self.effort, with_environment(rows))
        places = [i for i, x in enumerate(self._finished) if x.point == point]
        at = slice(places[0], places[0] + 1) if places else slice(len(self._finished), None)
        self._finished[at] = [new]
        self._write(ceilings)

    def _write(self, ceilings: Mapping[str, float]) -> None:
        entries = [
            {"point": x.point, "effort": x.effort, "num_rows": len(x.rows)} for x in self._finished
        ]
        more = {"source": source(), "ceilings": dict(ceilings), "finished": entries}
        write(self.name, [row for x in self._finished for row in x.rows], self.folder, more)

    def _earlier(self) -> list[Finished]:
        """What the file holds, if it is of these sources and this machine."""
        try:
            document = json.loads(self.paths[1].read_text())
        except (OSError, ValueError):
            return []
        if document.get("source") != source() or not _is_here(document["environment"]):
            return []
        rows, finished = iter(document["rows"]), []
        for entry in document["finished"]:
            own = [_without_name(next(rows)) for _ in range(entry["num_rows"])]
            finished.append(Finished(entry["point"], Effort(*entry["effort"]), own))
        return finished


def _is_here(found: Mapping[str, Any]) -> bool:
    """The same machine and versions; the commit may be another while the sources are the same."""
    return all(found.get(key) == value for key, value in environment().items() if key != "commit")


def _without_name(row: Row) -> Row:
    return {key: value for key, value in row.items() if key != "benchmark"}
