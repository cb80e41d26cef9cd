"""The tests on a GPU, many processes side by side: most of their time is compiling on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from benchmarks import gpu_measure
from benchmarks.gpu_measure import Row
from benchmarks.gpu_run import NO_TIME, UNFINISHED, Options

ROOT = Path(__file__).resolve().parent.parent
MOST_PROCESSES = 12
MOST_CASES = 6  # of one process
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=0")


def run_tests(options: Options) -> list[Row]:
    """One row for each test: its outcome, seconds and first line of failure.

    Written again whenever a group of tests ends.
    """
    deadline = time.monotonic() + options.seconds
    groups = collect()
    if options.only:
        groups = [group for group in groups if any(word in group[0] for word in options.only)]
    outcome, error = ("collected", "") if options.dry_run else ("not run", UNFINISHED)
    found = [[_row(test, outcome, None, error) for test in group] for group in groups]
    facts = gpu_measure.environment(options.commit)
    gpu_measure.write("tests", _flat(found), facts, options.out)
    if not options.dry_run:
        with ThreadPoolExecutor(min(MOST_PROCESSES, os.cpu_count() or 1)) as pool:
            jobs = {pool.submit(run_group, group, deadline): i for i, group in enumerate(groups)}
            for job in as_completed(jobs):
                found[jobs[job]] = job.result()
                gpu_measure.write("tests", _flat(found), facts, options.out)
    return _flat(found)


def _flat(found: Sequence[Sequence[Row]]) -> list[Row]:
    return [row for rows in found for row in rows]


def collect() -> list[list[str]]:
    """Node ids of tests/kernels without those that only compile, and of tests marked cuda.

    Each inner list holds cases of one test function, a few at most.
    """
    kernels = _collect(["tests/kernels"], "not compiles")
    marked = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if "mark.cuda" in path.read_text(encoding="utf-8")
    ]
    others = _collect(marked, "cuda") if marked else []
    groups: dict[str, list[str]] = {}
    for test in [*kernels, *others]:
        groups.setdefault(test.partition("[")[0], []).append(test)
    return [
        tests[first : first + MOST_CASES]
        for tests in groups.values()
        for first in range(0, len(tests), MOST_CASES)
    ]


def _collect(paths: Sequence[str], expression: str) -> list[str]:
    command = [*PYTEST, "--collect-only", "-m", expression, *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment())
    if done.returncode not in (0, 5):  # 5: nothing collected
        raise RuntimeError(f"pytest cannot collect: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return [line for line in done.stdout.splitlines() if re.match(r"tests/\S+\.py::", line)]


def run_group(tests: Sequence[str], deadline: float) -> list[Row]:
    """Run the cases of one test function in a process of its own."""
    left = deadline - time.monotonic()
    if left <= 0:
        return [_row(test, "not run", None, NO_TIME) for test in tests]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [*PYTEST, "--hypothesis-profile=gpu", f"--junitxml={report}", *tests]
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, env=environment(), timeout=left
            )
        except subprocess.TimeoutExpired:
            return [_row(test, "not run", None, NO_TIME) for test in tests]
        if not report.is_file():
            error = f"exit status {done.returncode}: {(done.stdout + done.stderr).strip()[-300:]}"
            return [_row(test, "error", None, error) for test in tests]
        return parse(report)


def parse(report: Path) -> list[Row]:
    """Rows of a JUnit report."""
    rows = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        outcome, error = "passed", ""
        for tag, word in (("failure", "failed"), ("error", "error"), ("skipped", "skipped")):
            node = case.find(tag)
            if node is not None:
                lines = (node.get("message") or "").strip().splitlines()
                outcome, error = word, lines[0][:300] if lines else ""
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        rows.append(_row(name, outcome, float(case.get("time", 0)), error))
    return rows


def _row(test: str, outcome: str, seconds: float | None, error: str) -> Row:
    return {"test": test, "outcome": outcome, "seconds": seconds, "error": error}


def environment() -> dict[str, str]:
    """For a process of this tree, which need not be installed."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
