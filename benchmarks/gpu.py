"""Everything that a GPU machine is asked for: ``make gpu OUT=dir COMMIT=sha PART=all``.

Parts are tests, decode, prefill and append; tune is run by name alone. Each part is a process of
its own with its share of the time and leaves ``gpu_<part>.csv`` and ``.json`` in OUT; a part that
fails or runs out of time keeps its rows so far and does not stop the next. Run again with the same
OUT, it goes on where it stopped.

With ``--dry-run`` nothing is timed and no GPU is needed: points, bytes, flops and files are as in
a real run, and where TRITON_INTERPRET=1 is set small cases are held against the oracle.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import gpu_measure
from benchmarks.gpu_run import NO_TIME, Options, failures, run_points
from benchmarks.gpu_tests import environment, run_tests

ROOT = Path(__file__).resolve().parent.parent
SHARES = {"tests": 4, "decode": 4, "prefill": 3, "append": 1}  # of the time, for PART=all
PARTS = (*SHARES, "tune")
GRACE = 20  # seconds that a part may take to end by itself


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--out", type=Path, required=True, help="folder for CSV and JSON")
    found.add_argument("--commit", default="", help="of this tree (default: git's, or unknown)")
    found.add_argument("--part", choices=(*PARTS, "all"), default="all")
    found.add_argument("--seconds", type=float, default=540, help="for all parts (default: 540)")
    found.add_argument("--only", nargs="+", default=[], metavar="KEY=VALUE", help="these points")
    found.add_argument("--dry-run", action="store_true", help="time nothing, need no GPU")
    found.add_argument("--fresh", action="store_true", help="measure again what OUT has already")
    found.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """0 if every part passed, 1 if one failed, 2 where there is no GPU."""
    arguments = parser().parse_args(argv)
    arguments.out = arguments.out.resolve()
    if not arguments.dry_run and not torch.cuda.is_available():
        print("gpu: failed: torch sees no CUDA device; --dry-run needs none", file=sys.stderr)
        return 2
    commit = arguments.commit or _git_commit()
    parts = list(SHARES) if arguments.part == "all" else [arguments.part]
    if arguments.in_process:
        _run(parts[0], _options(arguments, commit))
        return 0  # whatever the rows say: any other status means that the process broke
    if arguments.dry_run:
        ends = [_run(part, _options(arguments, commit)) for part in parts]
    else:
        ends = _run_all(parts, arguments, commit)
    passed = all(is_good for is_good, _ in ends)
    words = ", ".join(text for _, text in ends)
    print(f"gpu: {'passed' if passed else 'failed'}: {words}; results in {arguments.out}")
    return 0 if passed else 1


def _options(arguments: argparse.Namespace, commit: str) -> Options:
    return Options(
        out=arguments.out,
        commit=commit,
        seconds=arguments.seconds,
        only=tuple(arguments.only),
        dry_run=arguments.dry_run,
        fresh=arguments.fresh,
    )


def _run(part: str, options: Options) -> tuple[bool, str]:
    """Run one part here: whether it passed, and a few words."""
    if part == "tests":
        run_tests(options)
    else:
        run_points(part, options)
    return verdict(part, options.out)


def verdict(part: str, out: Path) -> tuple[bool, str]:
    """Whether the rows that a part left are good, and a few words about them."""
    _, rows = gpu_measure.read(part, out)
    if not rows:
        return False, f"{part} left nothing"
    late = sum(row["error"] == NO_TIME for row in rows)
    words = f", {late} out of time" if late else ""
    if part == "tests":
        bad = sum(row["outcome"] in ("failed", "error") for row in rows)
        good = sum(row["outcome"] in ("passed", "collected") for row in rows)
        return not bad, f"tests {good} of {len(rows)}{words}"
    bad = len(failures(rows))
    good = sum(not row["error"] for row in rows)
    return not bad, f"{part} {good} of {len(rows)} points{words}"


def _run_all(
    parts: Sequence[str], arguments: argparse.Namespace, commit: str
) -> list[tuple[bool, str]]:
    """Each part in a process of its own, started again behind a point that killed it."""
    deadline = time.monotonic() + arguments.seconds
    ends = []
    for index, part in enumerate(parts):
        left = sum(SHARES.get(name, 1) for name in parts[index:])
        budget = (deadline - time.monotonic()) * SHARES.get(part, 1) / left
        ends.append(_run_part(part, arguments, commit, budget))
    return ends


def _run_part(
    part: str, arguments: argparse.Namespace, commit: str, seconds: float
) -> tuple[bool, str]:
    deadline = time.monotonic() + seconds
    is_fresh = arguments.fresh
    while True:
        before = len(gpu_measure.read(part, arguments.out)[1])
        left = max(1.0, deadline - time.monotonic() - GRACE)
        command = [sys.executable, "-m", "benchmarks.gpu", "--in-process", "--part", part]
        command += ["--out", str(arguments.out), "--commit", commit, "--seconds", str(left)]
        command += ["--fresh"] * is_fresh + (["--only", *arguments.only] if arguments.only else [])
        status = _status(command, left + GRACE)
        if status is None:
            return False, f"{verdict(part, arguments.out)[1]}, stopped after {seconds:.0f} s"
        if status == 0:
            return verdict(part, arguments.out)
        after = len(gpu_measure.read(part, arguments.out)[1])
        if part == "tests" or after <= before or time.monotonic() > deadline - GRACE:
            return False, f"{verdict(part, arguments.out)[1]}, exit status {status}"
        is_fresh = False


def _status(command: Sequence[str], seconds: float) -> int | None:
    """Exit status, or None where time ran out: then nothing that the command started lives on."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True)
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _git_commit() -> str:
    """Of this tree; a repository around a tree without one is another's."""
    if not (ROOT / ".git").exists():
        return "unknown"
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


if __name__ == "__main__":
    raise SystemExit(main())
